// Pages that stay open: both keep their memory for BROWSER_SOAK_SECONDS, ten minutes unless said otherwise.

import assert from "node:assert/strict";
import { test } from "node:test";

import { DONE, isIdle, setField } from "./asking.mjs";
import { PATIENCE, fakeLine, held } from "./line.mjs";

const SECONDS = Number(process.env.BROWSER_SOAK_SECONDS || 600);
const ANSWERS_PER_CONVERSATION = 5;
// Bounded lists may still grow after the first quarter, such as that of fifty conversations.
const MORE_BYTES = 1.5e6, MORE_NODES = 600;
const stage = fakeLine("--executors", "2");

/** Call `step` again and again, and measure the page after each quarter of the time. */
async function quarters(t, page, step) {
  const begin = performance.now(), measured = [];
  for (let steps = 0; measured.length < 4; ) {
    await step();
    steps += 1;
    if (performance.now() - begin < (1 + measured.length) * 250 * SECONDS) continue;
    const now = await held(page);
    measured.push(now);
    t.diagnostic(`${page.url()}: quarter ${measured.length}, ${steps} steps: ${now.usedSize} bytes, ${now.nodes} nodes`);
  }
  const [first, last] = [measured.at(0), measured.at(-1)];
  assert.ok(last.usedSize < first.usedSize + MORE_BYTES, `${first.usedSize} bytes became ${last.usedSize}`);
  assert.ok(last.nodes < first.nodes + MORE_NODES, `${first.nodes} nodes became ${last.nodes}`);
}

/** Ask without editing the field: the browser would keep each edit for undo, as nodes of the page. */
const ask = (page) => page.evaluate(() => {
  document.getElementById("prompt").value = "Tell me more.";
  document.getElementById("composer").requestSubmit();
});

test("pages that stay open keep their memory", { timeout: 1000 * SECONDS + 5 * PATIENCE }, async (t) => {
  const live = await stage.open("/live");
  const playground = await stage.open("/");
  await playground.check("#logprobs");
  await setField(playground, "#max_tokens", "100");
  await Promise.all([
    quarters(t, live, () => live.waitForTimeout(1000)),
    quarters(t, playground, async () => {
      for (let turn = 0; turn < ANSWERS_PER_CONVERSATION; turn++) {
        await ask(playground);
        await playground.waitForFunction(([done, wanted]) => document.querySelectorAll(done).length === wanted, [DONE, turn + 1]);
        await isIdle(playground);
      }
      await playground.click("#new-chat");
    }),
  ]);
  await stage.close(live);
  await stage.close(playground);
});
