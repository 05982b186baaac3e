// The playground: one conversation at a time, whose turns the server keeps where it has a session store.

import { Answer } from "./answer.js";
import { json } from "./api.js";
import { byId, h, say } from "./dom.js";
import { keyDialog } from "./key.js";
import { Sessions, newId } from "./sessions.js";
import { FieldError, Settings } from "./settings.js";
import { cancel, chunks } from "./stream.js";
import { visible } from "./text.js";

const RUNNING = "scalellm.running";
const PATHS = { chat: "v1/chat/completions", completion: "v1/completions" };
const LAST_WORDS = 2_000;

const log = byId("log"), prompt = byId("prompt"), status = byId("status");
const settings = new Settings();
const key = keyDialog(start);
const sessions = new Sessions({ onOpen: (id) => open(id), onDeleted: (id) => id === chat.session && begin() });

// The conversation that is shown. `session`: its id at the server; null: the server keeps none, the page does.
// `turns`: how many are over and belong to it. `messages`: of these, where the page keeps them.
let chat = { session: null, turns: 0, messages: [] };
// The answer that is on its way: {controller, body}.
let running = null;

function mode() {
  return document.querySelector("input[name=mode]:checked").value;
}

async function start() {
  try {
    const models = await json("v1/models");
    const chosen = byId("model").value || JSON.parse(sessionStorage.getItem(RUNNING) || "null")?.body.model;
    byId("model").replaceChildren(...models.data.map(({ id }) => h("option", { value: id, selected: id === chosen }, visible(id))));
    await sessions.refresh();
  } catch (error) {
    if (error.isAboutKey) key.ask(error);
    else say(status, `${error.message}; reload the page to try again`);
    return;
  }
  if (running === null && log.childElementCount === 0) await restore();
}

/** Show what was shown before a reload. */
async function restore() {
  const record = JSON.parse(sessionStorage.getItem(RUNNING) || "null");
  const session = new URLSearchParams(location.hash.slice(1)).get("session");
  const is_running = record !== null && record.session === session;
  // A conversation comes into being with its first turn: before that there is nothing to show but the answer.
  if (session !== null && sessions.isOn && !(is_running && record.turns === 0)) {
    await open(session, is_running ? record.turns : undefined);
  }
  if (is_running) {
    document.querySelector(`input[name=mode][value=${record.mode}]`).checked = true;
    setMode();
    chat = { session: record.session, turns: record.turns, messages: record.messages };
    setHash(chat.session);
    await run(record, true);
  }
}

function setHash(session) {
  history.replaceState(null, "", session === null ? location.pathname : `#session=${encodeURIComponent(session)}`);
}

/** Begin a new conversation. */
function begin() {
  running?.controller.abort(new DOMException("left", "AbortError"));
  chat = { session: null, turns: 0, messages: [] };
  log.replaceChildren();
  say(status, "");
  setHash(null);
  sessions.select(null);
}

/** Show a conversation that the server keeps, as far as its first turns. */
async function open(id, numTurns = Infinity) {
  begin();
  try {
    const session = await sessions.get(id);
    let first = 0;
    session.turn_ends.slice(0, numTurns).forEach((end, number) => {
      for (const message of session.messages.slice(first, end)) log.append(said(message));
      log.lastElementChild?.append(h("div", { class: "row" }, forkButton(id, number + 1)));
      first = end;
    });
    chat = { session: id, turns: Math.min(session.turn_ends.length, numTurns), messages: [] };
    // A conversation goes on with the model that it began with.
    if ([...byId("model").options].some((option) => option.value === session.model)) byId("model").value = session.model;
    setHash(id);
    sessions.select(id);
    scrollDown();
  } catch (error) {
    fail(error);
  }
}

async function fork(id, numTurns) {
  try {
    const made = await sessions.fork(id, numTurns);
    await sessions.refresh();
    await open(made);
    say(status, `This is a copy of ${id} up to turn ${numTurns}.`);
    prompt.focus();
  } catch (error) {
    fail(error);
  }
}

