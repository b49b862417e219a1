// Conversations in the browser, one entry each, so that a damaged one costs no other.
//
// A conversation is {version, id, title, named, created, updated, from, turns}. A turn is {versions, shown}: what was
// asked and answered, as often as it was tried, and which one counts. The turns before `from` are not sent any more.
// Times are milliseconds since 1970.

export const VERSION = 1;
const PREFIX = "isthmus.conversation.";
const SAFE_ID = /^[A-Za-z0-9]{1,64}$/; // What newConversation() makes: it stands in an address.
const STATES = new Set(["writing", "done", "cut", "stopped", "failed"]);

/** The browser refused to keep something. */
export class NotKept extends Error {
  constructor(error) {
    super(
      error.name === "QuotaExceededError"
        ? "This browser's storage is full"
        : "This browser stores nothing for this page",
    );
  }
}

/** A storage area of the browser, or null where it is switched off. */
export function area(name) {
  try {
    return globalThis[name];
  } catch {
    return null;
  }
}

export class Store {
  #area;
  #unkept = new Map(); // Conversations that the browser refused: they last as long as the page.

  constructor(storage) {
    this.#area = storage;
  }

  /** All conversations, the latest first, and the keys of entries that cannot be read. */
  all() {
    const found = new Map(),
      damaged = [];
    for (const key of this.#keys()) {
      const conversation = read(this.#area.getItem(key));
      if (conversation && PREFIX + conversation.id === key) found.set(conversation.id, conversation);
      else damaged.push(key);
    }
    const conversations = [...new Map([...found, ...this.#unkept]).values()];
    return { conversations: conversations.sort((a, b) => b.updated - a.updated), damaged };
  }

  /** One conversation, or null. */
  load(id) {
    return this.#unkept.get(id) ?? read(this.#area?.getItem(PREFIX + id) ?? null);
  }

  /** Raises NotKept; what was stored before is then still there. */
  save(conversation) {
    this.#unkept.set(conversation.id, conversation);
    if (!this.#area) throw new NotKept(new Error());
    try {
      this.#area.setItem(PREFIX + conversation.id, JSON.stringify(clean(conversation)));
    } catch (error) {
      throw new NotKept(error);
    }
    this.#unkept.delete(conversation.id);
  }

  remove(id) {
    this.#unkept.delete(id);
    this.#area?.removeItem(PREFIX + id);
  }

  /**
   * Take in what was exported: the text of a list of conversations, or of one. Returns how many were taken, how many
   * were here already, at least as new, and how many cannot be read. Raises SyntaxError for a text that is no JSON, and
   * NotKept once the browser refuses one.
   */
  take(text) {
    const found = JSON.parse(text),
      count = { taken: 0, known: 0, unreadable: 0 };
    for (const one of Array.isArray(found) ? found : [found]) {
      const conversation = cleaned(one);
      const isGood = conversation && SAFE_ID.test(conversation.id);
      const stored = isGood && this.load(conversation.id);
      if (!isGood) count.unreadable += 1;
      else if (stored && stored.updated >= conversation.updated) count.known += 1;
      else {
        this.save(conversation);
        count.taken += 1;
      }
    }
    return count;
  }

  /** What stands under the given keys, as text. */
  raw(keys) {
    return keys.map((key) => this.#area.getItem(key)).join("\n");
  }

  drop(keys) {
    keys.forEach((key) => this.#area.removeItem(key));
  }

  #keys() {
    if (!this.#area) return [];
    return Array.from({ length: this.#area.length }, (_, place) => this.#area.key(place)).filter((key) =>
      key.startsWith(PREFIX),
    );
  }
}

/** Whether a key of the storage is a conversation's. */
export function isConversation(key) {
  return key === null || key.startsWith(PREFIX);
}

export function newConversation() {
  const now = Date.now(),
    id = Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => byte.toString(36)).join("");
  return { version: VERSION, id, title: "New chat", named: false, created: now, updated: now, from: 0, turns: [] };
}

export function newAnswer() {
  return {
    state: "writing",
    thought: "",
    content: "",
    problem: null,
    thoughtSeconds: null,
    thoughtTokens: 0,
    firstSeconds: null,
    seconds: null,
    usage: null,
    model: null,
    fingerprint: null,
  };
}

/** The version of a turn that counts. */
export function current(turn) {
  return turn.versions[turn.shown];
}

/** A conversation as a text to keep. */
export function asMarkdown(conversation) {
  const turns = conversation.turns.map((turn) => {
    const { question, answer } = current(turn);
    const thought = answer.thought ? `> Thought:\n${answer.thought.replace(/^/gm, "> ")}\n\n` : "";
    const source = [answer.model, answer.fingerprint].filter(Boolean).join(", ");
    const sign = source ? `\n\n*${source}${answer.state === "done" ? "" : `, ${answer.state}`}*` : "";
    return `## You\n\n${question}\n\n## Answer\n\n${thought}${answer.content}${sign}\n`;
  });
  return [`# ${conversation.title}\n`, ...turns].join("\n");
}

/** A stored text as a conversation with the known fields alone, or null if it is none. */
function read(text) {
  try {
    return clean(JSON.parse(text));
  } catch {
    return null;
  }
}

function cleaned(found) {
  try {
    return clean(found);
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    return null;
  }
}

function clean(found) {
  expect(found?.version === VERSION && Array.isArray(found.turns));
  const { version, id, title, named, created, updated } = found;
  expect([id, title].every(isText) && [created, updated].every(Number.isFinite));
  const from = Number.isInteger(found.from) ? Math.min(Math.max(found.from, 0), found.turns.length) : 0;
  return { version, id, title, named: Boolean(named), created, updated, from, turns: found.turns.map(cleanTurn) };
}

function cleanTurn({ versions, shown }) {
  expect(Array.isArray(versions) && Number.isInteger(shown) && shown >= 0 && shown < versions.length);
  return {
    versions: versions.map(({ question, answer }) => {
      expect(isText(question));
      return { question, answer: cleanAnswer(answer) };
    }),
    shown,
  };
}

function cleanAnswer(found) {
  const { state, thought, content, problem, usage } = found;
  expect(STATES.has(state) && [thought, content].every(isText) && (problem === null || isText(problem)));
  const number = (name) => (Number.isFinite(found[name]) ? found[name] : null);
  const text = (name) => (isText(found[name]) ? found[name] : null);
  const counted = usage && [usage.prompt, usage.completion].every(Number.isFinite);
  return {
    state,
    thought,
    content,
    problem,
    thoughtSeconds: number("thoughtSeconds"),
    thoughtTokens: number("thoughtTokens") ?? 0,
    firstSeconds: number("firstSeconds"),
    seconds: number("seconds"),
    usage: counted ? { prompt: usage.prompt, completion: usage.completion } : null,
    model: text("model"),
    fingerprint: text("fingerprint"),
  };
}

function isText(value) {
  return typeof value === "string";
}

function expect(holds) {
  if (!holds) throw new TypeError("not a conversation of this version");
}
