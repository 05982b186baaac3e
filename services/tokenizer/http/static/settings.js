// The settings of a request, as the form has them. They last as long as the tab.

import { byId } from "./dom.js";

const STORE = "scalellm.settings";
const INTEGERS = ["max_tokens", "top_k", "seed"];
const NUMBERS = ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"];
const TEXTS = ["system", "stop_texts", "schema"];

/** What a field of the form says is wrong. */
export class FieldError extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

export class Settings {
  constructor() {
    this._form = byId("settings");
    this._restore();
    this._form.addEventListener("input", () => this._save());
    this._form.addEventListener("submit", (event) => event.preventDefault());
    byId("reset-settings").addEventListener("click", () => {
      this._form.reset();
      this._save();
    });
  }

  get system() {
    return byId("system").value;
  }

  /** The fields of a request's body. What is left empty is left out. Throws FieldError. */
  body(mode) {
    const body = {};
    for (const name of INTEGERS) {
      const text = byId(name).value.trim();
      if (text && !/^-?\d{1,15}$/.test(text)) throw new FieldError(name, "must be a whole number");
      if (text) body[name] = Number(text);
    }
    for (const name of NUMBERS) {
      const text = byId(name).value.trim().replace(",", ".");
      if (text && !Number.isFinite(Number(text))) throw new FieldError(name, "must be a number");
      if (text) body[name] = Number(text);
    }
    // One is drawn here, so that each answer can be had again.
    body.seed ??= crypto.getRandomValues(new Uint32Array(1))[0];
    const stops = byId("stop_texts").value.split("\n").filter((line) => line !== "");
    if (stops.length) body.stop = stops;
    if (byId("logprobs").checked) Object.assign(body, mode === "chat" ? { logprobs: true, top_logprobs: 4 } : { logprobs: 4 });
    const schema = byId("schema").value.trim();
    if (schema && mode === "chat") {
      body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: parse(schema) } };
    }
    return body;
  }

  _save() {
    const values = Object.fromEntries([...INTEGERS, ...NUMBERS, ...TEXTS].map((name) => [name, byId(name).value]));
    values.logprobs = byId("logprobs").checked;
    try {
      sessionStorage.setItem(STORE, JSON.stringify(values));
    } catch {
      // Full: they last until the page is left.
    }
  }

  _restore() {
    const values = JSON.parse(sessionStorage.getItem(STORE) || "{}");
    for (const name of [...INTEGERS, ...NUMBERS, ...TEXTS]) byId(name).value = values[name] ?? "";
    byId("logprobs").checked = values.logprobs ?? false;
  }
}

function parse(schema) {
  let parsed;
  try {
    parsed = JSON.parse(schema);
  } catch (error) {
    throw new FieldError("schema", `is not JSON: ${error.message}`);
  }
  if (parsed === null || typeof parsed !== "object" || Array.isArray(parsed)) throw new FieldError("schema", "must be an object");
  return parsed;
}
