// Makes the pictures of README.md: the playground with an answer of the real model, and the live page beside load.

import { fileURLToPath } from "node:url";

import { DONE, ask, isIdle } from "./asking.mjs";
import { Line, launch, open } from "./line.mjs";

const FOLDER = fileURLToPath(new URL("../../docs/pictures/", import.meta.url));
const SIZE = { width: 1200, height: 820 };
const LOAD_MS = 30_000;

const line = await Line.start(["--executors", "2"]);
const browser = await launch();

async function post(path, body) {
  const headers = { "content-type": "application/json" };
  const answer = await fetch(`${line.base}${path}`, { method: "POST", headers, body: JSON.stringify(body) });
  await answer.text();
}

try {
  const hello = { messages: [{ role: "user", content: "Hello" }], max_tokens: 8 };
  await Promise.all([1, 2].map(() => post("/v1/chat/completions", hello))); // what a process does once is not to be shown
  const page = await open(browser, `${line.base}/`, SIZE);
  await page.fill("#temperature", "0");
  await page.check("#logprobs");
  await ask(page, "What is the capital of France, and what is it known for?", 120);
  await page.waitForSelector(DONE);
  await isIdle(page);
  await page.click("text=Colour tokens");
  await page.click("details.latency summary");
  await page.evaluate(() => (document.getElementById("settings-panel").scrollTop = 0));
  await page.screenshot({ path: `${FOLDER}playground.png` });

  await page.goto(`${line.base}/live`);
  await page.waitForFunction(() => document.querySelectorAll("#executors [data-phase=ready]").length === 2);
  const end = Date.now() + LOAD_MS;
  const clients = Array.from({ length: 12 }, async (_, number) => {
    const story = { prompt: "Once upon a time", max_tokens: 20 + 5 * number, ignore_eos: true };
    while (Date.now() < end) await post("/v1/completions", story);
  });
  await page.waitForTimeout(LOAD_MS); // for some curves
  await page.screenshot({ path: `${FOLDER}live.png` });
  await Promise.all(clients);
} finally {
  await browser.close();
  await line.stop();
}
