// Both pages where two models are served. The live page also shows a second tokenizer service.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { homedir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";

import { DONE, ask, isIdle } from "./asking.mjs";
import { PYTHON, fakeLine, violations } from "./line.mjs";

const MODEL = "smollm2-135m-instruct", OTHER = "other";
const stage = fakeLine("--model", MODEL, "--model", `${OTHER}=${MODEL}`);
const chosen = (page) => page.inputValue("#model");

test("a question goes to the chosen model, and a conversation stays with its own", async () => {
  const page = await stage.open("/");
  await page.waitForFunction(() => document.getElementById("model").options.length === 2);
  assert.equal(await chosen(page), MODEL, "the default");
  await page.selectOption("#model", OTHER);
  const asked = page.waitForRequest("**/v1/chat/completions");
  await ask(page, "To the other one", 4);
  assert.equal((await asked).postDataJSON().model, OTHER);
  await page.waitForSelector(DONE);
  await isIdle(page);
  await page.reload();
  await page.waitForFunction(() => document.querySelectorAll("article").length === 2);
  assert.equal(await chosen(page), OTHER, "the conversation's");
  await ask(page, "Once more", 4);
  await page.waitForFunction((done) => document.querySelectorAll(done).length === 2, "article.answer");
  await isIdle(page);
  await page.selectOption("#model", MODEL);
  assert.match(await page.locator("#status").textContent(), /^This is a new conversation/);
  assert.equal(await page.locator("article").count(), 0);
  await ask(page, "To the first one", 4);
  await page.waitForSelector(DONE);
  assert.equal(await page.locator(".problem").count(), 0);
  await stage.close(page);
});

/** Start another tokenizer service. */
async function startTokenizer() {
  const { services } = await stage.line.status();
  const scheduler = services.find((one) => one.name === "scheduler").address;
  const home = process.env.SCALELLM_HOME || join(homedir(), ".cache/scalellm");
  const token = join(home, "run", stage.line.instance, "link.token");
  const models = `${MODEL},${OTHER}=${MODEL}`;
  const options = ["--scheduler", scheduler, "--link-token-file", token, "--model", models, "--workers", "1"];
  return spawn(PYTHON, ["-m", "scalellm.services.tokenizer", ...options, "--port", "0", "--http-port", "0"], { stdio: "ignore" });
}

test("the live page shows all models, or one, and every tokenizer service", async (t) => {
  const second = await startTokenizer();
  t.after(() => second.kill());
  const page = await stage.open("/live");
  const shown = (count) => page.waitForFunction((wanted) => document.querySelectorAll("#executors .box").length === wanted, count);
  await shown(2);
  const models = await page.locator("#executors .box").allTextContents();
  assert.deepEqual(models.map((text) => [MODEL, OTHER].find((model) => text.includes(`Model${model}`))).sort(), [OTHER, MODEL].sort());
  await page.waitForFunction(() => /linked.*1 worker/.test([...document.querySelectorAll("#tokenizers .box")].map((box) => box.textContent)[1]));
  assert.match(await page.locator("#tokenizers .box").first().textContent(), /this one/);
  assert.deepEqual(await violations(page), []);

  await page.selectOption("#model", OTHER);
  await shown(1);
  assert.equal(new URL(page.url()).hash, `#model=${OTHER}`);
  const running = (count) => page.waitForFunction(
    (wanted) => [...document.querySelectorAll("#tiles > div")].some((tile) => tile.textContent.startsWith(`Running${wanted}`)), count);
  const answer = stage.line.complete(3000, { model: OTHER });
  await running(1);
  await page.waitForFunction(() => /TTFT\)\d/.test(document.getElementById("times").textContent));
  await answer;
  await page.selectOption("#model", MODEL);
  await running(0);
  assert.doesNotMatch(await page.locator("#times").textContent(), /TTFT\)\d/, "nothing was asked of this model here");
  await page.reload();
  await shown(1);
  assert.equal(await chosen(page), MODEL, "the address says it");
  await stage.close(page);
});
