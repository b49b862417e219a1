// An answer on its way: what the chunks say, how long things took, and how it ended.

import { capitalised } from "./dom.js";
import { current } from "./store.js";

const KEEP_EVERY = 2000,
  TICK = 250; // Milliseconds.

export class Job {
  #controller = new AbortController();
  #began = performance.now();
  #first = null;
  #before;
  #kept = performance.now();
  #frame = 0;
  #ticking;
  #actions;

  /**
   * The answer goes into the version of `turn` that counts, after what it has already if it goes on. If it `shortens`,
   * earlier turns may be left out until the rest fits. `actions` has draw(job) and keep(conversation).
   */
  constructor(conversation, turn, actions, { goesOn = false, shortens = false } = {}) {
    this.conversation = conversation;
    this.turn = turn;
    this.answer = current(turn).answer;
    Object.assign(this, { goesOn, shortens });
    this.#before = { ...this.answer };
    Object.assign(this.answer, { state: "writing", problem: null, ways: {} });
    this.discarded = false; // Nobody wants it stored any more.
    this.#actions = actions;
    this.#ticking = setInterval(() => actions.draw(this), TICK);
  }

  get signal() {
    return this.#controller.signal;
  }

  /** Seconds since it was asked for. */
  get elapsed() {
    return (performance.now() - this.#began) / 1000;
  }

  abort() {
    this.#controller.abort();
  }

  take(chunk) {
    const { answer } = this,
      choice = chunk.choices?.[0],
      delta = choice?.delta ?? {};
    const thought = delta.reasoning_content ?? "",
      content = delta.content ?? "";
    if (chunk.usage) answer.usage = this.#counted(chunk.usage);
    answer.model = chunk.model ?? answer.model;
    answer.fingerprint = chunk.system_fingerprint ?? answer.fingerprint;
    if (thought || content) this.#measure(thought);
    answer.thought += thought;
    answer.content += content;
    if (choice?.finish_reason) answer.state = choice.finish_reason === "length" ? "cut" : "done";
    this.#show();
  }

  /** The prompt of an answer that goes on holds what it had: that counts once. */
  #counted({ prompt_tokens: prompt, completion_tokens: completion }) {
    const before = this.#before.usage;
    return { prompt: before?.prompt ?? prompt, completion: (before?.completion ?? 0) + completion };
  }

  #measure(thought) {
    const { answer } = this,
      now = performance.now();
    this.#first ??= now;
    answer.firstSeconds = this.#before.firstSeconds ?? (this.#first - this.#began) / 1000;
    answer.seconds = (this.#before.seconds ?? 0) + (now - this.#first) / 1000;
    if (thought) answer.thoughtTokens += 1;
    if (thought || !answer.content) answer.thoughtSeconds = (this.#before.thoughtSeconds ?? 0) + this.elapsed;
  }

  #show() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#actions.draw(this);
    });
    if (this.discarded || performance.now() - this.#kept < KEEP_EVERY) return;
    this.#kept = performance.now();
    this.#actions.keep(this.conversation);
  }

  /** Take in how it ended: null, or what went wrong. */
  finish(error) {
    const { answer } = this;
    clearInterval(this.#ticking);
    cancelAnimationFrame(this.#frame);
    if (this.signal.aborted) answer.state = "stopped";
    else if (answer.state === "writing") answer.state = error ? "failed" : "done";
    if (answer.state === "failed") answer.problem = capitalised(error.message);
    if (answer.state === "failed" && this.goesOn) answer.state = this.#before.state;
    if (error?.retryAfter) answer.retryAt = performance.now() + error.retryAfter * 1000;
    if (!answer.content && answer.state === "done") answer.problem = "It ended without an answer.";
    if (!answer.content && answer.state === "cut") answer.problem = "It was still thinking when its tokens ran out.";
  }
}
