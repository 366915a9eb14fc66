// What openai-node sees of limitrate. Started by stack.py, which runs the gateways and the scripted upstream.

import assert from 'node:assert/strict';
import { test } from 'node:test';
import {
  CLOCKS_APART_SECONDS, STACK, collect, content, failure, gaps, openGate, says, scripted, seen, stats, until, word,
} from './gateways.mjs';

const { default: OpenAI, APIError, APIUserAbortError } = await import(process.env.OPENAI_PACKAGE ?? 'openai');

// Retries hide failures; where they are the subject a test asks for them.
const PLAIN = { apiKey: "the-caller's-key", maxRetries: 0, timeout: 20_000 };
const client = new OpenAI({ baseURL: `${STACK.open}/v1`, ...PLAIN });
const demo = new OpenAI({ baseURL: `${STACK.demo}/v1`, ...PLAIN });

function ask(model, text = 'hi', { sdk = client, options, ...more } = {}) {
  return sdk.chat.completions.create({ model, messages: says(text), ...more }, options);
}

// --- models

test('models of all providers are listed once and typed', async () => {
  const models = await collect(client.models.list());
  const names = models.map((model) => model.id);
  for (const name of ['chat-model', 'vendor/chat-model', 'alias', 'timed', 'quick/chat-model', 'twin/chat-model']) {
    assert.equal(names.filter((other) => other === name).length, 1, name);
  }
  assert.ok(!names.includes('vendor/real-name'));
  for (const model of models) {
    assert.equal(model.object, 'model');
    assert.ok(Number.isInteger(model.created) && typeof model.owned_by === 'string');
  }
});

test('a model with a slash is retrieved escaped and raw', async () => {
  const urls = [];
  const watching = client.withOptions({ fetch: (url, init) => (urls.push(String(url)), fetch(url, init)) });
  assert.equal((await watching.models.retrieve('vendor/chat-model')).id, 'vendor/chat-model');
  assert.equal((await watching.get('/models/vendor/chat-model')).id, 'vendor/chat-model');
  assert.deepEqual(urls.map((url) => url.slice(STACK.open.length)), [
    '/v1/models/vendor%2Fchat-model',
    '/v1/models/vendor/chat-model',
  ]);
});

test('retrieving an unknown model is not found', async () => {
  const error = await failure(() => client.models.retrieve('vendor/chat-modle'), OpenAI.NotFoundError);
  assert.equal(error.code, 'model_not_found');
  assert.match(error.message, /vendor\/chat-model/);
});

// --- answers

test('chat is answered by the provider under its own key', async () => {
  assert.equal(content(await ask('chat-model', 'hello')), 'hello');
  const request = (await seen('quick')).at(-1);
  assert.equal(request.path, '/quick/v1/chat/completions');
  assert.equal(request.headers.authorization, `Bearer ${STACK.provider_key}`);
  assert.ok(!JSON.stringify(request).includes(PLAIN.apiKey));
});

test('a provider without a key gets no authorization', async () => {
  assert.equal((await ask('twin/chat-model')).model, 'chat-model');
  assert.equal((await seen('twin')).at(-1).headers.authorization, undefined);
});

test('an alias reaches the provider under its own name', async () => {
  assert.equal((await ask('alias')).model, 'vendor/real-name');
});

test('a model with a slash is chatted with', async () => {
  assert.equal((await ask('vendor/chat-model')).model, 'vendor/chat-model');
});

test('unicode goes there and back unchanged', async () => {
  const text = '限速 — наверное 🦀 \u2028 \\u0041 "quoted" \0';
  assert.equal(content(await ask('chat-model', text)), text);
  // The alias's name is spliced into a body that has bytes of several widths around it.
  assert.equal(content(await ask('alias', text)), text);
});

test('completions are answered', async () => {
  const answer = await client.completions.create({ model: 'chat-model', prompt: 'once' });
  assert.equal(answer.choices[0].text, 'once');
});

test('embeddings are answered', async () => {
  const answer = await client.embeddings.create({ model: 'chat-model', input: 'once', encoding_format: 'float' });
  assert.deepEqual(answer.data[0].embedding, [0.5, -0.25]);
});

test('any other path below /v1 is passed on', async () => {
  const body = { model: 'chat-model', query: 'q', documents: ['a', 'b'] };
  const answer = await client.post('/rerank', { body });
  assert.deepEqual(answer.results.map((row) => row.index), [0, 1]);
  assert.equal((await seen('quick')).at(-1).body, JSON.stringify(body));
});

