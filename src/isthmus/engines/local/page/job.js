// An answer on its way: what the chunks say, how long things took, and how it ended.

import { capitalised } from "./dom.js";
import { current } from "./store.js";

const KEEP_EVERY = 2000,
  TICK = 250; // Milliseconds.

export class Job {
  #controller = new AbortController();
  #began = performance.now();
  #first = null;
  #kept = performance.now();
  #frame = 0;
  #ticking;
  #actions;

  /** The answer goes into the version of `turn` that counts. `actions` has draw(job) and keep(conversation). */
  constructor(conversation, turn, actions) {
    this.conversation = conversation;
    this.turn = turn;
    this.answer = current(turn).answer;
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
    if (chunk.usage) answer.usage = { prompt: chunk.usage.prompt_tokens, completion: chunk.usage.completion_tokens };
    answer.model = chunk.model ?? answer.model;
    answer.fingerprint = chunk.system_fingerprint ?? answer.fingerprint;
    if (thought || content) this.#measure(thought);
    answer.thought += thought;
    answer.content += content;
    if (choice?.finish_reason) answer.state = choice.finish_reason === "length" ? "cut" : "done";
    this.#show();
  }

  #measure(thought) {
    const { answer } = this,
      now = performance.now();
    this.#first ??= now;
    answer.firstSeconds = (this.#first - this.#began) / 1000;
    answer.seconds = (now - this.#first) / 1000;
    if (thought) answer.thoughtTokens += 1;
    if (thought || !answer.content) answer.thoughtSeconds = (now - this.#began) / 1000;
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
    if (error?.retryAfter) answer.retryAt = performance.now() + error.retryAfter * 1000;
    if (!answer.content && answer.state === "done") answer.problem = "It ended without an answer.";
    if (!answer.content && answer.state === "cut") answer.problem = "It was still thinking when its tokens ran out.";
  }
}
