// The services as they stand, in the order in which a request meets them, with a line for each way that it can take.

import { byId, h, say, svg } from "./dom.js";
import { count, percent, some } from "./numbers.js";
import { visible } from "./text.js";

const MOST = 200;
const MOST_TOKENIZERS = 64;
const MOST_IN_COLUMN = 8;
const SIGNS = { ready: "●", draining: "◐", connecting: "○", incompatible: "✕", gone: "✕" };

export class Line {
  constructor() {
    this._boxes = new Map();
    this._ways = svg("svg", { class: "ways", "aria-hidden": "true" });
    byId("line").prepend(this._ways);
    this._drawn = "";
    this._shown = null;
    new ResizeObserver(() => this._draw()).observe(byId("line"));
  }

  /** @param tellsModels Tell the model of each executor: they are of several. */
  show(tokenizer, schedulers, executors, { tellsModels }) {
    const shown = executors.slice(0, MOST);
    const others = otherTokenizers(tokenizer, schedulers);
    const tokenizers = [tokenizer.service, ...others.keys()].slice(0, MOST_TOKENIZERS);
    this._list("tokenizers", tokenizers.map((service) => ({
      id: `tokenizer ${service}`,
      name: service || "of an older version",
      phase: "ready",
      word: service === tokenizer.service ? "this one" : "linked",
      facts: service === tokenizer.service
        ? [["", some(tokenizer.workers, "worker")], ["Running", count(tokenizer.figures?.running ?? null)], ["ScaleLLM", tokenizer.version]]
        : [["", some(others.get(service).workers, "worker")], ["Running", count(others.get(service).running)]],
    })));
    this._list("schedulers", schedulers.map((scheduler) => ({
      id: `scheduler ${scheduler.address}`,
      name: scheduler.address,
      phase: scheduler.error ? "connecting" : scheduler.draining ? "draining" : "ready",
      word: scheduler.error ? "not reached" : undefined,
      error: scheduler.error,
      facts: scheduler.error ? [] : [["Queued", count(scheduler.queued)], ["Running", count(scheduler.running)],
        ["Moved so far", count(scheduler.resubmitted)], ...(scheduler.redis_ok ? [] : [["Redis", "does not answer"]])],
    })));
    this._list("executors", shown.map((executor) => ({
      id: `executor ${executor.address}`,
      name: executor.address,
      phase: executor.phase,
      word: { connecting: "not connected", incompatible: "refused" }[executor.phase],
      error: executor.phase === "ready" || executor.phase === "gone" ? "" : executor.last_error,
      usage: executor.kv_usage,
      facts: executor.phase === "ready" || executor.phase === "draining"
        ? [...(tellsModels ? [["Model", visible(executor.model)]] : []), ["Running", count(executor.running)], ["Waiting", count(executor.waiting)], ["Tokens/s", count(executor.rate)],
          ...(executor.tensor_parallel > 1 ? [["Devices", count(executor.tensor_parallel)]] : [])]
        : [],
    })));
    const total = Math.max(executors.length, ...schedulers.map((scheduler) => scheduler.num_executors ?? 0));
    say(byId("line-note"), total > shown.length ? `${count(shown.length)} of ${count(total)} executors are shown.` : "");
    byId("executors").parentElement.classList.toggle("many", shown.length > MOST_IN_COLUMN);
    this._shown = { own: tokenizer.service, tokenizers, schedulers, executors: shown };
    this._draw();
  }

  /** Boxes stay in their places while they are there: only their texts change. */
  _list(id, boxes) {
    const list = byId(id), wanted = boxes.map((box) => this._box(box));
    if (wanted.length !== list.childElementCount || wanted.some((element, number) => list.children[number] !== element)) {
      list.replaceChildren(...wanted);
    }
    for (const [key, { element }] of this._boxes) {
      if (key.startsWith(id.slice(0, -1)) && !wanted.includes(element)) this._boxes.delete(key);
    }
  }

