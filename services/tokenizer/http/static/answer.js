// One answer: its text while it comes, and what is known of it once it is there.

import { h } from "./dom.js";
import { latencyView } from "./latency.js";
import { count, duration, some } from "./numbers.js";
import { TextView, visible } from "./text.js";
import { TokensView } from "./tokens.js";

export class Answer {
  /** @param actions Buttons below the answer once it is over. */
  constructor(body, { actions = () => [] } = {}) {
    this.body = body;
    this._actions = actions;
    this._began = performance.now();
    this._firstAt = null;
    this._reason = "";
    this._usage = null;
    this._latency = null;
    this._session = null;
    this._text = new TextView(h("div", { class: "text" }));
    this._thought = null;
    this._tokens = new TokensView();
    this._note = h("p", { class: "note" });
    this._foot = h("div", { class: "foot" });
    this.element = h("article", { class: "answer", "aria-busy": "true" },
      h("h2", {}, "Answer"), this._text.element, this._tokens.element, this._note, this._foot);
  }

  get text() {
    return this._text.text;
  }

  get isStored() {
    return this._session === "saved";
  }

  take(chunk) {
    for (const choice of chunk.choices ?? []) {
      const content = choice.delta?.content ?? choice.text ?? "";
      const thought = choice.delta?.reasoning_content ?? "";
      if (content || thought) this._firstAt ??= performance.now();
      if (thought) this._think(thought);
      if (content) this._text.append(content);
      if (choice.logprobs?.content) this._tokens.addChat(choice.logprobs.content);
      else if (choice.logprobs?.tokens) this._tokens.addCompletion(choice.logprobs);
      if (choice.finish_reason) this._reason = told(choice.finish_reason, choice.stop_reason);
    }
    if (chunk.usage) this._usage = chunk.usage;
    if (chunk.latency) this._latency = chunk.latency;
    if (chunk.session) this._session = chunk.session;
  }

  /** Nothing more comes. `problem` says why, where it did not end by itself; `resumed`: it began before this page did. */
  end({ problem = "", resumed = false } = {}) {
    this._text.flush();
    this._thought?.flush();
    this.element.setAttribute("aria-busy", "false");
    if (problem) {
      this._note.classList.add("problem");
      this._note.textContent = visible(problem);
    } else if (this._session !== null && this._session !== "saved") {
      this._note.classList.add("problem");
      this._note.textContent = NOT_SAVED[this._session] ?? `The conversation does not have this turn: ${this._session}.`;
    }
    const seen = resumed || problem ? null : performance.now() - this._began;
    if (this._latency) this._foot.append(latencyView(this._latency, seen));
    this._foot.append(this._facts(), this._buttons());
  }

  _think(thought) {
    if (this._thought === null) {
      this._thought = new TextView(h("div", { class: "text" }));
      this._text.element.before(h("details", { class: "thought" }, h("summary", {}, "Reasoning"), this._thought.element));
    }
    this._thought.append(thought);
  }

  _facts() {
    const usage = this._usage, latency = this._latency;
    const facts = [];
    if (this._reason) facts.push(["Ended", this._reason]);
    if (usage) {
      const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
      facts.push(["Prompt", `${some(usage.prompt_tokens, "token")}, ${count(cached)} of them cached`]);
      facts.push(["Answer", some(usage.completion_tokens, "token")]);
    }
    if (latency?.ttft_ms) {
      facts.push(["First token after", duration(latency.ttft_ms)]);
      const rest = latency.decode_ms && usage ? (usage.completion_tokens - 1) / (latency.decode_ms / 1000) : 0;
      if (rest > 0) facts.push(["Then", `${count(rest, 1)} tokens/s`]);
    }
    if (latency?.executor) facts.push(["Executor", visible(latency.executor)]);
    if (this.body.seed !== undefined) facts.push(["Seed", String(this.body.seed)]);
    return h("dl", { class: "facts" }, ...facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
  }

  _buttons() {
    const buttons = [];
    if (!this._tokens.isEmpty) {
      const toggle = h("button", {
        type: "button",
        "aria-pressed": "false",
        onclick: () => {
          const is_shown = toggle.getAttribute("aria-pressed") !== "true";
          toggle.setAttribute("aria-pressed", String(is_shown));
          this._tokens.show(is_shown);
          this._text.element.hidden = is_shown;
        },
      }, "Colour tokens");
      buttons.push(toggle);
    }
    if (this.text) buttons.push(h("button", { type: "button", onclick: () => copy(this.text) }, "Copy"));
    return h("div", { class: "row" }, ...buttons, ...this._actions(this));
  }
}

const NOT_SAVED = {
  conflict: "The conversation does not have this turn: another one was stored meanwhile.",
  unavailable: "The conversation does not have this turn: the session store could not be reached.",
  full: "The conversation does not have this turn: your conversations hold as many bytes as they may.",
};

function told(reason, stop) {
  const words = { stop: "by itself", length: "cut off at its most tokens", tool_calls: "with a call of a function" };
  if (reason === "stop" && typeof stop === "string") return `by the stop text “${visible(stop)}”`;
  return words[reason] ?? reason;
}

async function copy(text) {
  await navigator.clipboard?.writeText(text);
}
