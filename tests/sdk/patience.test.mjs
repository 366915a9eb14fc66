// How openai-node waits at limitrate: heartbeats, deadlines, retries. Started by stack.py. The waits are real, so all tests
// run at the same time, each with models of its own.

import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { CLOCKS_APART_SECONDS, STACK, collect, content, failure, gaps, says, scripted, seen, stats, until, word } from './gateways.mjs';

const { default: OpenAI, APIConnectionTimeoutError, APIError } = await import(process.env.OPENAI_PACKAGE ?? 'openai');

// Shorter than the waits here. The SDK announces it where a call sets it, not where the client does, in whole seconds.
const TIMEOUT = 1500;
const ANNOUNCED = { timeout: TIMEOUT };
const OFF = { 'X-Limitrate-Heartbeat': 'off' };

const PLAIN = { apiKey: "the-caller's-key", maxRetries: 0, timeout: 20_000 };
const client = new OpenAI({ baseURL: `${STACK.patient}/v1`, ...PLAIN });
const hasty = client.withOptions({ timeout: TIMEOUT });
const direct = new OpenAI({ baseURL: `${STACK.upstream}/direct/v1`, ...PLAIN });

function ask(model, text = 'hi', { sdk = client, options, ...more } = {}) {
  return sdk.chat.completions.create({ model, messages: says(text), ...more }, options);
}

// What was said, word by word.
async function stream(model, options, sdk = client) {
  const words = [];
  for await (const chunk of await ask(model, 'hi', { sdk, stream: true, options })) words.push(word(chunk));
  return words;
}

const late = (script = '', options = ANNOUNCED) => ({ ...options, ...scripted(`late 2 ${script}`) });
const WORDS = ['Queue,', " don't", ' reject.'];
const BROKE = /broke before the answer was complete/;

describe('patience', { concurrency: true }, () => {
  test('a stream that waits longer than the timeout succeeds with heartbeats and fails without', async () => {
    const model = 'openai-stream';
    await stream(model);
    const start = performance.now();
    const [queued, slow, , refused] = await Promise.all([
      stream(model, ANNOUNCED),
      stream('slow', late()),
      // Who does not tell how long it waits finds out for itself.
      failure(() => stream(model, { headers: OFF }, hasty), APIConnectionTimeoutError),
      failure(() => stream(model, { ...ANNOUNCED, headers: OFF }), OpenAI.InternalServerError),
    ]);
    assert.deepEqual([queued, slow], [WORDS, WORDS]);
    assert.ok(performance.now() - start > 2000);
    assert.equal(refused.code, 'deadline_exceeded');
  });

  test('a plain call is over at its timeout, so no heartbeat keeps it', async () => {
    const model = 'openai-plain';
    await ask(model);
    const [refused] = await Promise.all([
      failure(() => ask(model, 'hi', { options: ANNOUNCED }), OpenAI.InternalServerError),
      failure(() => ask(model, 'hi', { sdk: hasty }), APIConnectionTimeoutError),
    ]);
    assert.equal(refused.code, 'deadline_exceeded');
  });

  test('white space in front of a plain answer is no part of it', async () => {
    // As a client would that gives up without a byte in that time.
    const headers = { ...scripted('late 2').headers, 'x-stainless-read-timeout': '1.5' };
    const call = () => ask('slow', 'hi', { options: { headers } });
    const [answer, text] = await Promise.all([call(), call().asResponse().then((response) => response.text())]);
    assert.equal(content(answer), 'hi');
    assert.match(text, /^\n+\{/);
  });

  test('heartbeats leave no trace in a stream', async () => {
    const question = { model: 'slow', messages: says('hi'), stream: true };
    const calls = [
      (sdk, options) => sdk.chat.completions.create(question, options),
      (sdk, options) => sdk.chat.completions.create({ ...question, stream_options: { include_usage: true } }, options),
      (sdk, options) => sdk.responses.create({ model: 'slow', input: 'hi', stream: true }, options),
    ];
    const all = (sdk, options) => Promise.all(calls.map(async (call) => collect(await call(sdk, options))));
    const sent = await all(direct);
    assert.deepEqual(await all(client, late()), sent);
    assert.deepEqual(sent.map((chunks) => chunks.length), [3, 4, 5]);
    assert.equal(sent[1].at(-1).usage.total_tokens, 10);
  });

  for (const [model, script, message] of [
    ['slow', 'status 400', /scripted 400/],
    ['slow', 'html 500', /answered 500: <html>/],
    ['slow', 'broken', BROKE],
    ['slow', 'torn', BROKE],
    ['unreachable', 'never read', /cannot be reached/],
  ]) {
    test(`what goes wrong after a heartbeat raises with its message: ${model}, ${script}`, async () => {
      const error = await failure(() => stream(model, late(script)), APIError);
      assert.match(error.message, message);
    });
  }

  test('a stream that breaks inside an event raises after the events before it', async () => {
    const came = [];
    const error = await failure(async () => {
      for await (const chunk of await ask('slow', 'hi', { stream: true, options: scripted('torn') })) came.push(word(chunk));
    }, APIError);
    assert.match(error.message, BROKE);
    assert.deepEqual(came, WORDS.slice(0, 2));
  });

  test('a response that breaks inside an event raises as well', async () => {
    const call = () => client.responses.create({ model: 'slow', input: 'hi', stream: true }, scripted('torn'));
    const error = await failure(async () => collect(await call()), APIError);
    assert.match(error.message, BROKE);
  });

  test('who would wait in vain is told so at once and not to hammer', async () => {
    const model = 'far-openai';
    await ask(model);
    const start = performance.now();
    const error = await failure(() => ask(model, 'hi', { options: { ...ANNOUNCED, maxRetries: 2 } }), OpenAI.InternalServerError);
    assert.ok(performance.now() - start < TIMEOUT);
    assert.equal(error.code, 'deadline_exceeded');
    assert.match(error.message, /the caller waits 1 s/);
    assert.equal(error.headers.get('x-should-retry'), 'false');
    const seconds = Number(error.headers.get('retry-after'));
    assert.ok(90 <= seconds && seconds <= 100, `${seconds}`);
    assert.equal((await stats(model, 'patient')).rejected_deadline, 1);
    assert.equal((await seen(model)).length, 1);
  });

  test('a retrying client is back when it can be served in time', async () => {
    const model = 'soon-openai';
    await ask(model);
    assert.equal(content(await ask(model, 'hi', { options: { ...ANNOUNCED, maxRetries: 2 } })), 'hi');
    assert.equal((await stats(model, 'patient')).rejected_deadline, 1);
    const [gap] = await gaps(model);
    assert.ok(gap >= 2.75 - CLOCKS_APART_SECONDS, `${gap}`);
  });

  test('a retry takes back the place of the call that timed out', async () => {
    const model = 'place-openai';
    await ask(model, 'first');
    // The slot comes after 3 s; it times out after 1.75 and is back half a second later at most.
    const retried = ask(model, 'retried', { sdk: client.withOptions({ timeout: 1750, maxRetries: 2 }) });
    await until({ queued_ahead: 1 }, model, 'patient');
    const leave = new AbortController();
    const other = failure(() => ask(model, 'other', { options: { signal: leave.signal } }), OpenAI.APIUserAbortError);
    assert.equal(content(await retried), 'retried');
    leave.abort();
    await other;
    const said = (await seen(model)).map((request) => JSON.parse(request.body).messages[0].content);
    assert.deepEqual(said, ['first', 'retried']);
    assert.equal((await stats(model, 'patient')).returned_to_place, 1);
  });
});
