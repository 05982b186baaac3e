// Makes the pictures of README.md: the playground with an answer of the real model, and the live page beside load.

import { fileURLToPath } from "node:url";

import { Line, launch, open } from "./line.mjs";

const FOLDER = fileURLToPath(new URL("../../docs/pictures/", import.meta.url));
const SIZE = { width: 1200, height: 760 };

const line = await Line.start(["--executors", "2"]);
const browser = await launch();
try {
  const page = await open(browser, `${line.base}/`, SIZE);
  await page.fill("#max_tokens", "120");
  await page.fill("#seed", "7");
  await page.check("#logprobs");
  await page.fill("#prompt", "Why is the sky blue? Answer in two sentences.");
  await page.press("#prompt", "Enter");
  await page.waitForSelector("article.answer[aria-busy=false]");
  await page.waitForSelector("#send:not([disabled])");
  await page.click("text=Colour tokens");
  await page.click("details.latency summary");
  await page.screenshot({ path: `${FOLDER}playground.png` });

  await page.goto(`${line.base}/live`);
  await page.waitForFunction(() => document.querySelectorAll("#executors [data-phase=ready]").length === 2);
  const body = JSON.stringify({ prompt: "Once upon a time", max_tokens: 400, ignore_eos: true });
  const answers = Array.from({ length: 12 }, () =>
    fetch(`${line.base}/v1/completions`, { method: "POST", headers: { "content-type": "application/json" }, body }));
  await page.waitForFunction(() => /TTFT\)\d/.test(document.getElementById("times").textContent));
  await page.waitForTimeout(15_000); // for some curves
  await page.screenshot({ path: `${FOLDER}live.png` });
  await Promise.allSettled(answers);
} finally {
  await browser.close();
  await line.stop();
}