/** Ask. `seed`: instead of the one in the settings. */
async function send(text, { seed } = {}) {
  let body;
  try {
    body = settings.body(mode());
  } catch (error) {
    if (!(error instanceof FieldError)) throw error;
    showField(error.field, error.message);
    return false;
  }
  if (seed !== undefined) body.seed = seed;
  const request_id = `play-${crypto.getRandomValues(new BigUint64Array(1))[0].toString(16)}`;
  Object.assign(body, { request_id, stream: true, stream_options: { include_usage: true }, on_disconnect: "keep" });
  if (byId("model").value) body.model = byId("model").value; // otherwise there is but the server's own
  const record = { mode: mode(), body, text, turns: chat.turns, messages: chat.messages };
  if (record.mode === "chat") {
    const isFirst = chat.turns === 0;
    const added = [...(isFirst && settings.system ? [{ role: "system", content: settings.system }] : []), { role: "user", content: text }];
    if (isFirst && sessions.isOn) chat.session = newId(text);
    if (chat.session !== null) body.session_id = chat.session;
    body.messages = chat.session === null ? [...chat.messages, ...added] : added;
    setHash(chat.session);
  } else {
    body.prompt = text;
  }
  record.session = record.mode === "chat" ? chat.session : null;
  await run(record, false);
  return true;
}

/** Show an answer until it is over. A record of it lets the page go on after a reload. */
async function run(record, resumed) {
  const { body } = record, path = PATHS[record.mode];
  const controller = new AbortController();
  const mine = (running = { controller, body });
  try {
    sessionStorage.setItem(RUNNING, JSON.stringify(record));
  } catch {
    // Full: a reload ends what is shown.
  }
  // Of a conversation that the page keeps, the messages before are in the body, too.
  const num_shown = record.session === null && !resumed ? record.messages.length : 0;
  for (const message of body.messages?.slice(num_shown) ?? []) log.append(said(message));
  if (record.mode === "completion") log.append(said({ role: "prompt", content: body.prompt }));
  const answer = new Answer(body, { actions: (done) => actions(record, done) });
  log.append(answer.element);
  setBusy(true);
  scrollDown();
  let problem = "";
  try {
    const onWait = (why) => say(status, why ? `${why}…` : "Answering…");
    for await (const chunk of chunks({ path, body }, { signal: controller.signal, resumed, onWait })) {
      const atEnd = isAtEnd();
      answer.take(chunk);
      if (atEnd) scrollDown();
    }
    if (record.mode === "chat" && running === mine) {
      chat.turns += 1;
      if (record.session === null) chat.messages = [...body.messages, { role: "assistant", content: answer.text }];
    }
    say(status, "The answer is complete.");
  } catch (error) {
    problem = why(error, resumed);
    say(status, problem);
    if (error.isAboutKey) key.ask(error);
    if (error.param) showField(error.param, problem);
  }
  if (running !== mine) return; // another conversation is shown now
  running = null;
  sessionStorage.removeItem(RUNNING);
  answer.end({ problem, resumed });
  if (record.session !== null && !answer.isStored) {
    chat.turns = record.turns;
    if (record.turns === 0) setHash((chat.session = null)); // there is none yet
  }
  setBusy(false);
  scrollDown();
  if (sessions.isOn) {
    await sessions.refresh();
    sessions.select(chat.session);
  }
}

function why(error, resumed) {
  if (error.name === "AbortError" || error.code === "cancelled") return "Stopped. The conversation does not have this answer.";
  if (error.status === 404 && resumed) return "The server does not keep this answer any more.";
  if (error instanceof TypeError) return `The server cannot be reached: ${error.message}.`;
  return error.message;
}

async function stop() {
  const stopped = running;
  if (stopped === null) return;
  say(status, "Stopping…");
  const leave = () => stopped.controller.abort(new DOMException("stopped", "AbortError"));
  try {
    await cancel(stopped.body.request_id);
    setTimeout(leave, LAST_WORDS); // before that the stream ends by itself, behind the tokens that it has
  } catch {
    leave(); // it is not kept, so it ends with its connection
  }
}

