// The dialog that asks for the API key, where the server wants one.

import { apiKey } from "./api.js";
import { byId, say } from "./dom.js";

/** @param onChange Called when there is another key. */
export function keyDialog(onChange) {
  const dialog = byId("key-dialog"), field = byId("key");
  byId("key-button").addEventListener("click", () => open(apiKey.get() ? "" : "No key is in use."));
  byId("key-cancel").addEventListener("click", () => dialog.close());
  byId("key-form").addEventListener("submit", () => {
    apiKey.set(field.value.trim());
    field.value = "";
    onChange();
  });

  function open(note) {
    say(byId("key-note"), note);
    field.value = "";
    if (!dialog.open) dialog.showModal();
    field.focus();
  }
  return { ask: (error) => open(error.message) };
}
