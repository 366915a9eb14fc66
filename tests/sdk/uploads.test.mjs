// A refusal reaches Node's fetch while it is still uploading. Started by stack.py.

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { STACK, says } from './gateways.mjs';

const TRIES = 20;
const BODY = JSON.stringify({ model: 'chat-model', messages: says('x'.repeat(40_000_000)) });

async function attempt(gateway) {
  try {
    const response = await fetch(`${STACK[gateway]}/v1/chat/completions`, { method: 'POST', body: BODY });
    await response.text();
    return response.status;
  } catch (error) {
    return String(error.cause ?? error);
  }
}

test('a refusal reaches fetch while it uploads', async () => {
  for (const [gateway, status] of [['open', 413], ['locked', 401]]) {
    const outcomes = [];
    for (let tries = 0; tries < TRIES; tries += 1) outcomes.push(await attempt(gateway));
    assert.deepEqual(outcomes, Array(TRIES).fill(status));
  }
});