test("the request id is the provider's or else ours", async () => {
  assert.equal((await ask('chat-model'))._request_id, 'given-by-the-provider');
  assert.ok((await client.models.list().withResponse()).request_id);
  const error = await failure(() => ask('nobody-has-this'), OpenAI.NotFoundError);
  assert.ok(error.requestID);
});

test('an answer says who gave it and how long it was queued', async () => {
  const { response } = await ask('chat-model').withResponse();
  assert.equal(response.headers.get('x-limitrate-provider'), 'quick');
  assert.match(response.headers.get('x-limitrate-queued-ms'), /^\d+$/);
});

// --- streams

for (const kind of ['chat', 'completions']) {
  test(`a stream comes word by word as the provider sends it: ${kind}`, async () => {
    const gate = `node-${kind}`;
    const options = scripted(`gated ${gate}`);
    const stream = kind === 'chat'
      ? await ask('chat-model', 'x', { stream: true, options })
      : await client.completions.create({ model: 'chat-model', prompt: 'x', stream: true }, options);
    const words = [];
    // The provider does not send a word before the one in front of it has been read here.
    for await (const chunk of stream) {
      words.push(word(chunk));
      await openGate(gate);
    }
    assert.deepEqual(words, ['Queue,', " don't", ' reject.']);
  });
}

test('a stream that breaks at the provider raises after what came', async () => {
  const words = [];
  const error = await failure(async () => {
    const stream = await ask('chat-model', 'x', { stream: true, options: scripted('broken') });
    for await (const chunk of stream) words.push(word(chunk));
  }, APIError);
  assert.deepEqual(words, ['Queue,', " don't"]);
  assert.equal(error.code, 'upstream_disconnected');
});

// --- refusals and failures

for (const body of [{}, { model: 5 }, { model: null }, { messages: [{ model: 'chat-model' }] }]) {
  test(`a body without a model is a bad request: ${JSON.stringify(body)}`, async () => {
    const error = await failure(() => client.post('/chat/completions', { body }), OpenAI.BadRequestError);
    assert.equal(error.type, 'invalid_request_error');
    assert.match(error.message, /model/);
  });
}

test('an unknown model is not found and the nearest names are told', async () => {
  const error = await failure(() => ask('chat-modle'), OpenAI.NotFoundError);
  assert.equal(error.code, 'model_not_found');
  assert.match(error.message, /chat-model/);
});

test('a wrong method is refused with the right one', async () => {
  const error = await failure(() => client.get('/chat/completions'), APIError);
  assert.equal(error.status, 405);
  assert.equal(error.headers.get('allow'), 'POST');
});

test('a body over the limit is refused with 413', async () => {
  const error = await failure(() => ask('chat-model', 'x'.repeat(300_000)), APIError);
  assert.equal(error.status, 413);
  assert.ok(error.error.message);
});

test('a wrong token is refused and the right one let in', async () => {
  const baseURL = `${STACK.locked}/v1`;
  const wrong = new OpenAI({ baseURL, ...PLAIN });
  for (const call of [() => ask('chat-model', 'hi', { sdk: wrong }), () => wrong.models.list()]) {
    const error = await failure(call, OpenAI.AuthenticationError);
    assert.equal(error.code, 'invalid_api_key');
    assert.match(error.headers.get('www-authenticate'), /^Bearer/);
  }
  const right = new OpenAI({ baseURL, ...PLAIN, apiKey: STACK.gateway_token });
  assert.deepEqual((await collect(right.models.list())).map((model) => model.id), ['chat-model']);
  assert.equal(content(await ask('chat-model', 'hi', { sdk: right })), 'hi');
  const request = (await seen('locked')).at(-1);
  assert.equal(request.headers.authorization, `Bearer ${STACK.provider_key}`);
});

const KINDS = {
  400: OpenAI.BadRequestError,
  401: OpenAI.AuthenticationError,
  403: OpenAI.PermissionDeniedError,
  404: OpenAI.NotFoundError,
  409: OpenAI.ConflictError,
  422: OpenAI.UnprocessableEntityError,
  500: OpenAI.InternalServerError,
  529: OpenAI.InternalServerError,
};
for (const [status, kind] of Object.entries(KINDS)) {
  for (const stream of [false, true]) {
    test(`the provider's own errors arrive as they are: ${status}${stream ? ', streaming' : ''}`, async () => {
      const error = await failure(() => ask('chat-model', 'x', { stream, options: scripted(`status ${status}`) }), kind);
      assert.equal(error.status, Number(status));
      const want = { message: `scripted ${status}`, type: 'scripted_error', param: null, code: 'scripted' };
      assert.deepEqual(error.error, want);
    });
  }
}

