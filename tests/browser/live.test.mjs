// The live page in a real browser, beside real services of which one is killed.

import assert from "node:assert/strict";
import { test } from "node:test";

import { PATIENCE, fakeLine, hasNoSidewaysScrolling, held, violations } from "./line.mjs";

const stage = fakeLine("--executors", "2");
const READY = "#executors .box[data-phase=ready]";

test("an executor that is killed is seen to, with its requests moving, and comes back", async () => {
  const kill = await stage.line.killerOf("executor-0"); // first: asking takes longer than an answer on a busy machine
  const page = await stage.open("/live");
  await page.waitForFunction((ready) => document.querySelectorAll(ready).length === 2, READY);
  const answers = Array.from({ length: 8 }, () => stage.line.complete(3000));
  await page.waitForFunction(() => /TTFT\)\d/.test(document.getElementById("times").textContent));
  await page.waitForFunction((ready) => [...document.querySelectorAll(ready)].every((box) => /Running[1-9]/.test(box.textContent)), READY);
  kill();
  await page.waitForFunction(() => /is lost.*[1-9]\d* requests? moved|was started again.*moved/.test(document.getElementById("events").textContent));
  assert.deepEqual(await Promise.all(answers), Array(8).fill(3000), "no answer is shorter for it");
  await page.waitForFunction((ready) => document.querySelectorAll(ready).length === 2, READY);
  await stage.close(page);
});

test("the page goes on when the server is started again", async () => {
  const kill = await stage.line.killerOf("tokenizer");
  const page = await stage.open("/live");
  await page.waitForSelector(READY);
  kill();
  await page.waitForSelector("body.stale");
  await page.waitForSelector("body:not(.stale)");
  await page.waitForSelector(READY);
  await stage.close(page);
});

test("a tenant's key does not open it", async () => {
  const page = await stage.open("/live", { key: stage.line.userKey });
  await page.waitForSelector("#key-dialog[open]");
  assert.match(await page.locator("#key-note").textContent(), /not open to the role user/);
  await page.fill("#key", stage.line.key);
  await page.keyboard.press("Enter");
  await page.waitForSelector(READY);
  await stage.close(page);
});

for (const colorScheme of ["light", "dark"]) {
  for (const [width, height] of [[360, 780], [1600, 900]]) {
    test(`${colorScheme}, ${width} pixels: nothing is wrong with it`, async () => {
      const page = await stage.open("/live", { colorScheme, width, height });
      await page.waitForFunction((ready) => document.querySelectorAll(ready).length === 2, READY);
      assert.deepEqual(await violations(page), []);
      assert.ok(await hasNoSidewaysScrolling(page));
      await stage.close(page);
    });
  }
}

test("a page that stays open keeps its memory", { timeout: 3 * PATIENCE }, async () => {
  const page = await stage.open("/live");
  await page.waitForSelector(READY);
  const told = await page.evaluate(async (key) => (await fetch("v1/fleet", { headers: { authorization: `Bearer ${key}` } })).json(), stage.line.key);
  // Streams of five minutes at once in place of the server's; the page asks for the next one when it has shown one. After
  // two of them its lists and curves are full. Phases and numbers change.
  const SECONDS = 300;
  let streams = 0, early, over;
  const late = new Promise((resolve) => (over = resolve));
  await page.route("**/v1/fleet?stream=true", async (route) => {
    if (streams === 2) early = await held(page);
    if (streams === 8) over(await held(page));
    const events = Array.from({ length: SECONDS }, (_, second) => {
      const snapshot = structuredClone(told);
      snapshot.at += SECONDS * streams + second;
      for (const [number, executor] of snapshot.schedulers[0].executors.entries()) {
        executor.phase = (second + number) % 7 ? "ready" : "connecting";
        executor.tokens = 100 * second;
        executor.running = second % 50;
      }
      return `data: ${JSON.stringify(snapshot)}\n\n`;
    });
    streams += 1;
    await route.fulfill({ contentType: "text/event-stream", body: events.join("") });
  });
  await page.reload();
  const { usedSize, nodes } = await late;
  assert.ok(nodes < early.nodes + 50, `${early.nodes} nodes became ${nodes}`);
  assert.ok(usedSize < early.usedSize + 1e6, `${early.usedSize} bytes became ${usedSize}`);
  await page.unrouteAll({ behavior: "ignoreErrors" });
  await stage.close(page);
});
