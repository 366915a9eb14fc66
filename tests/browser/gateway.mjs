// A gateway from a configuration, and the provider behind it: one that answers when it is told to.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createServer, request } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';

const ANSWER = JSON.stringify({ choices: [], usage: { prompt_tokens: 31, completion_tokens: 7 } });

/// Answers every request at once; those for the model `stalls` never.
export async function provider() {
  const server = createServer(async (incoming, answer) => {
    const body = (await incoming.toArray()).join('');
    if (JSON.parse(body).model === 'stalls') return;
    answer.writeHead(200, { 'content-type': 'application/json' }).end(ANSWER);
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return { base: `http://127.0.0.1:${server.address().port}/v1`, stop: () => { server.closeAllConnections(); server.close(); } };
}

/// Serves this configuration (an object; JSON is YAML) on a port of its own or the one given.
export async function gateway({ server = {}, providers }, port = 0) {
  const folder = mkdtempSync(join(tmpdir(), 'limitrate-page-'));
  const file = join(folder, 'config.yaml');
  writeFileSync(file, JSON.stringify({ server: { host: '127.0.0.1', port, ...server }, providers, log: { level: 'error' } }));
  const child = spawn(process.env.LIMITRATE_BIN, ['--config', file], { stdio: ['ignore', 'pipe', 'inherit'] });
  const [first] = await once(createInterface({ input: child.stdout }), 'line');
  const url = first.match(/http:\/\/127\.0\.0\.1:(\d+)/);
  return {
    url: url[0],
    port: Number(url[1]),
    page: `${url[0]}/admin/`,
    async stop() {
      child.kill('SIGKILL');
      if (child.exitCode === null && child.signalCode === null) await once(child, 'exit');
      rmSync(folder, { recursive: true });
    },
  };
}

/// Asks for a model; resolves with the status once the answer is there. `hangUp` ends it before.
export function ask(url, model, token) {
  const headers = { 'content-type': 'application/json', ...token && { authorization: `Bearer ${token}` } };
  const asked = request(`${url}/v1/chat/completions`, { method: 'POST', headers });
  const status = new Promise(done => asked.on('response', answer => answer.resume().on('end', () => done(answer.statusCode))).on('error', () => done(0)));
  asked.end(JSON.stringify({ model, messages: [] }));
  return { status, hangUp: () => asked.destroy() };
}
