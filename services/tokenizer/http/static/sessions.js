// The list of conversations that the server keeps.

import { json, request } from "./api.js";
import { byId, h, say } from "./dom.js";
import { some, span } from "./numbers.js";

const PAGE = 50;

export class Sessions {
  /**
   * @param onOpen Told the id of the one that is chosen.
   * @param onDeleted Told the id of one that is gone.
   */
  constructor({ onOpen, onDeleted }) {
    this.isOn = false;
    this._onOpen = onOpen;
    this._onDeleted = onDeleted;
    this._open = null;
    this._shown = [];
    this._next = "";
    byId("more-sessions").addEventListener("click", () => this._load(this._next).catch((error) => this._tell(error)));
  }

  /** Read the list. Throws ApiError where the key is not right; without a session store it only says so. */
  async refresh() {
    try {
      await this._load("");
    } catch (error) {
      this._tell(error);
      if (error.isAboutKey) throw error;
    }
  }

  select(id) {
    this._open = id;
    this._render();
  }

  async get(id) {
    const messages = [];
    for (let token = ""; ; ) {
      const page = await json(`v1/sessions/${encodeURIComponent(id)}?page_token=${encodeURIComponent(token)}`);
      messages.push(...page.messages);
      token = page.next_page_token;
      if (!token) return { ...page, messages };
    }
  }

  async fork(id, numTurns) {
    const made = newId(id.replace(/-[0-9a-f]{6}$/, ""));
    await request(`v1/sessions/${encodeURIComponent(id)}/fork`, { method: "POST", body: { new_session_id: made, num_turns: numTurns } });
    return made;
  }

  async _load(token) {
    const page = await json(`v1/sessions?page_size=${PAGE}&page_token=${encodeURIComponent(token)}`);
    this.isOn = true;
    this._shown = token ? [...this._shown, ...page.data] : page.data;
    this._next = page.next_page_token;
    say(byId("sessions-note"), this._shown.length ? "" : "None is kept yet.");
    this._render();
  }

  async _delete(id) {
    try {
      await request(`v1/sessions/${encodeURIComponent(id)}`, { method: "DELETE" });
      this._onDeleted(id);
      await this.refresh();
    } catch (error) {
      this._tell(error);
    }
    byId("new-chat").focus();
  }

  _tell(error) {
    if (error.retryAfterMs !== null) {
      say(byId("sessions-note"), `The list is not up to date: ${error.message}`);
      return;
    }
    this.isOn = false; // without a time to retry there is no session store
    say(byId("sessions-note"), `Conversations are not kept: ${error.message}`);
    byId("sessions").replaceChildren();
    byId("more-sessions").hidden = true;
  }

  _render() {
    const now = Date.now() / 1000;
    // The one that lives longest was used last.
    const sorted = [...this._shown].sort((a, b) => b.expires_at - a.expires_at);
    byId("sessions").replaceChildren(...sorted.map((session) =>
      h("li", {},
        h("button", {
          type: "button",
          class: "session",
          "aria-current": session.id === this._open ? "true" : undefined,
          onclick: () => this._onOpen(session.id),
        }, h("span", { class: "name" }, session.id),
          h("span", { class: "note" }, `${some(session.num_turns, "turn")}, ${some(session.num_tokens, "token")}, kept for ${span(session.expires_at - now)}`)),
        h("button", { type: "button", class: "delete", "aria-label": `Delete ${session.id}`, onclick: () => this._delete(session.id) }, "Delete"))));
    byId("more-sessions").hidden = !this._next;
  }
}

/** An id that people can tell from others: words, and six digits that nobody else has. */
export function newId(words) {
  const slug = words.toLowerCase().normalize("NFKD").replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 40);
  const random = Array.from(crypto.getRandomValues(new Uint8Array(3)), (byte) => byte.toString(16).padStart(2, "0"));
  return `${slug || "chat"}-${random.join("")}`;
}