test('an unreachable provider is a 502 that says why and tells no key', async () => {
  const error = await failure(() => ask('unreachable'), OpenAI.InternalServerError);
  assert.equal(error.status, 502);
  assert.equal(error.code, 'upstream_unreachable');
  assert.match(error.message, /unreachable.*refused/i);
  assert.ok(!JSON.stringify(error.error).includes(STACK.provider_key));
});

// --- waiting

test('three at once leave an interval apart', async () => {
  const texts = ['a', 'b', 'c'];
  const answers = await Promise.all(texts.map((text) => ask('timed', text)));
  assert.deepEqual(answers.map(content), texts);
  const [first, second, ...none] = await gaps('timed');
  assert.deepEqual(none, []);
  assert.ok(Math.min(first, second) >= 0.4 - CLOCKS_APART_SECONDS, `${first}, ${second}`);
  assert.ok(first + second < 0.8 + 2, `${first}, ${second}`);
});

for (const stream of [false, true]) {
  const provider = stream ? 'left-stream' : 'left';
  test(`a caller who leaves the queue costs no slot: ${stream ? 'streaming' : 'plain'}`, async () => {
    const leave = new AbortController();
    await ask(provider, 'first');
    const leaving = failure(() => ask(provider, 'leaves', { stream, options: { signal: leave.signal } }), APIUserAbortError);
    await until({ queued_ahead: 1 }, provider);
    const staying = ask(provider, 'stays');
    await until({ queued_ahead: 2 }, provider);
    leave.abort();
    await leaving;
    await until({ queued_ahead: 1, cancelled_in_queue: 1, sent: 1 }, provider);
    await staying;

    const said = (await seen(provider)).map((request) => JSON.parse(request.body).messages[0].content);
    assert.deepEqual(said, ['first', 'stays']);
    // Behind the one who left it would have been 3 s.
    const [gap] = await gaps(provider);
    assert.ok(1.5 - CLOCKS_APART_SECONDS <= gap && gap < 2.9, `${gap}`);
    assert.equal((await stats(provider)).sent, 2);
  });
}

for (const script of ['held', 'gated']) {
  test(`a caller who leaves a running request ends it: ${script}`, async () => {
    const leave = new AbortController();
    const options = { ...scripted(`${script} never-opened`), signal: leave.signal };
    const stream = script === 'gated';
    const running = ask('chat-model', 'x', { stream, options });
    await until({ in_flight: 1 }, 'quick');
    if (stream) {
      // Leaving the loop hangs up.
      for await (const chunk of await running) if (word(chunk)) break;
    } else {
      leave.abort();
      await failure(() => running, APIUserAbortError);
    }
    await until({ in_flight: 0 }, 'quick');
  });
}

test('a wait past the limit is a 503 with Retry-After', async () => {
  await ask('busy');
  const error = await failure(() => ask('busy'), OpenAI.InternalServerError);
  assert.equal(error.status, 503);
  assert.equal(error.code, 'queue_wait_exceeded');
  assert.equal(error.type, 'rate_limit_error');
  assert.match(error.message, /busy/);
  assert.equal(error.headers.get('retry-after'), '1');
  assert.equal(error.headers.get('x-should-retry'), null);
  assert.equal((await stats('busy')).rejected_wait, 1);
  assert.equal((await seen('busy')).length, 1);
});

test('a retrying client outlives that 503', async () => {
  const sdk = client.withOptions({ maxRetries: 1 });
  for (const text of ['first', 'second']) assert.equal(content(await ask('busy-retried', text, { sdk })), text);
  assert.equal((await stats('busy-retried')).rejected_wait, 1);
  const [gap] = await gaps('busy-retried');
  assert.ok(2 - CLOCKS_APART_SECONDS <= gap && gap < 5, `${gap}`);
});

test('a retrying client is told not to hammer where the wait is long', async () => {
  await ask('hopeless');
  const sdk = client.withOptions({ maxRetries: 2 });
  const error = await failure(() => ask('hopeless', 'x', { sdk }), OpenAI.InternalServerError);
  assert.equal(error.headers.get('x-should-retry'), 'false');
  const seconds = Number(error.headers.get('retry-after'));
  assert.ok(90 <= seconds && seconds <= 100, `${seconds}`);
  assert.equal((await stats('hopeless')).rejected_wait, 1);
});

// --- what the provider refuses

