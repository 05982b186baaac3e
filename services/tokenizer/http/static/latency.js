// Where the time of an answer went: the parts of the server's breakdown, which add up, and the way to this browser.

import { h } from "./dom.js";
import { duration } from "./numbers.js";

// In the order in which a request meets them.
const PARTS = {
  session: "Loading the conversation",
  tokenize: "Tokenizing the prompt",
  admission: "Waiting for an executor",
  queue: "Waiting for the first step",
  prefill: "Computing the prompt",
  decode: "Writing the answer",
  failover: "Moving to another server",
  detokenize: "Turning tokens into text",
  network: "Network between the services",
  browser: "Network to this browser",
};

/**
 * @param latency Of the answer, in milliseconds.
 * @param seen What this browser measured for all of it; null where it did not see all of it.
 */
export function latencyView(latency, seen) {
  const parts = Object.keys(PARTS).map((name) => [name, latency[`${name}_ms`] ?? 0]);
  if (seen !== null) parts.at(-1)[1] = Math.max(0, seen - latency.total_ms);
  const shown = parts.filter(([, ms]) => ms > 0);
  const total = shown.reduce((sum, [, ms]) => sum + ms, 0);
  const bar = h("div", { class: "parts", "aria-hidden": "true" });
  for (const [name, ms] of shown) {
    const part = h("span", { class: `part ${name}`, title: `${PARTS[name]}: ${duration(ms)}` });
    part.style.flexGrow = String(ms);
    bar.append(part);
  }
  const rows = shown.map(([name, ms]) =>
    h("tr", {},
      h("th", { scope: "row" }, h("span", { class: `swatch ${name}`, "aria-hidden": "true" }), `${PARTS[name]} (${name})`),
      h("td", {}, duration(ms)),
      h("td", {}, `${((100 * ms) / total).toFixed(1)} %`)));
  return h("details", { class: "latency" },
    h("summary", {}, `Took ${duration(total)}`, bar),
    h("table", {},
      h("caption", { class: "unseen" }, "Where the time went"),
      h("tbody", {}, ...rows)));
}
