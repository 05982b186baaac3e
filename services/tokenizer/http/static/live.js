// The live page: what the services do, once a second. What it keeps is bounded, so that it can stay open.

import { apiKey, events, request, sleep } from "./api.js";
import { byId, h, say } from "./dom.js";
import { Fleet } from "./fleet.js";
import { keyDialog } from "./key.js";
import { Line } from "./line.js";
import { ModelChoice } from "./model.js";
import { count, duration } from "./numbers.js";
import { Curve } from "./curve.js";
import { visible } from "./text.js";

const MOST_EVENTS = 100;
const TIMES = {
  queue_ms: "Waiting for an executor and its first step",
  ttft_ms: "To the first token (TTFT)",
  itl_ms: "Between tokens (ITL)",
  e2e_ms: "To the end of the answer",
};

let fleet = new Fleet();
const line = new Line();
const tiles = new Map();
const choice = new ModelChoice(() => {
  tiles.clear(); // their curves are of other models
  byId("tiles").replaceChildren();
  if (latest !== null) draw(latest);
});
let latest = null;
let connection = new AbortController();
const key = keyDialog(() => connect());

async function connect() {
  connection.abort();
  const mine = (connection = new AbortController());
  for (let failures = 0; !mine.signal.aborted; failures++) {
    try {
      const response = await request("v1/fleet?stream=true", { signal: mine.signal });
      for await (const { data } of events(response)) {
        failures = 0;
        show(JSON.parse(data));
      }
      throw new TypeError("the server ended the stream");
    } catch (error) {
      if (mine.signal.aborted) return;
      if (error.isAboutKey) {
        say(byId("status"), apiKey.get() ? error.message : "With API keys this page is for admins.");
        key.ask(error);
        return;
      }
      say(byId("status"), `No news: ${error.message}; trying again…`);
      document.body.classList.add("stale");
      await sleep(error.retryAfterMs ?? Math.min(5000, 500 * 2 ** failures), mine.signal).catch(() => {});
    }
  }
}

function show(snapshot) {
  const { executors, happened } = fleet.take(snapshot);
  document.body.classList.remove("stale");
  say(byId("status"), `As of ${new Date(1000 * snapshot.at).toLocaleTimeString()}`);
  choice.offer(snapshot.tokenizer.models);
  draw((latest = { snapshot, executors }));
  for (const text of happened) {
    const at = new Date(1000 * snapshot.at).toLocaleTimeString();
    byId("events").prepend(h("li", {}, h("time", {}, at), ` ${visible(text)}`));
  }
  while (byId("events").childElementCount > MOST_EVENTS) byId("events").lastElementChild.remove();
}

/** Show what belongs to the chosen model. */
function draw({ snapshot: { tokenizer, schedulers }, executors }) {
  const { model } = choice;
  // An executor that was never connected may be of any model.
  const shown = executors.filter((executor) => model === null || !executor.model || executor.model === model);
  const figures = model === null ? tokenizer.figures : tokenizer.model_figures[model];
  showTiles(model, schedulers, shown, figures, tokenizer.figures);
  say(byId("tiles-note"), tokenizer.figures ? "" : "This tokenizer counts nothing: it was started without --metrics-port.");
  byId("times").replaceChildren(...Object.entries(TIMES).map(([name, words]) => {
    const value = figures?.[name];
    return h("tr", {}, h("th", { scope: "row" }, words), ...["p50", "p90", "p99"].map((rank) => h("td", {}, duration(value?.[rank]))));
  }));
  line.show(tokenizer, schedulers, shown, { tellsModels: model === null && tokenizer.models.length > 1 });
}

function showTiles(model, schedulers, executors, figures, allFigures) {
  const heard = schedulers.filter((scheduler) => !scheduler.error).flatMap((scheduler) =>
    model === null ? [scheduler] : scheduler.models.filter((one) => one.model === model));
  const sum = (values) => (values.length ? values.reduce((total, value) => total + value, 0) : null);
  const rates = executors.map((executor) => executor.rate).filter((rate) => rate !== null);
  tile("Running", sum(heard.map(({ running }) => running)), "requests");
  tile("Queued", sum(heard.map(({ queued }) => queued)), "requests");
  tile("Tokens out", sum(rates), "per second");
  tile("Tokens in", figures?.prompt_tokens_per_s ?? null, "per second, of what finished here");
  tile("Requests", figures?.finished_per_s ?? null, "finished per second here", 1);
  tile("Refused or failed", allFigures?.rejected_per_s ?? null, model === null ? "per second here" : "per second here, all models", 1);
}

function tile(name, value, unit, digits = 0) {
  if (!tiles.has(name)) {
    const shown = h("dd", {}), curve = new Curve(name);
    tiles.set(name, { shown, curve });
    byId("tiles").append(h("div", {}, h("dt", {}, name), shown, h("dd", { class: "note" }, unit), h("dd", { class: "curve" }, curve.element)));
  }
  const { shown, curve } = tiles.get(name);
  say(shown, count(value, digits));
  curve.add(value);
}

// A tab that nobody sees asks for nothing.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) connection.abort();
  else {
    fleet = new Fleet(); // what happened meanwhile was not seen
    connect();
  }
});
connect();
