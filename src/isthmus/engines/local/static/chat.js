// The chat page. Whatever a model or a user wrote reaches the page through textContent alone.

const byId = (id) => document.getElementById(id);
const log = byId("log"), welcome = byId("welcome"), form = byId("composer"), box = byId("prompt");
const sendButton = byId("send"), stopButton = byId("stop"), clearButton = byId("clear"), history = byId("history");
const SMALL_CONTEXT = 1024; // Below this, earlier turns would soon fill it, so they are left out unless asked for.
const BROKEN = "The connection broke off.", SILENT = "The server does not answer. Is it still running?";

let turns = []; // {role, content} of the finished conversation
let running = null; // AbortController of the answer in progress

start();

async function start() {
  form.addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  box.addEventListener("input", fit);
  box.addEventListener("keydown", onKey);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
  stopButton.addEventListener("click", stop);
  clearButton.addEventListener("click", clear);
  fit();
  await Promise.all([showFacts(), showExamples()]);
}

function onKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
}

function fit() {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
  sendButton.disabled = !box.value.trim();
}

async function showFacts() {
  try {
    const health = await (await fetch("health")).json();
    document.title = `${health.model} · Isthmus`;
    byId("model").textContent = health.model;
    history.checked = health.max_model_len > SMALL_CONTEXT;
    const facts = { model: health.model, format: health.format, seal: health.seal, pool: health.pool };
    byId("facts").replaceChildren(...Object.entries(facts).filter(([, value]) => value).map(fact));
    if (health.rehearsal) notice(`${capitalised(health.rehearsal.statement)}. The rules are that chip's, the speed is this machine's.`);
  } catch {
    notice(SILENT);
  }
}

function fact([name, value]) {
  const pair = document.createElement("div"), term = document.createElement("dt"), data = document.createElement("dd");
  term.textContent = name;
  data.textContent = value;
  pair.append(term, data);
  return pair;
}

function notice(text) {
  byId("rehearsal").textContent = text;
  byId("rehearsal").hidden = false;
}

async function showExamples() {
  const answer = await fetch("examples").catch(() => null);
  if (!answer?.ok) return;
  for (const prompt of await answer.json()) {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.textContent = prompt;
    chip.addEventListener("click", () => { box.value = prompt; submit(); });
    byId("examples").append(chip);
  }
}

function submit() {
  const text = box.value.trim();
  if (!text || running) return;
  box.value = "";
  fit();
  welcome.hidden = true;
  clearButton.hidden = false;
  const question = instance("question");
  question.querySelector("p").textContent = text;
  log.append(question);
  ask({ role: "user", content: text }, [...turns]);
}

/** Ask for an answer to `question` after `earlier` turns, and show it at the end of the log as it comes. */
async function ask(question, earlier) {
  const view = answerView(() => {
    view.root.remove();
    turns = earlier;
    ask(question, earlier);
  });
  log.append(view.root);
  setRunning(new AbortController());
  scroll(true);
  const messages = history.checked ? [...earlier, question] : [question];
  try {
    await stream(messages, running.signal, view);
    view.finish();
  } catch (error) {
    if (error.name === "AbortError") view.finish("stopped by you");
    else view.fail(error.message);
  }
  if (view.content) turns = [...earlier, question, { role: "assistant", content: view.content }];
  setRunning(null);
  scroll(false);
}

async function stream(messages, signal, view) {
  const body = JSON.stringify({ messages, stream: true, stream_options: { include_usage: true } });
  const answer = await fetch("v1/chat/completions", { method: "POST", headers: { "Content-Type": "application/json" }, body, signal })
    .catch((error) => { throw error.name === "AbortError" ? error : new Error(SILENT); });
  if (!answer.ok) {
    const refusal = await answer.json().catch(() => null);
    throw new Error(refusal?.error.message ?? `The server failed (${answer.status}).`);
  }
  for await (const event of events(answer.body)) {
    if (event.error) throw new Error(event.error.message);
    view.take(event);
    scroll(false);
  }
}

/** The JSON of server-sent events, as they arrive. */
async function* events(source) {
  const reader = source.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => { throw error.name === "AbortError" ? error : new Error(BROKEN); });
    if (done) throw new Error(BROKEN);
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function answerView(retry) {
  const root = instance("answer");
  const part = (name) => root.querySelector(`.${name}`);
  const thinking = part("thinking"), began = performance.now();
  let first = null, tokens = 0, cut = false, touched = false;
  root.classList.add("busy");
  part("retry").addEventListener("click", () => { if (!running) retry(); });
  thinking.querySelector("summary").addEventListener("click", () => { touched = true; });

  const figures = (note) => {
    const seconds = (performance.now() - (first ?? began)) / 1000;
    const speed = tokens > 1 && seconds > 0 ? `${Math.round((tokens - 1) / seconds)} tokens/s` : "";
    part("figures").textContent = [tokens && count(tokens, "token"), speed, note].filter(Boolean).join("  ·  ");
  };
  const settle = (note) => {
    root.classList.remove("busy", "writing");
    part("state").textContent = "Thought";
    if (!touched && view.content) thinking.open = false;
    part("retry").hidden = false;
    figures(note);
  };
  const view = {
    root,
    content: "",
    take(event) {
      if (event.usage) tokens = event.usage.completion_tokens;
      const choice = event.choices[0];
      if (!choice) return;
      const { reasoning_content: thought, content } = choice.delta;
      if (thought || content) { first ??= performance.now(); tokens += 1; }
      if (thought) {
        thinking.hidden = false;
        part("thought").textContent += thought;
        part("length").textContent = count(tokens, "token");
      }
      if (content) {
        if (!view.content && !touched) thinking.open = false;
        part("state").textContent = "Thought";
        root.classList.add("writing");
        view.content += content;
        part("content").textContent = view.content;
      }
      cut ||= choice.finish_reason === "length";
      figures();
    },
    finish(note) {
      settle(note ?? (cut ? "cut at the token limit" : ""));
      if (!view.content && !note) view.say(cut ? "It was still thinking when its tokens ran out." : "It ended without an answer.");
    },
    fail(message) { settle(); view.say(capitalised(message)); },
    say(text) { part("problem").textContent = text; part("problem").hidden = false; },
  };
  return view;
}

function setRunning(controller) {
  running = controller;
  sendButton.hidden = Boolean(controller);
  stopButton.hidden = !controller;
  if (!controller && matchMedia("(pointer: fine)").matches) box.focus();
}

function stop() { running?.abort(); }

function clear() {
  stop();
  turns = [];
  log.querySelectorAll("article").forEach((article) => article.remove());
  welcome.hidden = false;
  clearButton.hidden = true;
  box.focus();
}

/** Follow the end of the log, unless the reader has scrolled away from it. */
function scroll(always) {
  const distance = log.scrollHeight - log.scrollTop - log.clientHeight;
  if (always || distance < 120) log.scrollTop = log.scrollHeight;
}

function instance(id) { return byId(id).content.firstElementChild.cloneNode(true); }

function count(number, noun) { return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`; }

function capitalised(text) { return text.charAt(0).toUpperCase() + text.slice(1); }
