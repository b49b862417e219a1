// The chat page: which conversation is open, what is being answered, and what the server says it is.

import * as about from "./about.js";
import { announce, byId, capitalised, count, download, element, notify, withdraw } from "./dom.js";
import { Job } from "./job.js";
import * as settings from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Store, NotKept, area, asMarkdown, current, isConversation, newAnswer, newConversation } from "./store.js";
import { Failure, SILENT, complete } from "./stream.js";
import { TurnView } from "./turn.js";

const SMALL_CONTEXT = 512; // Below this, one more turn would fill it, so they are left out unless asked for.
const OVERFLOW = "context_length_exceeded";
const NO_KEY = "This server answers only those who have a key. Whoever runs it can give you one.",
  WRONG_KEY = "The server does not know this key. Is it written exactly as you were given it?";
const LONGEST_TITLE = 60,
  FOLLOWED = 120; // Characters; pixels from the end of the log within which it is followed.

const log = byId("log"),
  form = byId("composer"),
  box = byId("prompt"),
  earlierTurns = byId("history");
const store = new Store(area("localStorage"));
const jobs = new Map(); // The answers that are being written, by the id of their conversation.
const sidebar = new Sidebar({ open, rename, save, remove });
const views = new Map(); // The turns on the page.

let conversation = newConversation(),
  fingerprint = null,
  following = true,
  thinks = false,
  context = null; // How many tokens the model can read at once.

start();

function start() {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  box.addEventListener("input", fit);
  box.addEventListener("keydown", onBoxKey);
  document.addEventListener("keydown", onKey);
  log.addEventListener("scroll", onScroll, { passive: true });
  byId("stop").addEventListener("click", stop);
  byId("jump").addEventListener("click", () => follow(true));
  byId("new").addEventListener("click", () => {
    sidebar.toggle(false);
    open("");
  });
  byId("save-all").addEventListener("click", saveAll);
  byId("import").addEventListener("click", () => byId("import-file").click());
  byId("import-file").addEventListener("change", takeFile);
  earlierTurns.addEventListener("change", () => settings.change({ history: earlierTurns.checked }));
  window.addEventListener("hashchange", () => show(location.hash.slice(1)));
  window.addEventListener("storage", onOtherPage);
  window.addEventListener("pagehide", () =>
    jobs.forEach((job) => {
      keep(job.conversation);
      job.discarded = true;
    }),
  );
  settings.start(connect);
  about.start();
  fit();
  show(location.hash.slice(1));
  connect();
}

// What is served

function connect() {
  showFacts();
  showExamples();
  checkKey();
}

/** Tell whether the server wants a key, or another one, before something is asked. */
async function checkKey() {
  const answer = await fetch("v1/models", { headers: settings.authorisation() }).catch(() => null);
  if (answer?.status === 401) tellKey();
  else if (answer?.ok) withdraw("key");
}

function tellKey() {
  notify("key", settings.hasKey() ? WRONG_KEY : NO_KEY, { "Enter the key": () => settings.open("key") });
}

async function showFacts() {
  const answer = await fetch("health", { headers: settings.authorisation() }).catch(() => null);
  const health = await answer?.json().catch(() => null);
  if (!health?.model) return notify("health", SILENT, { "Try again": connect });
  withdraw("health");
  if (health.status === "failed")
    notify("health", "The engine of this server has failed. It has to be started again.", { "Try again": connect });
  document.title = `${health.model} · Isthmus`;
  byId("model").textContent = health.model;
  thinks = health.thinks;
  byId("thinks").hidden = !thinks;
  context = health.max_model_len;
  offerTurns(health.holds_turns !== false);
  about.show(health);
  byId("rehearsal").hidden = !health.rehearsal;
  if (health.rehearsal) byId("statement").textContent = `${capitalised(health.rehearsal.statement)}.`;
}

/** Earlier turns are sent wherever the model can read them, unless the reader chose otherwise. */
function offerTurns(possible) {
  const label = earlierTurns.closest("label");
  earlierTurns.disabled = !possible;
  earlierTurns.checked = possible && (settings.current().history ?? context >= SMALL_CONTEXT);
  label.title = possible ? "" : "This model was made for single questions: its prompt has no place for earlier turns.";
}

