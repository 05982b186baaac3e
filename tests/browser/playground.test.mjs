// The playground in a real browser, in front of real services whose engine draws random tokens.

import assert from "node:assert/strict";
import { test } from "node:test";

import { BUSY, DONE, ask, isIdle, lastAnswer, setField, written } from "./asking.mjs";
import { fakeLine, hasNoSidewaysScrolling, violations } from "./line.mjs";

const stage = fakeLine("--executors", "2");

const playground = (options) => stage.open("/", options);

test("an answer comes with its time as parts, its facts, and coloured tokens", async () => {
  const page = await playground();
  await page.check("#logprobs");
  await ask(page, "Name three primes.");
  await page.waitForSelector(DONE);
  const facts = await page.locator(`${DONE} .facts`).textContent();
  for (const word of ["Prompt", "cached", "Answer24 tokens", "Executor", "Seed"]) assert.ok(facts.includes(word), `${word} in ${facts}`);
  await page.click("details.latency summary");
  const parts = await page.locator("details.latency table").textContent();
  for (const word of ["(queue)", "(prefill)", "(decode)", "(network)"]) assert.ok(parts.includes(word), parts);
  const plain = await lastAnswer(page);
  await page.click("text=Colour tokens");
  assert.equal(await page.locator(".tokens .token").count(), 24);
  await page.focus(".tokens");
  await page.keyboard.press("End");
  assert.match(await page.locator("output").textContent(), /%/);
  assert.deepEqual(await violations(page), []);
  await page.click("text=Repeat with this seed");
  await page.waitForFunction(() => document.querySelector("#status").textContent === "The answer is complete.");
  assert.equal(await lastAnswer(page), plain, "the same seed gives the same text");
  await stage.close(page);
});

test("a conversation is listed, gone on with, forked at a turn, and deleted", async () => {
  const page = await playground();
  await ask(page, "Turn the first");
  await page.waitForSelector(DONE);
  await isIdle(page);
  await ask(page, "Turn the second");
  await page.waitForFunction((done) => document.querySelectorAll(done).length === 2, DONE);
  await isIdle(page);
  const name = new URLSearchParams(new URL(page.url()).hash.slice(1)).get("session");
  assert.match(name, /^turn-the-first-[0-9a-f]{6}$/);
  await page.reload();
  await page.waitForFunction(() => document.querySelectorAll("article").length === 4);
  await page.locator(".fork").first().click();
  await page.waitForFunction(() => document.querySelectorAll("article").length === 2);
  await page.waitForFunction((old) => !location.hash.includes(old), name);
  const copy = new URLSearchParams(new URL(page.url()).hash.slice(1)).get("session");
  assert.match(await page.locator("#sessions").textContent(), new RegExp(`${name}.*2 turns`));
  await ask(page, "Another second");
  await page.waitForFunction(() => document.querySelectorAll("article").length === 4);
  await isIdle(page);
  for (const id of [name, copy]) {
    await page.click(`[aria-label="Delete ${id}"]`);
    await page.waitForFunction((gone) => !document.getElementById("sessions").textContent.includes(gone), id);
  }
  assert.equal(await page.locator("article").count(), 0, "the one that was shown is gone");
  await stage.close(page);
});

test("the list of conversations stays while the session store is away for a moment", async () => {
  const page = await playground();
  await ask(page, "Kept", 4);
  await page.waitForSelector("#sessions .delete");
  await isIdle(page);
  const away = { status: 503, headers: { "retry-after": "1" }, json: { error: { message: "the session store does not answer" } } };
  await page.route("**/v1/sessions?*", (route) => route.fulfill(away), { times: 1 });
  await ask(page, "Also kept", 4);
  await page.waitForFunction(() => /not up to date.*does not answer/.test(document.getElementById("sessions-note").textContent));
  assert.ok((await page.locator("#sessions .delete").count()) > 0);
  await isIdle(page);
  await ask(page, "And this", 4);
  await page.waitForFunction(() => document.getElementById("sessions-note").textContent === "");
  await stage.close(page);
});

test("stop ends the answer at the server, and the conversation goes on without it", async () => {
  const page = await playground();
  await ask(page, "Write for ever", 4000);
  await written(page, 20);
  await page.keyboard.press("Escape");
  await page.waitForSelector(DONE);
  assert.match(await page.locator("#status").textContent(), /^Stopped/);
  await isIdle(page);
  await ask(page, "Go on");
  await page.waitForFunction((done) => document.querySelectorAll(done).length === 2, DONE);
  assert.equal(await page.locator(".problem").count(), 1);
  await stage.close(page);
});

test("a reload in mid-answer goes on with the same answer", async () => {
  const page = await playground();
  await setField(page, "#seed", "7");
  await ask(page, "A long one", 1000);
  await written(page, 50);
  const before = await page.locator(`${BUSY} > .text`).textContent();
  await page.reload();
  await page.waitForSelector(DONE);
  await isIdle(page);
  const after = await lastAnswer(page);
  assert.ok(after.startsWith(before), "nothing is lost or written anew");
  assert.match(await page.locator(`${DONE} .facts`).textContent(), /Answer1,000 tokens/);
  assert.equal(await page.locator("article.said").count(), 1);
  await stage.close(page);
});

