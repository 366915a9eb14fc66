// What other readers of streams see of limitrate: the AI SDK and eventsource-parser. Started by stack.py.

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { createOpenAI } from '@ai-sdk/openai';
import { streamText } from 'ai';
import { createParser } from 'eventsource-parser';

import { STACK, says, scripted } from './gateways.mjs';

const TEXT = "Queue, don't reject.";
const HEARTBEATS = { 'x-stainless-read-timeout': '0.3' };

// The text, and the errors on the way.
async function stream(gateway, kind, model, headers) {
  const provider = createOpenAI({ baseURL: `${STACK[gateway]}/v1`, apiKey: 'any', headers });
  const errors = [];
  const result = streamText({ model: provider[kind](model), prompt: 'hi', maxRetries: 0, onError: ({ error }) => errors.push(error) });
  let text = '';
  for await (const part of result.textStream) text += part;
  return { text, errors };
}

test('the AI SDK reads a stream that waits with heartbeats', async () => {
  const { text, errors } = await stream('patient', 'chat', 'slow', { ...HEARTBEATS, ...scripted('late 1').headers });
  assert.deepEqual([text, errors], [TEXT, []]);
});

test('the AI SDK reads an error of a stream of Responses in words', async () => {
  for (const script of ['broken', 'late 1 refused 402 3']) {
    const { errors } = await stream('patient', 'responses', 'slow', { ...HEARTBEATS, ...scripted(script).headers });
    const words = script === 'broken' ? /broke before the answer was complete/ : /scripted 402/;
    const said = errors.map((error) => error.message ?? JSON.stringify(error)).join('\n').slice(0, 2000);
    assert.match(said, words, script);
  }
});

test('eventsource-parser reads a stream that waits with heartbeats', async () => {
  const response = await fetch(`${STACK.patient}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', ...HEARTBEATS, ...scripted('late 1').headers },
    body: JSON.stringify({ model: 'slow', stream: true, messages: says('hi') }),
  });
  const data = [];
  const parser = createParser({ onEvent: (event) => data.push(event.data) });
  for await (const piece of response.body.pipeThrough(new TextDecoderStream())) parser.feed(piece);
  const words = data.slice(0, -1).map((event) => JSON.parse(event).choices[0].delta.content);
  assert.deepEqual([words.join(''), data.at(-1)], [TEXT, '[DONE]']);
});
