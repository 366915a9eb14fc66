// What a person sees at /admin/: figures that are right and move, names that stay text, a token that is asked for once.
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { chromium } from 'playwright-core';
import { ask, gateway, provider } from './gateway.mjs';

// As root in a container there is no sandbox to be had; the rest keeps the browser from calling home.
const FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'];
const HOSTILE = '<img src=x onerror="window.harmed=1"><script>window.harmed=1</script>';
const DECEIVING = 'safe\u202egnp.exe';
const UNSHAPED = { mode: 'burst', rpm: 60000, capacity: 100 };

let browser, upstream;
before(async () => {
  upstream = await provider();
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: FLAGS });
});
after(async () => {
  await browser?.close();
  upstream?.stop();
});

const one = (name, models, rate_limit) => ({ name, base_url: upstream.base, models, rate_limit });

/// Runs `inside` with a gateway and an open page of it. Whatever the page complains of or asks elsewhere fails the test, unless
/// `inside` is about that.
async function open(config, inside, { provokes = false, ...options } = {}) {
  const served = await gateway(config);
  const context = await browser.newContext(options);
  const page = await context.newPage();
  const complaints = [], asked = [];
  page.on('pageerror', error => complaints.push(error.message));
  page.on('console', message => { if (message.type() === 'error' && !/401|ERR_CONNECTION|Failed to load resource/.test(message.text())) complaints.push(message.text()); });
  page.on('request', request => asked.push(request.url()));
  try {
    await page.goto(served.page);
    await inside(page, served, context);
    if (provokes) return;
    assert.deepEqual(complaints, []);
    const elsewhere = asked.filter(url => !url.startsWith(served.url) && !url.startsWith('data:'));
    assert.deepEqual(elsewhere, [], 'the page asks nobody else');
  } finally {
    await context.close();
    await served.stop();
  }
}

const text = (page, selector) => page.locator(selector).innerText();
const figure = (page, name) => page.locator('.provider').first().locator('dl > div', { has: page.locator(`dt:text-is("${name}")`) }).locator('dd span');

test('lines, figures and requests are shown, and move without a reload', async () => {
  const providers = [one('nim', ['z-ai/glm-5.1'], { mode: 'spaced', interval_seconds: 3600 }), one('other', ['m'], UNSHAPED)];
  await open({ providers, server: { clients: [{ name: 'chat', token: 'of-chat' }] } }, async (page, served) => {
    await page.locator('.provider').nth(1).waitFor();
    assert.deepEqual(await page.locator('#live h2').allInnerTexts(), ['nim', 'other', 'Latest requests']);
    assert.equal(await figure(page, 'Queued').innerText(), '0');
    assert.equal(await text(page, '#norows'), 'None yet.');

    assert.equal(await ask(served.url, 'z-ai/glm-5.1', 'of-chat').status, 200);
    const row = page.locator('#rows tr');
    await row.first().waitFor();
    const cells = await row.first().locator('td').allInnerTexts();
    assert.deepEqual(cells.slice(1, 5), ['chat', 'z-ai/glm-5.1', 'nim', '200']);
    assert.equal(cells.at(-1), '31 + 7');

    const waiting = [ask(served.url, 'z-ai/glm-5.1', 'of-chat'), ask(served.url, 'z-ai/glm-5.1')];
    const line = page.locator('.provider').first().locator('table').first().locator('tbody tr');
    await line.nth(1).waitFor();
    assert.deepEqual((await line.first().locator('td').allInnerTexts()).slice(0, 3), ['1', 'chat', 'z-ai/glm-5.1']);
    assert.match((await line.first().locator('td').allInnerTexts())[4], /^60 min$/);
    assert.equal(await figure(page, 'Queued').innerText(), '2');
    assert.equal(await text(page, '.provider:first-child .pill'), 'waits for its slot');
    await page.waitForFunction(() => document.title === '(2) limitrate');
    assert.match(await page.locator('canvas').first().getAttribute('aria-label'), /^1 latest sends and 2 planned/);

    waiting[1].hangUp();
    await page.waitForFunction(() => document.title === '(1) limitrate');
    await page.locator('#rows td', { hasText: '499' }).waitFor();
    waiting[0].hangUp();
    await page.waitForFunction(() => document.title === 'limitrate');
    assert.match(await text(page, '#errors'), /caller_gone: 2/);
  });
});

test('sends are drawn where they went, on a strip that moves', async () => {
  await open({ providers: [one('p', ['m'], { mode: 'spaced', interval_seconds: 0.4 })] }, async (page, served) => {
    await page.locator('canvas').waitFor();
    assert.equal(await ask(served.url, 'm').status, 200);
    /* The columns of the strip that hold the colour of a send, along the line. */
    const dots = () => page.evaluate(() => {
      const canvas = document.querySelector('canvas'), pen = canvas.getContext('2d');
      const row = pen.getImageData(0, Math.round(24 * canvas.height / canvas.clientHeight) - 2, canvas.width, 1).data;
      const found = [];
      for (let x = 0; x < canvas.width; x++) if (row[4 * x + 2] > 200 && row[4 * x] < 120 && row[4 * x + 3] > 200) found.push(x);
      return { found, width: canvas.width };
    });
    await page.waitForFunction(() => document.querySelector('canvas').getAttribute('aria-label').startsWith('1 latest'));
    const somewhere = async () => { for (;;) { const seen = await dots(); if (seen.found.length) return seen; await page.waitForTimeout(20); } };
    const first = await somewhere();
    assert.ok(first.found.length < 20 && Math.max(...first.found) <= 0.69 * first.width, `one dot left of now: ${JSON.stringify(first)}`);
    // It moves to the left, if it moves at all: the test's timeout says that it does not.
    for (let later = first; Math.min(...later.found) >= Math.min(...first.found); later = await somewhere()) await page.waitForTimeout(50);
  });
});

