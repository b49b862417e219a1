// Code in colours. highlight.js reads it, once the first code is whole, and while nothing else is to be done. Its markup
// is not used: what it finds reaches the page through text nodes, in elements whose classes are those named here.

// Characters of a code, and of a line of it. Some grammars take time that grows with the square of these, or worse: what
// is longer stays in one colour, so that no code holds the page up.
const LONGEST = 12_000,
  LONG_LINE = /[^\n]{250}/;
const PATIENCE = 500; // Milliseconds after which the page does not wait any longer for a quiet moment.
const KINDS = {
  keyword: "keyword",
  literal: "keyword",
  operator: "",
  punctuation: "",
  subst: "",
  built_in: "name",
  title: "name",
  section: "name",
  name: "name",
  "selector-tag": "name",
  type: "type",
  attr: "type",
  attribute: "type",
  property: "type",
  "selector-class": "type",
  "selector-id": "type",
  "template-variable": "type",
  variable: "type",
  string: "string",
  regexp: "string",
  link: "string",
  symbol: "number",
  number: "number",
  comment: "comment",
  doctag: "comment",
  quote: "comment",
  meta: "comment",
  addition: "addition",
  deletion: "deletion",
};

/** What highlight.js tells of a code, as a flat row of nodes: each text has the kind of the innermost that is known. */
class Painter {
  #root = document.createDocumentFragment();
  #kinds = [""];

  addText(text) {
    const kind = this.#kinds.at(-1),
      last = this.#root.lastChild;
    if (last && kind === (last.className ?? "")) (last.firstChild ?? last).appendData(text);
    else this.#root.append(kind ? spanOf(kind, text) : text);
  }

  startScope(scope) {
    const [name] = scope.split(".");
    this.#kinds.push(Object.hasOwn(KINDS, name) ? KINDS[name] : this.#kinds.at(-1));
  }

  endScope() {
    this.#kinds.pop();
  }

  openNode(scope) {
    this.startScope(scope);
  }

  closeNode() {
    this.endScope();
  }

  __addSublanguage(other) {
    this.#root.append(other.toHTML());
  }

  finalize() {}

  /** The nodes, where highlight.js has markup. */
  toHTML() {
    return this.#root;
  }
}

function spanOf(kind, text) {
  const node = document.createElement("span");
  node.className = kind;
  node.append(text);
  return node;
}

const painted = new WeakMap(), // The text of each code that has its colours,
  waiting = new Set(); // and the codes that are to have them.
let library = null;

/** Colour a block of code soon, if its language is known. Nothing is done twice. */
export function colourSoon(block) {
  const code = block.querySelector("code");
  if (waiting.has(block) || painted.get(code) === code.textContent || !isShort(code.textContent)) return;
  if (!waiting.size) quiet(paintNext);
  waiting.add(block);
}

function isShort(text) {
  return text.length <= LONGEST && !LONG_LINE.test(text);
}

function quiet(act) {
  if (globalThis.requestIdleCallback) requestIdleCallback(act, { timeout: PATIENCE });
  else setTimeout(act);
}

async function paintNext() {
  library ??= await load();
  const [block] = waiting;
  waiting.delete(block);
  if (waiting.size) quiet(paintNext);
  if (block.isConnected) paint(block);
}

async function load() {
  const { default: found } = await import("./vendor/highlight.min.js");
  found.configure({ __emitter: Painter });
  return found;
}

function paint(block) {
  const code = block.querySelector("code"),
    language = block.dataset.language,
    text = code.textContent;
  if (!isShort(text) || !library.getLanguage(language)) return;
  const { value } = library.highlight(text, { language, ignoreIllegals: true });
  if (!(value instanceof DocumentFragment)) return; // Its grammar failed: highlight.js gives the text back.
  code.replaceChildren(value);
  painted.set(code, text);
}