for (const stream of [false, true]) {
  test(`a 429 is waited out and never seen: ${stream ? 'streaming' : 'plain'}`, async () => {
    const before = (await seen('limited')).length;
    const answer = await ask('limited', 'hi', { stream, options: scripted(`limited 1 node-${stream}`) });
    if (stream) assert.equal((await collect(answer)).map(word).join(''), "Queue, don't reject.");
    else assert.equal(content(answer), 'hi');
    const [refused, answered, ...none] = (await seen('limited')).slice(before);
    assert.deepEqual(none, []);
    assert.ok(answered.at - refused.at >= 1 - CLOCKS_APART_SECONDS, `${answered.at - refused.at}`);
    // Sent again by the gateway, not by the SDK.
    assert.deepEqual([refused.headers, refused.body], [answered.headers, answered.body]);
  });
}

for (const [status, kind] of [[429, OpenAI.RateLimitError], [503, OpenAI.InternalServerError]]) {
  for (const stream of [false, true]) {
    const how = `${status}${stream ? ', streaming' : ''}`;
    test(`the last refusal is the provider's own with its Retry-After: ${how}`, async () => {
      const error = await failure(() => ask('final', 'x', { stream, options: scripted(`refused ${status} 7`) }), kind);
      assert.equal(error.error.message, `scripted ${status}`);
      assert.equal(error.headers.get('retry-after'), '7');
      assert.equal(error.headers.get('x-should-retry'), 'true');
    });
  }
}

for (const [script, sent, least] of [['refused 429 1', 3, 1], ['refused 429 100', 1, 0], ['quota', 1, 0]]) {
  test(`a retrying client does as the last refusal says: ${script}`, async () => {
    const before = (await seen('final')).length;
    const options = { sdk: client.withOptions({ maxRetries: 2 }), options: scripted(script) };
    const error = await failure(() => ask('final', 'x', options), OpenAI.RateLimitError);
    assert.equal(error.headers.get('x-should-retry'), String(sent > 1));
    assert.equal((await seen('final')).length - before, sent);
    for (const gap of (await gaps('final')).slice(before)) assert.ok(gap >= least - CLOCKS_APART_SECONDS, `${gap}`);
  });
}

// --- the demo

test('the demo lists its models', async () => {
  const names = (await collect(demo.models.list())).map((model) => model.id);
  for (const name of ['demo', 'demo-fast', 'demo-spaced/demo', 'demo-burst/demo']) assert.ok(names.includes(name), name);
});

test('the demo chats and counts', async () => {
  const answer = await ask('demo-fast', 'ping', { sdk: demo });
  assert.match(content(answer), /ping/);
  const { prompt_tokens, completion_tokens, total_tokens } = answer.usage;
  assert.ok(total_tokens > 0 && total_tokens === prompt_tokens + completion_tokens);
});

test('the demo streams what it would have said', async () => {
  const whole = content(await ask('demo-burst/demo', 'ping', { sdk: demo }));
  const stream = await ask('demo-burst/demo', 'ping', {
    sdk: demo,
    stream: true,
    stream_options: { include_usage: true },
  });
  const chunks = await collect(stream);
  const words = chunks.filter((chunk) => chunk.choices.length).map((chunk) => chunk.choices[0].delta.content ?? '');
  assert.equal(words.join(''), whole);
  assert.deepEqual(chunks.at(-1).choices, []);
  assert.ok(chunks.at(-1).usage.total_tokens > 0);
  assert.equal(chunks.at(-2).choices[0].finish_reason, 'stop');
});

test('the demo completes and embeds', async () => {
  const answer = await demo.completions.create({ model: 'demo-fast', prompt: 'ping' });
  assert.match(answer.choices[0].text, /ping/);
  const stream = await demo.completions.create({ model: 'demo-fast', prompt: 'ping', stream: true });
  assert.match((await collect(stream)).map(word).join(''), /ping/);
  // The SDK asks for base64 unless told otherwise.
  const [usual, floats] = await Promise.all([{}, { encoding_format: 'float' }].map(async (more) => {
    const answer = await demo.embeddings.create({ model: 'demo-fast', input: 'ping', ...more });
    return answer.data[0].embedding;
  }));
  assert.ok(usual.length > 0);
  assert.deepEqual(usual, floats);
});

test('three at once in the demo queue and drain as its stats say', async () => {
  const start = performance.now();
  const calls = Promise.all(['0', '1', '2'].map((text) => ask('demo', text, { sdk: demo })));
  for (const tokens of [-2, -1, 0]) await until({ tokens, queued_ahead: -tokens + 0 }, 'demo-spaced', 'demo');
  (await calls).forEach((answer, number) => assert.match(content(answer), new RegExp(number)));
  // They left at 0, 1.5 and 3 s.
  const seconds = (performance.now() - start) / 1000;
  assert.ok(3 <= seconds && seconds < 8, `${seconds}`);
});
