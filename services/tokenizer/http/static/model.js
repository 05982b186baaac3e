// The choice of a model on the live page. The address has it, so that each model has a page of its own.

import { byId, h } from "./dom.js";
import { visible } from "./text.js";

export class ModelChoice {
  /** @param onChange Called when another model was chosen. */
  constructor(onChange) {
    this._list = byId("model");
    this._names = [];
    this._list.addEventListener("change", () => {
      history.replaceState(null, "", this.model === null ? location.pathname : `#model=${encodeURIComponent(this.model)}`);
      onChange();
    });
    addEventListener("hashchange", () => {
      this._list.value = wanted();
      if (this._list.selectedIndex < 0) this._list.value = "";
      onChange();
    });
  }

  /** Name of the chosen model; null: all of them. */
  get model() {
    return this._names.length > 1 && this._list.value ? this._list.value : null;
  }

  /** Offer these models, if others were offered before. */
  offer(names) {
    if (names.length === this._names.length && names.every((name, number) => name === this._names[number])) return;
    const chosen = this._names.length ? this._list.value : wanted();
    this._names = names;
    const all = names.length > 1 ? [h("option", { value: "" }, "All models")] : [];
    this._list.replaceChildren(...all, ...names.map((name) => h("option", { value: name, selected: name === chosen }, visible(name))));
  }
}

function wanted() {
  return new URLSearchParams(location.hash.slice(1)).get("model") ?? "";
}