async function showExamples() {
  const answer = await fetch("examples", { headers: settings.authorisation() }).catch(() => null);
  const prompts = answer?.ok ? await answer.json() : [];
  byId("examples").replaceChildren(
    ...prompts.map((prompt) => {
      const button = element("button", "", prompt);
      button.type = "button";
      button.addEventListener("click", () => ask(prompt));
      return button;
    }),
  );
}

// Conversations

/** Go to a conversation, or to a new one for "". */
function open(id) {
  if (location.hash.slice(1) === id) show(id);
  else if (id) location.hash = id;
  else {
    history.pushState(null, "", location.pathname);
    show("");
  }
}

function show(id) {
  conversation = jobs.get(id)?.conversation ?? store.load(id) ?? newConversation();
  if (id && conversation.id !== id) history.replaceState(null, "", location.pathname);
  log.querySelectorAll(".turn").forEach((turn) => turn.remove());
  views.clear();
  conversation.turns.forEach(showTurn);
  if (jobs.has(conversation.id)) draw(jobs.get(conversation.id));
  refresh();
  follow(true);
  if (!byId("sidebar").contains(document.activeElement)) focusBox();
}

function showTurn(turn) {
  const owner = conversation;
  const view = new TurnView(turn, {
    retry: () => again(owner, turn, current(turn).question),
    goOn: () => goOn(owner, turn),
    edit: (text) => again(owner, turn, text),
    select: (index) => {
      if (owner.turns.at(-1) === turn) {
        turn.shown = index;
        keep(owner);
      }
    },
    isLast: () => owner.turns.at(-1) === turn,
    isLeftOut: () => owner.turns.indexOf(turn) < owner.from,
  });
  views.set(turn, view);
  log.append(view.root);
}

/** The list, the buttons and what else depends on which conversations there are and what is being answered. */
function refresh() {
  const { conversations, damaged } = store.all(),
    busy = jobs.has(conversation.id);
  sidebar.show(
    conversations.map(({ id, title, turns }) => ({ id, title, busy: jobs.has(id), text: searched(title, turns) })),
    conversation.id,
  );
  byId("welcome").hidden = conversation.turns.length > 0;
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  if (damaged.length) tellDamaged(damaged);
}

function searched(title, turns) {
  return [
    title,
    ...turns.flatMap(({ versions }) => versions.flatMap(({ question, answer }) => [question, answer.content])),
  ].join("\n");
}

function tellDamaged(keys) {
  const which = keys.length === 1 ? "One stored conversation" : `${keys.length} stored conversations`;
  notify("damaged", `${which} cannot be read. The others are not touched.`, {
    "Save as a file": () => download("damaged-conversations.txt", store.raw(keys), "text/plain"),
    Delete: () => {
      store.drop(keys);
      refresh();
    },
  });
}

function keep(kept) {
  try {
    store.save(kept);
    withdraw("storage");
  } catch (error) {
    if (!(error instanceof NotKept)) throw error;
    notify(
      "storage",
      `${error.message}: what is new here lasts until the page is closed. Export it, or delete what is old.`,
    );
  }
}

function rename(id, title) {
  const named = known(id);
  Object.assign(named, { title, named: true });
  keep(named);
  refresh();
}

function save(id) {
  const saved = known(id);
  download(
    `${saved.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "conversation"}.md`,
    asMarkdown(saved),
    "text/markdown",
  );
}

function saveAll() {
  download("conversations.json", JSON.stringify(store.all().conversations, null, 1), "application/json");
}

async function takeFile() {
  const [file] = byId("import-file").files,
    text = await file.text();
  byId("import-file").value = ""; // So that the same file can be chosen again.
  byId("settings").close();
  try {
    const { taken, known, unreadable } = store.take(text);
    const said = [
      `${count(taken, "conversation")} imported.`,
      known && `${known} not, because this browser has them already.`,
      unreadable && `${unreadable} not, because they are no conversations of this page.`,
    ];
    notify("import", said.filter(Boolean).join(" "));
  } catch (error) {
    if (!(error instanceof SyntaxError || error instanceof NotKept)) throw error;
    const reason = error instanceof NotKept ? error.message : `“${file.name}” is not a file that this page exported`;
    notify("import", `${reason}. What can be imported is what “Export all conversations” saves.`);
  }
  refresh();
}

