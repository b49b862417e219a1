// A chat completion as it streams in: server-sent events over fetch, and what can go wrong on the way.

export const SILENT = "The server does not answer. Is it still running?",
  BROKEN = "The connection broke off.";

/**
 * An answer that could not be had, or not to its end. `code` is the server's word for the reason, `retryAfter` is in
 * seconds where the server named them.
 */
export class Failure extends Error {
  constructor(message, { status = null, code = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

/** Text of an event stream in, the data of its events out, wherever the text was cut. */
export class EventParser {
  #rest = "";
  #data = [];

  push(text) {
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/),
      events = [];
    this.#rest = lines.pop();
    for (const line of lines) {
      if (!line && this.#data.length) events.push(this.#data.splice(0).join("\n"));
      else if (line === "data" || line.startsWith("data:")) this.#data.push(line.slice(5).replace(/^ /, ""));
    }
    return events;
  }
}

/** The chunks of a streamed chat completion. Raises Failure, or AbortError once `signal` is aborted. */
export async function* complete(request, headers, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const options = { method: "POST", headers: { "Content-Type": "application/json", ...headers }, body, signal };
  const answer = await fetch("v1/chat/completions", options).catch((error) => {
    throw unlessAborted(error, signal, SILENT);
  });
  if (!answer.ok) throw await refusal(answer);
  for await (const data of events(answer.body, signal)) {
    const chunk = parsed(data);
    if (chunk.error) throw new Failure(chunk.error.message ?? "The server failed.");
    yield chunk;
  }
}

async function* events(body, signal) {
  const reader = body.getReader(),
    decoder = new TextDecoder(),
    parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw unlessAborted(error, signal, BROKEN);
      });
      for (const data of parser.push(done ? `${decoder.decode()}\n\n` : decoder.decode(value, { stream: true }))) {
        if (data === "[DONE]") return;
        yield data;
      }
      if (done) throw new Failure(BROKEN);
    }
  } finally {
    reader.cancel().catch(() => {}); // A stream that broke repeats its error here; it is told already.
  }
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Failure("The server sent something that is not JSON.");
  }
}

async function refusal(answer) {
  const content = await answer.json().catch(() => null);
  const message = content?.error?.message ?? `The server failed (${answer.status}).`;
  const retryAfter = seconds(answer.headers.get("Retry-After"));
  return new Failure(message, { status: answer.status, code: content?.error?.code ?? null, retryAfter });
}

/** Retry-After in seconds: a number, or a date from now on. */
function seconds(text) {
  if (!text) return null;
  const delay = /^\d+$/.test(text.trim()) ? Number(text) : Math.ceil((Date.parse(text) - Date.now()) / 1000);
  return Number.isFinite(delay) ? Math.max(0, delay) : null;
}

function unlessAborted(error, signal, message) {
  return signal?.aborted ? error : new Failure(message);
}
