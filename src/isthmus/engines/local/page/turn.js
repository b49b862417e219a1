// One question with its answer, as often as it was tried, on the page.

import { announce, capitalised, copyFrom, count, element, instance } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const NEAR_END = 60; // Pixels from its end within which a growing thought is followed.
const NOTES = {
  cut: "cut at the token limit",
  stopped: "stopped by you",
  writing: "the page was closed while this was written",
};

export class TurnView {
  #actions;
  #index;
  #markdown;
  #thought;
  #touched = false;
  #announced = 0;
  #timer = null;

  /** `actions` has retry(), goOn(), edit(text), select(index), isLast() and isLeftOut(). */
  constructor(turn, actions) {
    this.turn = turn;
    this.#actions = actions;
    this.root = instance("turn");
    this.#listen();
    this.draw();
  }

  get #version() {
    return this.turn.versions[this.#index];
  }

  #part(name) {
    return this.root.querySelector(`.${name}`);
  }

  /** Show the version that counts, from the beginning. */
  draw() {
    this.#show(this.turn.shown);
  }

  /** Show what has come since. `elapsed` is in seconds while the answer is being written, else null. */
  update(elapsed) {
    const { answer } = this.#version,
      busy = elapsed !== null;
    this.root.classList.toggle("busy", busy);
    this.root.classList.toggle("writing", busy && Boolean(answer.content));
    this.#part("answer").setAttribute("aria-busy", String(busy));
    this.#updateThought(answer, elapsed);
    this.#markdown.update(answer.content);
    if (busy) this.#announce(this.#markdown.settled);
    this.#part("figures").textContent = busy ? "" : figures(answer);
    this.#part("figures").title = [answer.model, answer.fingerprint].filter(Boolean).join(", ");
    this.#part("note").textContent = busy ? "" : this.#note(answer);
    if (!busy) this.#settle(answer);
  }

  /** Tell what was not told yet, now that the answer is whole. */
  announceEnd() {
    const { answer } = this.#version;
    this.#announce([...this.#part("content").children]);
    announce([answer.problem, NOTES[answer.state]].filter(Boolean).map(capitalised).join(". "));
  }

  edit() {
    const question = this.#part("question"),
      form = instance("edit"),
      box = form.querySelector("textarea");
    if (question.querySelector("form") || this.root.classList.contains("busy")) return;
    const close = () => {
      form.remove();
      question.classList.remove("editing");
      this.#part("edit").focus();
    };
    const send = () => {
      if (box.value.trim()) {
        close();
        this.#actions.edit(box.value.trim());
      }
    };
    const fit = () => {
      box.style.height = "auto";
      box.style.height = `${box.scrollHeight + 2}px`;
    };
    box.value = this.#version.question;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      send();
    });
    form.querySelector(".cancel").addEventListener("click", close);
    box.addEventListener("input", fit);
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      }
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      send();
    });
    question.classList.add("editing");
    question.append(form);
    fit();
    box.focus();
  }

  #listen() {
    this.#part("edit").addEventListener("click", () => this.edit());
    this.#part("retry").addEventListener("click", () => this.#actions.retry());
    this.#part("go-on").addEventListener("click", () => this.#actions.goOn());
    this.#part("earlier").addEventListener("click", () => this.#select(this.#index - 1));
    this.#part("later").addEventListener("click", () => this.#select(this.#index + 1));
    this.#part("copy").addEventListener("click", (event) =>
      copyFrom(event.currentTarget, this.#version.answer.content),
    );
    this.root.querySelector("summary").addEventListener("click", () => {
      this.#touched = true;
    });
    this.#part("content").addEventListener("click", ({ target }) => {
      if (target.matches(".copy-code")) copyFrom(target, target.closest(".code").querySelector("code").textContent);
      if (target.matches(".to-note")) this.#goToNote(target.dataset.note);
    });
  }

  #goToNote(label) {
    const notes = [...this.#part("content").querySelectorAll(".note-text")];
    const note = notes.find(({ dataset }) => dataset.note === label);
    note?.focus({ preventScroll: true });
    note?.scrollIntoView({ block: "nearest" });
  }

  #select(index) {
    this.#actions.select(index);
    this.#show(index);
    const asked = index < this.turn.versions.length - 1 ? "later" : "earlier";
    if (this.#part("earlier").disabled || this.#part("later").disabled) this.#part(asked).focus();
    announce(`Version ${index + 1} of ${this.turn.versions.length}`);
  }

  #show(index) {
    const { versions } = this.turn;
    this.#index = index;
    this.#touched = false;
    this.#announced = 0;
    this.#part("content").replaceChildren();
    this.#part("thought").replaceChildren();
    this.#markdown = new MarkdownView(this.#part("content"));
    this.#thought = this.#part("thought").appendChild(document.createTextNode(""));
    this.#part("text").textContent = this.#version.question;
    this.#part("versions").hidden = versions.length < 2;
    this.#part("place").textContent = `${index + 1}/${versions.length}`;
    this.#part("earlier").disabled = index === 0;
    this.#part("later").disabled = index === versions.length - 1;
    this.root.querySelector("details").open = !this.#version.answer.content;
    this.update(null);
  }

  #updateThought(answer, elapsed) {
    const details = this.root.querySelector("details"),
      box = this.#part("thought");
    const open = elapsed !== null && !answer.content,
      isFollowed = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_END;
    details.hidden = !answer.thought && !open;
    details.classList.toggle("live", open);
    this.#thought.appendData(answer.thought.slice(this.#thought.length));
    this.#part("state").textContent = open ? "Thinking…" : "Thought";
    const seconds = open ? elapsed : answer.thoughtSeconds;
    const tokens = answer.thoughtTokens && count(answer.thoughtTokens, "token");
    const time = seconds !== null && (open ? duration(seconds) : `for ${duration(seconds)}`);
    this.#part("length").textContent = [time, tokens].filter(Boolean).join(" · ");
    if (open && isFollowed) box.scrollTop = box.scrollHeight;
    if (elapsed !== null && answer.content && !this.#touched) details.open = false;
  }

  #settle(answer) {
    this.#part("problem").textContent = answer.problem ?? "";
    this.#part("problem").hidden = !answer.problem;
    const ways = Object.entries(answer.ways ?? {});
    this.#part("ways").replaceChildren(...ways.map(wayOn));
    this.#part("retry").hidden = ways.length > 0; // The same would fail again.
    this.#part("go-on").hidden = answer.state === "done" || !(answer.content || answer.thought);
    this.#markdown.finish();
    this.#part("copy").hidden = !answer.content;
    this.#part("answer").dataset.state = answer.state;
    this.#countDown(answer);
  }

  #note(answer) {
    const isElsewhere = !this.#actions.isLast() && this.#index !== this.turn.shown;
    const isLeftOut = this.#actions.isLeftOut() && "left out of what is sent";
    return [NOTES[answer.state], isElsewhere && "not part of what follows", isLeftOut].filter(Boolean).join(" · ");
  }

  /** Hold the retry back for as long as the server asked. */
  #countDown(answer) {
    const button = this.#part("retry");
    clearInterval(this.#timer);
    const tick = () => {
      const rest = Math.ceil(((answer.retryAt ?? 0) - performance.now()) / 1000);
      button.disabled = rest > 0;
      button.textContent = rest > 0 ? `Try again in ${rest} s` : "Try again";
      if (rest <= 0) clearInterval(this.#timer);
    };
    this.#timer = setInterval(tick, 250);
    tick();
  }

  #announce(nodes) {
    for (const node of nodes.slice(this.#announced)) announce(spoken(node));
    this.#announced = Math.max(this.#announced, nodes.length);
  }
}

function wayOn([label, act]) {
  const button = element("button", "quiet", label);
  button.type = "button";
  button.addEventListener("click", act);
  return button;
}

/** The text of a block without its buttons, and with formulas as they were written. */
function spoken(node) {
  const copy = (node.matches(".code") ? node.querySelector("pre") : node).cloneNode(true);
  for (const formula of copy.querySelectorAll("math")) formula.replaceWith(formula.getAttribute("alttext"));
  return copy.textContent;
}

function figures({ usage, seconds, firstSeconds }) {
  if (!usage) return "";
  const speed = seconds > 0 && usage.completion > 1 ? `${perSecond((usage.completion - 1) / seconds)} tokens/s` : "";
  const first = firstSeconds === null ? "" : `first after ${duration(firstSeconds)}`;
  return [`${count(usage.prompt, "token")} in, ${usage.completion.toLocaleString("en")} out`, speed, first]
    .filter(Boolean)
    .join(" · ");
}

function perSecond(number) {
  return number < 10 ? number.toFixed(1) : Math.round(number).toLocaleString("en");
}

function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  return seconds < 60 ? `${Math.round(seconds)} s` : `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
}