function remove(id) {
  const removed = known(id),
    job = jobs.get(id);
  if (job) {
    job.discarded = true;
    job.abort();
  }
  store.remove(id);
  if (id === conversation.id) open("");
  refresh();
  notify("removed", `“${removed.title}” is deleted.`, {
    Undo: () => {
      keep(removed);
      open(id);
    },
  });
}

function known(id) {
  return id === conversation.id ? conversation : (jobs.get(id)?.conversation ?? store.load(id));
}

/** Another page of this browser changed what is stored. */
function onOtherPage({ key }) {
  if (!isConversation(key)) return;
  const stored = store.load(conversation.id);
  if (stored && !jobs.has(conversation.id) && stored.updated > conversation.updated) show(conversation.id);
  else refresh();
}

// Asking

function submit() {
  const text = box.value.trim();
  if (!text || jobs.has(conversation.id)) return;
  box.value = "";
  fit();
  ask(text);
}

function ask(question) {
  if (jobs.has(conversation.id)) return;
  const turn = { versions: [{ question, answer: newAnswer() }], shown: 0 };
  conversation.turns.push(turn);
  if (!conversation.named) Object.assign(conversation, { title: titleOf(question), named: true });
  showTurn(turn);
  run(conversation, turn);
  if (!location.hash) history.replaceState(null, "", `#${conversation.id}`);
}

/** Ask once more. An answer that has nothing in it gives its place to the new one. */
function again(owner, turn, question) {
  if (jobs.has(owner.id)) return;
  const { answer } = current(turn),
    version = { question, answer: newAnswer() };
  if (answer.content || answer.thought) turn.shown = turn.versions.push(version) - 1;
  else turn.versions[turn.shown] = version;
  views.get(turn).draw();
  run(owner, turn);
}

/** Let an answer that was cut or stopped go on where it ended. */
function goOn(owner, turn) {
  if (!jobs.has(owner.id)) run(owner, turn, { goesOn: true });
}

/** Leave out half of the earlier turns, the oldest; whether there was one. */
function shorten(owner, turn) {
  const place = owner.turns.indexOf(turn);
  if (!earlierTurns.checked || owner.from >= place) return false;
  owner.from += Math.ceil((place - owner.from) / 2);
  return true;
}

/** Ask the same in a new conversation. What was not answered does not stay in the old one. */
function anew(owner, turn) {
  const { question } = current(turn);
  owner.turns.splice(owner.turns.indexOf(turn), 1);
  keep(owner);
  open("");
  ask(question);
}

function titleOf(question) {
  const line = question.split("\n", 1)[0];
  return line.length > LONGEST_TITLE ? `${line.slice(0, LONGEST_TITLE - 1)}…` : line;
}

function request({ conversation: owner, turn, goesOn }) {
  const { system } = settings.current();
  const earlier = earlierTurns.checked ? owner.turns.slice(owner.from, owner.turns.indexOf(turn)).map(current) : [];
  const said = earlier
    .filter(({ answer }) => answer.content)
    .flatMap(({ question, answer }) => [
      { role: "user", content: question },
      { role: "assistant", content: answer.content },
    ]);
  const messages = [
    ...(system ? [{ role: "system", content: system }] : []),
    ...said,
    { role: "user", content: current(turn).question },
  ];
  if (!goesOn) return { messages, ...settings.sampling() };
  messages.push({ role: "assistant", content: begun(current(turn).answer) });
  return { messages, continue_final_message: true, add_generation_prompt: false, ...settings.sampling() };
}

/** What an answer that goes on begins with: its thinking has no place beside it, and is all where there is no answer. */
function begun({ content, thought }) {
  return content || `<think>\n${thought}`;
}