/** Buttons below an answer. */
function actions(record, answer) {
  const buttons = [];
  if (record.mode === "chat" && answer.isStored) buttons.push(forkButton(record.session, record.turns + 1));
  buttons.push(h("button", { type: "button", onclick: () => again(record) }, "Repeat with this seed"));
  return buttons;
}

function forkButton(id, numTurns) {
  return h("button", { type: "button", class: "fork", onclick: () => fork(id, numTurns) }, "Fork here");
}

/** Ask the same once more, behind what was there then. */
async function again(record) {
  if (running !== null) return;
  document.querySelector(`input[name=mode][value=${record.mode}]`).checked = true;
  setMode();
  if (record.mode === "chat") {
    if (record.turns === 0) begin();
    else if (record.session !== null) await fork(record.session, record.turns);
    else chat = { session: null, turns: record.turns, messages: record.messages };
  }
  await send(record.text, { seed: record.body.seed });
}

function said(message) {
  const names = { user: "You", assistant: "Answer", system: "System prompt", prompt: "Prompt", tool: "Result" };
  const text = h("div", { class: "text" }, visible(message.content ?? ""));
  const parts = [h("h2", {}, names[message.role] ?? visible(message.role))];
  if (message.reasoning_content) {
    parts.push(h("details", { class: "thought" }, h("summary", {}, "Reasoning"), h("div", { class: "text" }, visible(message.reasoning_content))));
  }
  for (const call of message.tool_calls ?? []) {
    parts.push(h("div", { class: "text code" }, visible(`${call.function.name}(${call.function.arguments})`)));
  }
  return h("article", { class: message.role === "assistant" ? "answer" : "said" }, ...parts, text);
}

/** Point at the field that a refusal names, where the page has it. */
function showField(param, message) {
  const name = { response_format: "schema", stop: "stop_texts", max_completion_tokens: "max_tokens" }[param.split(/[.[]/)[0]] ?? param.split(/[.[]/)[0];
  const field = document.getElementById(name);
  if (field === null) return;
  byId("settings-panel").open = true;
  field.setAttribute("aria-invalid", "true");
  field.focus();
  field.addEventListener("input", () => field.removeAttribute("aria-invalid"), { once: true });
  say(status, message.startsWith(param) ? message : `${param} ${message}`);
}

function fail(error) {
  say(status, error.message);
  if (error.isAboutKey) key.ask(error);
}

function setBusy(is_busy) {
  byId("send").disabled = is_busy;
  byId("stop").disabled = !is_busy;
  if (is_busy) say(status, "Answering…");
}

function setMode() {
  say(byId("prompt-label"), mode() === "chat" ? "Your message" : "Text to continue");
}

function isAtEnd() {
  return log.scrollHeight - log.scrollTop - log.clientHeight < 48;
}

function scrollDown() {
  log.scrollTop = log.scrollHeight;
}

async function submit() {
  const text = prompt.value;
  if (running !== null || text === "") return;
  prompt.value = "";
  const was_sent = await send(text);
  if (!was_sent) prompt.value = text;
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running !== null && !byId("key-dialog").open) stop();
});
byId("stop").addEventListener("click", stop);
byId("new-chat").addEventListener("click", () => {
  begin();
  prompt.focus();
});
for (const radio of document.querySelectorAll("input[name=mode]")) {
  radio.addEventListener("change", () => {
    begin();
    setMode();
  });
}

byId("model").addEventListener("change", () => {
  if (chat.session === null || chat.turns === 0) return;
  const { session } = chat;
  begin();
  say(status, `This is a new conversation: ${session} goes on with its own model alone.`);
});

// Where there is room the panels stand open beside the conversation.
const wide = matchMedia("(min-width: 60rem)");
const setPanels = () => ["sessions-panel", "settings-panel"].forEach((id) => (byId(id).open = wide.matches));
wide.addEventListener("change", setPanels);
setPanels();
setMode();
start();
prompt.focus();
