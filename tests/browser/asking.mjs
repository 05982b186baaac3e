// Questions in the playground, as its users ask them.

export const DONE = "article.answer[aria-busy=false]";
export const BUSY = "article.answer[aria-busy=true]";

export async function ask(page, text, maxTokens = 24) {
  await setField(page, "#max_tokens", String(maxTokens));
  await page.fill("#prompt", text);
  await page.press("#prompt", "Enter");
}

/** Set a field of the settings, also where their panel is closed, as on a phone. */
export async function setField(page, selector, value) {
  await page.evaluate(() => (document.getElementById("settings-panel").open = true));
  await page.fill(selector, value);
}

/** Wait until the busy answer has some text. */
export async function written(page, atLeast = 1) {
  await page.waitForFunction(
    ([selector, length]) => (document.querySelector(`${selector} > .text`)?.textContent.length ?? 0) >= length,
    [BUSY, atLeast]);
}

export const lastAnswer = (page) => page.locator(`${DONE} > .text`).last().textContent();
export const isIdle = (page) => page.waitForSelector("#send:not([disabled])");