async function run(owner, turn, options = {}) {
  const job = new Job(owner, turn, { draw, keep }, options);
  owner.updated = Date.now();
  jobs.set(owner.id, job);
  keep(owner);
  draw(job);
  refresh();
  follow(true);
  focusBox();
  announce(thinks ? "Thinking" : "Answering");
  job.finish(await stream(job));
  jobs.delete(owner.id);
  owner.updated = Date.now();
  if (!job.discarded) keep(owner);
  draw(job);
  if (conversation === owner) views.forEach((view) => view.turn !== turn && view.update(null)); // They may be left out.
  refresh();
  follow(false);
  if (document.activeElement === document.body) focusBox();
  if (job.answer.fingerprint !== fingerprint) {
    fingerprint = job.answer.fingerprint;
    showFacts();
  }
}

/** Show what has come of an answer, if its conversation is open. */
function draw(job) {
  const isOver = jobs.get(job.conversation.id) !== job,
    view = views.get(job.turn);
  if (!view) return;
  view.update(isOver ? null : job.elapsed);
  if (isOver) view.announceEnd();
  else follow(false);
}

/** Returns what went wrong, or null. */
async function stream(job) {
  try {
    for await (const chunk of complete(request(job), settings.authorisation(), job.signal)) job.take(chunk);
    withdraw("key");
    return null;
  } catch (error) {
    if (!(error instanceof Failure) && error.name !== "AbortError") throw error;
    if (error.code === OVERFLOW && job.shortens && shorten(job.conversation, job.turn)) return stream(job);
    return explained(error, job);
  }
}

/** What went wrong in the words of who asked, with ways on. */
function explained(error, job) {
  if (error.code === OVERFLOW) return explainedOverflow(job);
  if (error.status !== 401) return error;
  tellKey();
  return new Failure(settings.hasKey() ? WRONG_KEY : NO_KEY);
}

function explainedOverflow(job) {
  const { conversation: owner, turn, answer, goesOn } = job,
    { maxTokens } = settings.current(),
    length = context ? ` (${count(context, "token")})` : "",
    room = maxTokens ? `, with the ${count(maxTokens, "token")} that the settings keep for the answer` : "";
  const ways = {};
  if (earlierTurns.checked && owner.turns.indexOf(turn) > owner.from) {
    ways["Leave out the oldest turns"] = () => {
      shorten(owner, turn);
      run(owner, turn, { goesOn, shortens: true });
    };
    if (!goesOn) ways["Start anew with this message"] = () => anew(owner, turn);
    answer.ways = ways;
    return new Failure(`This conversation has become longer than the model can read at once${length}${room}.`);
  }
  if (!goesOn) ways["Change the message"] = () => views.get(turn)?.edit();
  if (maxTokens) ways["Open settings"] = () => settings.open("maxTokens");
  answer.ways = ways;
  const what = goesOn ? "The answer fills all that the model can read at once" : "This message is longer than the model can read at once";
  return new Failure(`${what}${length}${room}.`);
}

function stop() {
  jobs.get(conversation.id)?.abort();
}

// Keys, and the size and place of things

function onBoxKey(event) {
  if (event.key === "ArrowUp" && !box.value && conversation.turns.length) {
    event.preventDefault();
    views.get(conversation.turns.at(-1)).edit();
  }
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
}

function onKey(event) {
  if (document.querySelector("dialog[open]")) return;
  const isWriting = event.target.closest?.("input, textarea, select");
  const isSearch =
    (event.key === "k" && (event.ctrlKey || event.metaKey)) ||
    (event.key === "/" && !isWriting && !event.ctrlKey && !event.metaKey);
  if (event.key === "Escape" && sidebar.isOpen) sidebar.toggle(false);
  else if (event.key === "Escape") stop();
  if (!isSearch) return;
  event.preventDefault();
  sidebar.toggle(false);
  box.focus();
}

/** The next message can be written at once, unless that would bring up a keyboard on the screen. */
function focusBox() {
  if (!matchMedia("(pointer: coarse)").matches && !sidebar.isOpen) box.focus();
}

function fit() {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
  byId("send").disabled = !box.value.trim();
}

/** Follow the end of the log, unless the reader has scrolled away from it. */
function follow(always) {
  if (always || following) log.scrollTop = log.scrollHeight;
}

function onScroll() {
  following = log.scrollHeight - log.scrollTop - log.clientHeight < FOLLOWED;
  byId("jump").hidden = following;
}