test('hostile names are text', async () => {
  const providers = [one('"><b id=harm>', [HOSTILE, 'm'], { mode: 'spaced', interval_seconds: 3600 })];
  await open({ providers, server: { clients: [{ name: '<i id=harm>', token: 't' }] } }, async (page, served) => {
    assert.equal(await ask(served.url, 'm', 't').status, 200);
    const waits = ask(served.url, HOSTILE, 't');
    assert.equal(await ask(served.url, DECEIVING).status, 404);
    await page.locator('#rows td', { hasText: 'safe' }).waitFor();
    await page.locator('.provider table td', { hasText: '<img' }).first().waitFor();
    const shown = await text(page, 'main');
    for (const part of [HOSTILE, '<i id=harm>', '"><b id=harm>']) assert.ok(shown.includes(part), `${part} in ${shown}`);
    assert.ok(!shown.includes('\u202e') && shown.includes('safe\ufffdgnp.exe'), 'nothing turns the writing round');
    assert.equal(await page.locator('img, #harm, main script').count(), 0);
    assert.equal(await page.evaluate(() => window.harmed), undefined);
    waits.hangUp();
  });
});

test('the policy lets nothing else run', async () => {
  await open({ providers: [one('p', ['m'], UNSHAPED)] }, async page => {
    await page.locator('.provider').waitFor();
    const tried = await page.evaluate(async () => {
      const refused = what => { try { what(); return false; } catch (problem) { return problem instanceof TypeError; } };
      return {
        markup: refused(() => { document.body.innerHTML = '<p>'; }),
        script: refused(() => { document.createElement('script').text = 'window.harmed = 1'; }),
        elsewhere: await fetch('http://127.0.0.1:9/').then(() => false, () => true),
      };
    });
    assert.deepEqual(tried, { markup: true, script: true, elsewhere: true });
  }, { provokes: true });
});

test('a token is asked for once and kept for the tab', async () => {
  await open({ server: { auth_token: 'the-token' }, providers: [one('p', ['m'], UNSHAPED)] }, async (page, served, context) => {
    await page.locator('#gate').waitFor();
    assert.equal(await page.locator('.provider').count(), 0);
    for (const wrong of ['no\u2026header', 'a-wrong-one']) {
      await page.fill('#token', wrong);
      await page.click('#gate button');
      await page.getByText('That token was not accepted.').waitFor();
      await page.reload();
      await page.locator('#gate').waitFor();
    }
    await page.fill('#token', 'a-wrong-one');
    await page.click('#gate button');
    await page.getByText('That token was not accepted.').waitFor();
    await page.fill('#token', 'the-token');
    await page.keyboard.press('Enter');
    await page.locator('.provider').waitFor();
    assert.ok(await page.locator('#gate').isHidden());
    await page.reload();
    await page.locator('.provider').waitFor();
    const kept = await page.evaluate(() => [Object.values(sessionStorage), Object.values(localStorage), document.cookie, location.href]);
    assert.deepEqual(kept.slice(0, 3), [['the-token'], [], '']);
    assert.ok(!kept[3].includes('the-token'));
    const other = await context.newPage();
    await other.goto(served.page);
    await other.locator('#gate').waitFor();
    await page.click('#forget');
    await page.locator('#gate').waitFor();
  });
});

test('it comes back by itself when the gateway does', async () => {
  const config = { providers: [one('p', ['m'], UNSHAPED)] };
  const first = await gateway(config);
  const page = await browser.newPage();
  let second;
  try {
    await page.goto(first.page);
    await page.getByText('live', { exact: true }).waitFor();
    await first.stop();
    await page.getByText(/^no answer, trying again/).waitFor();
    assert.equal(await page.locator('.provider').count(), 1, 'what was seen stays');
    second = await gateway(config, first.port);
    await page.getByText('live', { exact: true }).waitFor({ timeout: 20000 });
  } finally {
    await page.close();
    await second?.stop();
  }
});

test('it fits a phone and follows the system\'s colours', async () => {
  const names = ['a-provider-with-quite-a-long-name-indeed', 'b'];
  const providers = names.map(name => one(name, [`${name}-model-that-is-long/very-long-and-longer-still-1`], { mode: 'spaced', interval_seconds: 3600 }));
  const grounds = [];
  for (const colorScheme of ['dark', 'light']) {
    await open({ providers }, async (page, served) => {
      await ask(served.url, `${names[0]}-model-that-is-long/very-long-and-longer-still-1`).status;
      const waits = ask(served.url, `${names[0]}-model-that-is-long/very-long-and-longer-still-1`);
      await page.locator('.provider tbody tr').first().waitFor();
      await page.locator('#rows tr').first().waitFor();
      const [wide, room] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
      assert.ok(wide <= room, `${wide} px on a screen of ${room}`);
      grounds.push(await page.evaluate(() => getComputedStyle(document.body).backgroundColor));
      waits.hangUp();
    }, { colorScheme, viewport: { width: 360, height: 740 }, isMobile: true, deviceScaleFactor: 2 });
  }
  assert.notEqual(grounds[0], grounds[1]);
});
