// What a page of somebody else can do to a gateway without auth_token, from a browser that reaches it: nothing.
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { createServer } from 'node:http';
import { after, before, test } from 'node:test';
import { chromium } from 'playwright-core';
import { gateway } from './gateway.mjs';

// As root in a container there is no sandbox to be had; the rest keeps the browser from calling home. The names lead to this
// machine, as a stranger's name server can have it.
const FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--host-resolver-rules=MAP evil.example 127.0.0.1, MAP *.evil.example 127.0.0.1'];
const CHAT = '/v1/chat/completions';
const BODY = JSON.stringify({ model: 'm', messages: [] });

let browser;
before(async () => { browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: FLAGS }); });
after(() => browser?.close());

/// A provider that counts its requests and lets every page read, as some do.
async function provider() {
  const requests = [];
  const server = createServer((incoming, answer) => {
    requests.push(incoming.url);
    const headers = { 'content-type': 'application/json', 'access-control-allow-origin': '*', 'timing-allow-origin': '*' };
    incoming.resume().on('end', () => answer.writeHead(200, headers).end('{"choices":[]}'));
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return { base: `http://127.0.0.1:${server.address().port}/v1`, requests, stop: () => { server.closeAllConnections(); server.close(); } };
}

/// Serves an empty page under every path, on a port of its own.
async function site() {
  const server = createServer((_, answer) => answer.writeHead(200, { 'content-type': 'text/html' }).end('<!doctype html><title>a page</title>'));
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return { port: server.address().port, stop: () => { server.closeAllConnections(); server.close(); } };
}

/// What a page gets for each of these requests: a status, or 'unreadable' where the browser shows it none.
const attempts = (page, url) => page.evaluate(async ([url, chat, body]) => {
  const json = { 'content-type': 'application/json' }, text = { 'content-type': 'text/plain' };
  const tries = {
    text: () => fetch(url + chat, { method: 'POST', headers: text, body }),
    blind: () => fetch(url + chat, { method: 'POST', mode: 'no-cors', headers: text, body }),
    json: () => fetch(url + chat, { method: 'POST', headers: json, body }),
    key: () => fetch(url + chat, { method: 'POST', headers: { ...json, authorization: 'Bearer anything' }, body }),
    stats: () => fetch(`${url}/admin/stats`),
    models: () => fetch(`${url}/v1/models`),
  };
  const got = {};
  for (const [name, attempt] of Object.entries(tries)) got[name] = await attempt().then(answer => answer.status || 'unreadable', () => 'unreadable');
  return got;
}, [url, CHAT, BODY]);

/// A form that the page sends by itself, as browsers let every page do; resolves when its answer has replaced the page.
const form = (page, url) => Promise.all([
  page.waitForURL(`${url}${CHAT}`),
  page.evaluate(([action, body]) => {
    // A form of this type sends NAME=VALUE, so the `=` has to be inside a text of the JSON.
    const form = Object.assign(document.createElement('form'), { method: 'POST', enctype: 'text/plain', action });
    form.append(Object.assign(document.createElement('input'), { name: `${body.slice(0, -1)},"x":"`, value: '"}' }));
    document.body.append(form);
    form.submit();
  }, [url + CHAT, BODY]),
]);

const UNREADABLE = { text: 'unreadable', blind: 'unreadable', json: 'unreadable', key: 'unreadable', stats: 'unreadable', models: 'unreadable' };

/// Runs `inside` with a gateway, its provider, another site and a page in a browser of its own. `settings` makes the gateway's
/// of that site.
async function open(settings, inside) {
  const upstream = await provider(), other = await site();
  const server = settings(other);
  const providers = [{ name: 'p', base_url: upstream.base, models: ['m'], rate_limit: { mode: 'burst', rpm: 60000, capacity: 100 } }];
  const served = await gateway({ providers, server });
  const context = await browser.newContext();
  try {
    await inside({ page: await context.newPage(), served, upstream, other });
  } finally {
    await context.close();
    await served.stop();
    other.stop();
    upstream.stop();
  }
}

test('a page of another origin spends nothing and reads nothing', async () => {
  for (const server of [{}, { cors_origins: ['https://chat.example.com'] }]) {
    await open(() => server, async ({ page, served, upstream, other }) => {
      await page.goto(`http://evil.example:${other.port}/`);
      assert.deepEqual(await attempts(page, served.url), UNREADABLE);
      await form(page, served.url);
      assert.match(await page.locator('body').innerText(), /origin_not_allowed/);
      assert.deepEqual(upstream.requests, []);
    });
  }
});

test('a page without an origin spends nothing and reads nothing', async () => {
  await open(() => ({}), async ({ page, served, upstream, other }) => {
    await page.goto(`http://evil.example:${other.port}/`);
    await page.setContent('<iframe sandbox="allow-scripts allow-forms" srcdoc="<p>a page"></iframe>');
    const frame = await (await page.locator('iframe').elementHandle()).contentFrame();
    assert.equal(await frame.evaluate(() => origin), 'null');
    assert.deepEqual(await attempts(frame, served.url), UNREADABLE);
    assert.deepEqual(upstream.requests, []);
  });
});

test('a name of a stranger that leads to the gateway is not the gateway\'s', async () => {
  await open(() => ({}), async ({ page, served, upstream }) => {
    // The browser takes this for the page's own origin, and would let it read everything.
    const url = `http://rebound.evil.example:${served.port}`;
    const answer = await page.goto(`${url}/admin/`);
    assert.equal(answer.status(), 403);
    assert.match(await answer.text(), /host_not_allowed.*|server\.hosts/);
    assert.deepEqual(await attempts(page, url), { text: 403, blind: 403, json: 403, key: 403, stats: 403, models: 403 });
    assert.deepEqual(upstream.requests, []);
  });
});

test('the page of the gateway shows in no frame', async () => {
  await open(() => ({}), async ({ page, served, other }) => {
    await page.goto(`http://evil.example:${other.port}/`);
    for (const path of ['/admin/', '/admin/stats']) {
      const blocked = page.waitForEvent('console', message => /frame-ancestors|X-Frame-Options/i.test(message.text()));
      await page.setContent(`<iframe src="${served.url}${path}"></iframe>`);
      await blocked;
      const frame = await (await page.locator('iframe').elementHandle()).contentFrame();
      assert.notEqual(new URL(frame.url()).host, new URL(served.url).host, path);
    }
  });
});

test('pages of the gateway and of this machine may call', async () => {
  await open(() => ({}), async ({ page, served, upstream, other }) => {
    await page.goto(served.page);
    const own = await attempts(page, served.url);
    assert.deepEqual(own, { text: 200, blind: 200, json: 200, key: 200, stats: 200, models: 200 });
    assert.equal(upstream.requests.length, 4);
    // It may send, and reads nothing as long as it is not listed.
    await page.goto(`http://localhost:${other.port}/`);
    assert.deepEqual(await attempts(page, served.url), UNREADABLE);
    assert.equal(upstream.requests.length, 6, 'the two that need no preflight');
  });
});

test('a page that is listed may call and read', async () => {
  await open(other => ({ cors_origins: [`http://evil.example:${other.port}`] }), async ({ page, served, upstream, other }) => {
    await page.goto(`http://evil.example:${other.port}/`);
    assert.deepEqual(await attempts(page, served.url), { text: 200, blind: 'unreadable', json: 200, key: 200, stats: 200, models: 200 });
    assert.equal(upstream.requests.length, 4);
  });
});