test("an answer goes on when the tokenizer is killed that writes it", async () => {
  const kill = await stage.line.killerOf("tokenizer"); // first: asking takes longer than an answer on a busy machine
  const page = await playground();
  await ask(page, "A long one", 4000);
  await written(page, 50);
  const before = await page.locator(`${BUSY} > .text`).textContent();
  kill();
  await page.waitForFunction(() => /trying again/.test(document.querySelector("#status").textContent));
  await page.waitForSelector(DONE);
  await isIdle(page);
  assert.equal(await page.locator("#status").textContent(), "The answer is complete.");
  assert.ok((await lastAnswer(page)).startsWith(before), "nothing is lost or written anew");
  assert.match(await page.locator(`${DONE} .facts`).textContent(), /Answer4,000 tokens/);
  await stage.close(page);
});

test("a wrong key is told of, and asked for again", async () => {
  const page = await playground({ key: "slm-wrong" });
  await page.waitForSelector("#key-dialog[open]");
  assert.match(await page.locator("#key-note").textContent(), /not known/);
  assert.deepEqual(await violations(page), []);
  await page.fill("#key", stage.line.userKey);
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelector("#model").textContent !== "");
  assert.equal(await page.evaluate(() => localStorage.length), 0);
  await ask(page, "Hello", 4);
  await page.waitForSelector(DONE);
  await stage.close(page);
});

test("a field that the server refuses is pointed at", async () => {
  const page = await playground();
  await setField(page, "#top_p", "7");
  await ask(page, "Hello");
  await page.waitForSelector("#top_p[aria-invalid=true]:focus");
  assert.match(await page.locator("#status").textContent(), /top_p/);
  await setField(page, "#top_p", "");
  await setField(page, "#schema", "{");
  await page.fill("#prompt", "Hello");
  await page.press("#prompt", "Enter");
  await page.waitForSelector("#schema[aria-invalid=true]:focus");
  assert.equal(await page.inputValue("#prompt"), "Hello", "it was not sent");
  await stage.close(page);
});

test("an answer keeps to a JSON Schema, and a completion goes on with a text", async () => {
  const page = await playground();
  await setField(page, "#schema", '{"enum": ["red", "green"]}'); // random tokens could write spaces for ever between others
  await ask(page, "A colour", 40);
  await page.waitForSelector(DONE);
  assert.ok(["red", "green"].includes(JSON.parse(await lastAnswer(page))));
  await page.check("input[name=mode][value=completion]");
  await page.check("#logprobs");
  await ask(page, "Once upon a time", 8);
  await page.waitForSelector(DONE);
  await page.click("text=Colour tokens");
  assert.equal(await page.locator(".tokens .token").count(), 8);
  await stage.close(page);
});

const HOSTILE = [
  '<img src=x onerror="document.title=\'owned\'"><script>document.title="owned"</script><style>*{display:none}</style>',
  "</div></article><!-- &lt;b&gt; javascript:alert(1) [a](javascript:alert(1))",
  "\u202egnirts desrever\u202c \u2066isolate \u0000\u0007\u001b[31m\u009b31m\u007f \u200b\ufeff",
].join("\n");

test("what a model writes is shown as text, however hostile", async () => {
  const page = await playground();
  const chunk = (delta) => `data: ${JSON.stringify({ choices: [{ index: 0, delta }] })}\n\n`;
  const long = "x".repeat(2 ** 20);
  await page.route("**/v1/chat/completions", (route) =>
    route.fulfill({
      contentType: "text/event-stream",
      body: `${chunk({ content: HOSTILE })}${chunk({ reasoning_content: HOSTILE })}${chunk({ content: long })}data: [DONE]\n\n`,
    }));
  await ask(page, HOSTILE);
  await page.waitForSelector(DONE);
  const shown = await lastAnswer(page);
  assert.ok(shown.includes("<img src=x") && shown.includes("</div></article><!-- &lt;b&gt;"), "it stands there as it was written");
  assert.ok(shown.includes("‹U+202E›gnirts") && shown.includes("␀␇␛[31m") && shown.includes("‹U+200B›‹U+FEFF›"));
  assert.equal(shown.match(/x{1000,}/g).join("").length, 2 ** 20, "all of it");
  assert.equal(await page.title(), "ScaleLLM playground");
  assert.equal(await page.locator("#log img, #log script, #log style, #log a").count(), 0);
  assert.ok(await hasNoSidewaysScrolling(page), "a line without a space is broken");
  await stage.close(page);
});

for (const colorScheme of ["light", "dark"]) {
  for (const [width, height] of [[360, 780], [1600, 900]]) {
    test(`${colorScheme}, ${width} pixels: everything can be reached by the keyboard, and nothing is wrong with it`, async () => {
      const page = await playground({ colorScheme, width, height });
      await setField(page, "#max_tokens", "8");
      await page.focus("#prompt");
      await page.keyboard.type("Typed by hand");
      await page.keyboard.press("Enter");
      await page.waitForSelector(DONE);
      await isIdle(page);
      assert.ok(await hasNoSidewaysScrolling(page));
      assert.deepEqual(await violations(page), []);
      // From the field for the prompt on, Tab comes to every button and field of the page, and shows where it is.
      const wanted = new Set(["new-chat", "log", "system", "seed", "schema", "logprobs", "key-button", "send", "prompt"]);
      await page.evaluate(() => document.querySelectorAll("details").forEach((details) => (details.open = true)));
      for (let presses = 0; presses < 120 && wanted.size; presses++) {
        await page.keyboard.press("Tab");
        const { id, isShown } = await page.evaluate(() => {
          const focused = document.activeElement;
          return { id: focused.id, isShown: focused === document.body || getComputedStyle(focused).outlineStyle !== "none" };
        });
        assert.ok(isShown, `#${id} shows that it has the focus`);
        wanted.delete(id);
      }
      assert.deepEqual([...wanted], []);
      await stage.close(page);
    });
  }
}
