// What the tests of openai-node share: where the gateways of stack.py are, and what they and the upstream have seen.

import assert from 'node:assert/strict';
import { setTimeout as pause } from 'node:timers/promises';

export const STACK = JSON.parse(process.env.STACK);

// The upstream's clock is the wall's, the gateway's is monotonic: NTP may bend one against the other.
export const CLOCKS_APART_SECONDS = 0.001;

export const says = (content) => [{ role: 'user', content }];
export const scripted = (script) => ({ headers: { 'x-script': script } });

async function get(url) {
  return (await fetch(url)).json();
}

// What the upstream got for that provider, oldest first.
export const seen = (provider) => get(`${STACK.upstream}/-/seen/${provider}`);
export const openGate = (gate) => fetch(`${STACK.upstream}/-/open/${gate}`, { method: 'POST' });

export async function stats(provider, gateway = 'open') {
  const { providers } = await get(`${STACK[gateway]}/admin/stats`);
  return providers.find((row) => row.provider === provider);
}

// Waits until /admin/stats shows these values; a cadence is no reason to wait longer.
export async function until(fields, provider, gateway = 'open') {
  const deadline = Date.now() + 5000;
  for (;;) {
    const row = await stats(provider, gateway);
    if (Object.entries(fields).every(([name, value]) => row[name] === value)) return;
    assert.ok(Date.now() < deadline, `never ${JSON.stringify(fields)}: ${JSON.stringify(row)}`);
    await pause(10);
  }
}

export async function gaps(provider) {
  const instants = (await seen(provider)).map((request) => request.at);
  return instants.slice(1).map((instant, index) => instant - instants[index]);
}

export async function collect(iterable) {
  const items = [];
  for await (const item of iterable) items.push(item);
  return items;
}

export const content = (answer) => answer.choices[0].message.content;
export const word = (chunk) => chunk.choices[0].delta?.content ?? chunk.choices[0].text;

// The error that a call ends in; its class is checked exactly.
export async function failure(call, kind) {
  const error = await call().then(() => assert.fail('no error'), (error) => error);
  assert.equal(error.constructor, kind, error.stack);
  return error;
}
