// Tokens coloured by how probable they were. The arrow keys go from one to the next; what is chosen is told below.

import { h, say } from "./dom.js";
import { percent } from "./numbers.js";
import { visible } from "./text.js";

const MOST = 20_000;
const BOUNDS = [0.9, 0.7, 0.5, 0.3, 0.1];

export class TokensView {
  constructor() {
    this.tokens = [];
    this._shown = 0;
    this._chosen = -1;
    this._decoder = new TextDecoder();
    this._spans = h("div", {
      class: "text tokens",
      tabindex: "0",
      role: "group",
      "aria-label": "Tokens, coloured by probability; arrow keys choose one",
      onkeydown: (event) => this._onKey(event),
      onclick: (event) => this._choose(Number(event.target.dataset?.index ?? -1)),
    });
    this._told = h("output", { class: "note" });
    this.element = h("div", { hidden: true }, this._spans, this._told, legend());
  }

  get isEmpty() {
    return this.tokens.length === 0;
  }

  /** Tokens of a chat's chunk. A token may be a part of a character, which its bytes tell. */
  addChat(entries) {
    for (const entry of entries) {
      const bytes = entry.bytes ? Uint8Array.from(entry.bytes) : null;
      const text = bytes ? this._decoder.decode(bytes, { stream: true }) : entry.token;
      const top = (entry.top_logprobs ?? []).map((other) => [other.token, other.logprob]);
      this.tokens.push({ text, name: entry.token, logprob: entry.logprob, top });
    }
    this.render();
  }

  /** Tokens of a completion's chunk. */
  addCompletion(logprobs) {
    logprobs.tokens.forEach((token, number) => {
      const top = Object.entries(logprobs.top_logprobs?.[number] ?? {});
      this.tokens.push({ text: token, name: token, logprob: logprobs.token_logprobs[number], top });
    });
    this.render();
  }

  render() {
    if (this.element.hidden) return;
    const added = [];
    for (; this._shown < Math.min(this.tokens.length, MOST); this._shown++) {
      const token = this.tokens[this._shown];
      const mark = `token p${grade(token.logprob)}`;
      added.push(h("span", { class: mark, "data-index": String(this._shown), title: told(token) }, visible(token.text)));
    }
    this._spans.append(...added);
  }

  show(is_shown) {
    this.element.hidden = !is_shown;
    this.render();
  }

  _onKey(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    this._choose(Math.min(Math.max(this._chosen + step, 0), this._shown - 1));
  }

  _choose(index) {
    if (!(index >= 0 && index < this._shown)) return;
    this._spans.children[this._chosen]?.classList.remove("chosen");
    this._chosen = index;
    this._spans.children[index].classList.add("chosen");
    say(this._told, told(this.tokens[index]));
  }
}

function grade(logprob) {
  const p = Math.exp(logprob);
  const found = BOUNDS.findIndex((bound) => p >= bound);
  return found < 0 ? BOUNDS.length : found;
}

function told(token) {
  const others = token.top
    .filter(([name]) => name !== token.name)
    .map(([name, logprob]) => `${quoted(name)} ${percent(Math.exp(logprob))}`);
  const instead = others.length ? `; instead: ${others.join(", ")}` : "";
  return `${quoted(token.name)} ${percent(Math.exp(token.logprob))}${instead}`;
}

function quoted(text) {
  return `“${visible(text).replaceAll("\n", "␊").replaceAll("\t", "␉")}”`;
}

function legend() {
  const words = [...BOUNDS.map((bound) => `≥ ${percent(bound)}`), `< ${percent(BOUNDS.at(-1))}`];
  return h("p", { class: "note legend" }, "Probability: ",
    ...words.flatMap((word, number) => [h("span", { class: `token p${number}` }, word), " "]));
}