  _box({ id, name, phase, word, error, usage, facts }) {
    if (!this._boxes.has(id)) {
      const sign = h("span", { class: "sign", "aria-hidden": "true" }), state = h("span", { class: "state" });
      const list = h("dl", { class: "facts" }), why = h("p", { class: "why" });
      const meter = h("meter", { min: "0", max: "1", high: "0.9", "aria-label": `KV cache of ${name}` });
      const used = h("p", { class: "usage", hidden: true }, "KV cache ", meter, " ", h("span", {}));
      const element = h("li", { class: "box" }, h("div", { class: "title" }, sign, h("span", { class: "name" }, visible(name)), state), list, used, why);
      this._boxes.set(id, { element, sign, state, list, why, meter, used, values: new Map() });
    }
    const box = this._boxes.get(id);
    box.element.dataset.phase = phase;
    say(box.sign, SIGNS[phase] ?? "?");
    say(box.state, word ?? phase);
    say(box.why, visible(error ?? ""));
    box.used.hidden = usage === null || usage === undefined;
    if (!box.used.hidden) {
      box.meter.value = usage;
      say(box.used.lastElementChild, percent(usage));
    }
    const wanted = facts.map(([label]) => label).join("\n");
    if (box.wanted !== wanted) {
      box.wanted = wanted;
      box.values = new Map(facts.map(([label]) => [label, h("dd", {})]));
      box.list.replaceChildren(...facts.map(([label]) => h("div", {}, h("dt", { class: label ? "" : "unseen" }, label || "Processes"), box.values.get(label))));
    }
    for (const [label, value] of facts) say(box.values.get(label), value);
    return box.element;
  }

  _draw() {
    if (this._shown === null) return;
    const { own, tokenizers, schedulers, executors } = this._shown;
    const frame = byId("line").getBoundingClientRect();
    const at = (id) => this._boxes.get(id)?.element.getBoundingClientRect();
    const ways = [];
    const add = (from, to, busy, is_up) => {
      // Where the boxes stand below each other there is no room for lines, and no need of them.
      if (!from || !to || to.left <= from.right) return;
      const [x1, y1] = [from.right - frame.left, from.top + from.height / 2 - frame.top];
      const [x2, y2] = [to.left - frame.left, to.top + to.height / 2 - frame.top];
      const middle = (x1 + x2) / 2;
      ways.push([`M${x1} ${y1}C${middle} ${y1} ${middle} ${y2} ${x2} ${y2}`, is_up ? (busy ? "way busy" : "way") : "way down", 1.5 + Math.min(6, Math.log2(1 + busy))]);
    };
    for (const scheduler of schedulers) {
      for (const service of tokenizers.length > MOST_IN_COLUMN ? [own] : tokenizers) {
        const client = scheduler.clients?.find((one) => one.service === service);
        if (client || service === own) add(at(`tokenizer ${service}`), at(`scheduler ${scheduler.address}`), client?.running ?? 0, !scheduler.error);
      }
      if (executors.length > MOST_IN_COLUMN) continue; // they stand side by side, in each other's way
      for (const executor of executors) {
        if (!executor.schedulers.includes(scheduler.address) || executor.phase === "gone") continue;
        const is_up = executor.phase === "ready" || executor.phase === "draining";
        add(at(`scheduler ${scheduler.address}`), at(`executor ${executor.address}`), executor.running, is_up);
      }
    }
    const key = JSON.stringify(ways);
    if (key === this._drawn) return;
    this._drawn = key;
    this._ways.replaceChildren(...ways.map(([d, mark, width]) => svg("path", { d, class: mark, "stroke-width": width.toFixed(1) })));
  }
}

/** The other tokenizer services that schedulers tell of: their workers, and their requests on all schedulers. */
function otherTokenizers(tokenizer, schedulers) {
  const found = new Map();
  for (const scheduler of schedulers) {
    for (const { service, workers, running } of scheduler.clients ?? []) {
      if (service === tokenizer.service) continue;
      const before = found.get(service) ?? { workers: 0, running: 0 };
      found.set(service, { workers: Math.max(before.workers, workers), running: before.running + running });
    }
  }
  return found;
}
