// Markdown as DOM nodes. markdown-it reads it; what a model wrote reaches the page through text nodes alone.
// The elements and attributes are those named here and in maths.js, and a link keeps its address only if its scheme is
// one of SCHEMES. HTML stays text, an image becomes a link, and a line break stays a line break.

/* global markdownit, markdownitFootnote */

import { colourSoon } from "./colours.js";
import { fenceNode, isMaths, maths, mathsNode } from "./maths.js";

const SCHEMES = new Set(["http:", "https:", "mailto:"]);
const DEEPEST = 16, // Blocks within blocks below this are text,
  DEEPEST_MARK = 40; // and marks within marks below this are not marked.
const LONGEST_SEARCH = 4_000_000; // Characters of one text that are searched in vain for the end of a label.
const NOTE = /\[\^([^\]\s]{1,80})\]/g;
const BREAK = /<br ?\/?>/i;
const CJK = /[\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]/;
const ELEMENTS = {
  paragraph_open: "p",
  blockquote_open: "blockquote",
  bullet_list_open: "ul",
  ordered_list_open: "ol",
  list_item_open: "li",
  thead_open: "thead",
  tbody_open: "tbody",
  tr_open: "tr",
  th_open: "th",
  td_open: "td",
  em_open: "em",
  strong_open: "strong",
  s_open: "del",
  hr: "hr",
  hardbreak: "br",
  softbreak: "br",
  footnote_reference_open: "div",
};
const SIDES = { "text-align:right": "right", "text-align:center": "centre" };
const HEADINGS = { h1: "h3", h2: "h4", h3: "h5" }; // The page's own headings stand above those of an answer.

const markdown = markdownit({ breaks: true, linkify: true }).use(maths).use(footnotes);
// A text that grows must not turn into a heading or into code, nor vanish into a definition.
markdown.disable(["lheading", "code", "reference"]);
// A note keeps its mark and its place, so that nothing is numbered or moved anew while an answer grows.
markdown.disable(["footnote_tail", "footnote_inline"]);
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
markdown.linkify.pretest = (text) => /https?:|mailto:/i.test(text);
markdown.validateLink = (text) => safeAddress(text) !== null;
markdown.normalizeLink = (text) => safeAddress(text) ?? text;
markdown.normalizeLinkText = (text) => text;
markdown.helpers.parseLinkLabel = labelEnd(markdown.helpers.parseLinkLabel);
markdown.block.ruler.before("table", "deepest", textBelowDeepest);
markdown.block.ruler.before("list", "shallow", acceptShallowItems);
markdown.inline.State = class extends markdown.inline.State {
  /** 3*4*5 and 2**n are no emphasis, and a mark within Chinese text is one whatever signs stand beside it. */
  scanDelims(start, canSplitWord) {
    const found = super.scanDelims(start, canSplitWord);
    if (this.src[start] !== "*") return found;
    const before = this.src[start - 1] ?? " ",
      after = this.src[start + found.length] ?? " ";
    if ((found.length > 1 ? /[0-9)]/ : /[A-Za-z0-9)\]]/).test(before)) found.can_open = false;
    else found.can_open ||= CJK.test(before) && !/\s/.test(after);
    found.can_close ||= CJK.test(after) && !/\s/.test(before);
    return found;
  }
};

/** The address if a reader may follow it, else null. */
export function safeAddress(text) {
  let url;
  try {
    url = new URL(text.trim());
  } catch {
    return null;
  }
  return SCHEMES.has(url.protocol) ? url.href : null;
}

/** All of a text, as nodes. */
export function render(text) {
  const root = document.createDocumentFragment(),
    notes = new Set();
  blocksOf(text, notes);
  for (const block of blocksOf(text, notes)) build(root, block.tokens);
  return root;
}

/** An element that shows a growing text: what did not change keeps its nodes, and what is settled is not read again. */
export class MarkdownView {
  #root;
  #blocks = [];
  #settled = ""; // The text whose blocks cannot change any more,
  #count = 0; // and how many those are.
  #notes = new Set(); // The marks of the notes that were found.

  constructor(root) {
    this.#root = root;
  }

  /** The nodes of the blocks that nothing can be added to while more text comes. */
  get settled() {
    return [...this.#root.children].slice(0, -1);
  }

  update(text) {
    const whole = text.replaceAll(/\r\n?/g, "\n");
    if (!whole.startsWith(this.#settled)) [this.#settled, this.#count] = ["", 0];
    let rest = whole.slice(this.#settled.length);
    const known = new Set(this.#notes);
    let blocks = blocksOf(rest, this.#notes);
    if ([...this.#notes].some((mark) => !known.has(mark) && whole.includes(`[^${mark.slice(1)}]`))) {
      // What stands already may refer to a note that is known only now.
      [this.#settled, this.#count, rest] = ["", 0, whole];
      blocks = blocksOf(rest, this.#notes);
    }
    const kept = this.#blocks.slice(0, this.#count);
    reconcile(this.#root, this.#blocks.slice(this.#count), blocks, this.#count);
    this.#blocks = [...kept, ...blocks];
    if (blocks.length < 3) return;
    // The last line may still make one block of the last two.
    const lines = rest.split("\n", blocks.at(-2).first);
    this.#settled += lines.map((line) => `${line}\n`).join("");
    this.#count += blocks.length - 2;
  }

  /** Nothing will come any more: code that does not end has its colours too. */
  finish() {
    this.#root.querySelectorAll(".code").forEach(colourSoon);
  }
}

/** Make the children of a node from `from` on those of the parts, where `before` are the parts they show now. */
function reconcile(root, before, parts, from = 0) {
  parts.forEach((part, place) => {
    const node = root.children[from + place],
      [old, opening] = [before[place], part.tokens[0]];
    if (!node) build(root, part.tokens);
    else if (continues(old.tokens[0], opening))
      grow(node, code(old.tokens[0]), opening);
    else if (old.key !== part.key && isSameList(old.tokens[0], opening)) reconcile(node, itemsOf(old), itemsOf(part));
    else if (old.key !== part.key) node.replaceWith(built(part.tokens));
  });
  while (root.children.length > from + parts.length) root.lastElementChild.remove();
}

/** More of a code. What has its colours already loses them until they are found anew. */
function grow(block, before, token) {
  const node = block.querySelector("code"),
    more = code(token).slice(before.length);
  if (more && node.childNodes.length === 1 && node.firstChild instanceof Text) node.firstChild.appendData(more);
  else if (more) node.textContent = code(token);
  if (isClosed(token)) colourSoon(block);
}

function continues(before, token) {
  const isFence = before.type === "fence" && token.type === "fence" && !isMaths(token);
  return isFence && before.info === token.info && code(token).startsWith(code(before));
}

function isSameList(before, token) {
  return token.type.endsWith("list_open") && before.type === token.type && start(before) === start(token);
}

function code(token) {
  return token.content.replace(/\n$/, "");
}

/** Whether a code has the line that ends it. */
function isClosed({ map: [first, end], content }) {
  return (!content || content.endsWith("\n")) && end - first === content.split("\n").length + 1;
}

function start(list) {
  return list.attrGet("start");
}

/** The blocks of a text. The marks of the notes in it are added to `notes`: a reference is one only to a note in them. */
function blocksOf(text, notes) {
  const tokens = [],
    environment = {};
  markdown.block.parse(text, markdown, environment, tokens);
  Object.keys(environment.footnotes?.refs ?? {}).forEach((mark) => notes.add(mark));
  tokens.forEach((token) => {
    if (token.type === "inline") token.meta = { notes };
  });
  return partsOf(tokens, text, 0);
}

function itemsOf({ tokens, source, first }) {
  return partsOf(tokens.slice(1, -1), source, first);
}

/** The outermost blocks or items among tokens: {first, source, key, tokens}. The text begins at line `from`. */
function partsOf(tokens, text, from) {
  const lines = text.split("\n"),
    parts = [];
  let opened = 0;
  tokens.forEach((token, place) => {
    if (token.level > tokens[0].level || token.nesting > 0) return;
    const own = tokens.slice(opened, place + 1),
      [first, end] = own[0].map,
      source = lines.slice(first - from, end - from).join("\n");
    // A paragraph of a list is hidden or not by what comes after its item.
    const key = [token.type, own.filter(({ hidden }) => hidden).length, referred(own), source].join("\n");
    parts.push({ first, source, key, tokens: own });
    opened = place + 1;
  });
  return parts;
}

/** The notes that a block refers to. */
function referred(tokens) {
  return tokens
    .filter(({ type }) => type === "inline")
    .flatMap(notesOf)
    .join();
}

/** The marks of the notes that a text refers to, each with a colon before it, as the plug-in keeps them. */
function notesOf({ content, meta }) {
  const marks = meta?.notes.size ? [...content.matchAll(NOTE)].map(([, label]) => `:${label}`) : [];
  return marks.filter((mark) => meta.notes.has(mark));
}

// Rules

/** Where the label of a link ends, or -1: not searched for where no bracket closes, nor once too much was searched in vain. */
function labelEnd(search) {
  return (state, start, ...more) => {
    state.lastClosing ??= state.src.lastIndexOf("]");
    state.searched ??= 0;
    if (start > state.lastClosing || state.searched > LONGEST_SEARCH) return -1;
    const end = search(state, start, ...more);
    if (end < 0) state.searched += state.posMax - start;
    return end;
  };
}

/** The plug-in for notes, which does not say on which lines a note stands. */
function footnotes(markdown) {
  const { ruler } = markdown.block;
  const before = (place, name, rule, options) => ruler.before(place, name, withLines(rule), options);
  markdownitFootnote(Object.create(markdown, { block: { value: { ruler: { before } } } }));
}

function withLines(rule) {
  return (state, first, end, silent) => {
    const place = state.tokens.length;
    if (!rule(state, first, end, silent)) return false;
    if (!silent) state.tokens[place].map = [first, state.line];
    return true;
  };
}

/** What is nested too deep is a paragraph with all that is left; markdown-it would leave it out. */
function textBelowDeepest(state, first, end) {
  if (state.level < DEEPEST) return false;
  const map = [first, end];
  Object.assign(state.push("paragraph_open", "p", 1), { map });
  const content = state.getLines(first, end, state.blkIndent, false).trim();
  Object.assign(state.push("inline", "", 0), { map, content, children: [] });
  state.push("paragraph_close", "p", -1);
  state.line = end;
  return true;
}

/** A list two spaces below a number belongs to it, as models mean it: move it in to where CommonMark wants it. */
function acceptShallowItems(state, first, end) {
  const marker = /^\d{1,9}[.)] /.exec(state.src.slice(state.bMarks[first] + state.tShift[first], state.eMarks[first]));
  const base = state.sCount[first];
  for (let line = first + 1; marker && line < end; line += 1) {
    const indent = state.sCount[line] - base;
    if (indent >= 2) state.sCount[line] = Math.max(state.sCount[line], base + marker[0].length);
    else if (!state.isEmpty(line) && !/^ *\d/.test(state.src.slice(state.bMarks[line], state.eMarks[line]))) break;
  }
  return false;
}

// Nodes

/** Append what a flat list of tokens stands for. */
function build(root, tokens) {
  const outer = [];
  let parent = root;
  tokens.forEach((token, place) => {
    if (token.nesting < 0) {
      parent = outer.pop();
      return;
    }
    const isLeftOut = token.hidden || (token.nesting > 0 && outer.length > DEEPEST_MARK);
    const node = isLeftOut ? parent : append(parent, token);
    if (token.type === "list_item_open" && isTask(tokens[place + 2])) node.className = "task";
    if (token.nesting > 0) {
      outer.push(parent);
      parent = node;
    }
  });
}

/** Append what one token stands for; the element into which what it opens goes. */
function append(parent, token) {
  const node = nodeOf(token, parent);
  parent.append(node);
  return token.type === "table_open" ? node.firstElementChild : node;
}

function nodeOf(token, parent) {
  const { type, content } = token;
  switch (type) {
    case "inline":
      return built(inlineOf(token));
    case "text":
      return broken(content);
    case "code_inline":
      return made("code", content);
    case "fence":
      return isMaths(token) && isClosed(token) ? fenceNode(token) : codeNode(token);
    case "maths":
      return mathsNode(token);
    case "footnote_reference_open":
      return noteNode(token.meta.label);
    case "footnote_ref":
      return made("sup", referenceNode(token.meta.label));
    case "heading_open":
      return made(HEADINGS[token.tag] ?? "h6");
    case "table_open":
      return tableNode();
    case "link_open":
      return anchor(token.attrGet("href"));
    case "image":
      return parent.closest?.("a") ? content : anchor(token.attrGet("src"), content);
    default:
      return plainNode(token);
  }
}

function inlineOf({ content, meta }) {
  const refs = Object.fromEntries(notesOf({ content, meta }).map((mark) => [mark, -1]));
  return markdown.parseInline(content, Object.keys(refs).length ? { footnotes: { refs } } : {})[0].children;
}

function built(tokens) {
  const root = document.createDocumentFragment();
  build(root, tokens);
  return root;
}

function made(tag, ...content) {
  const node = document.createElement(tag);
  node.append(...content);
  return node;
}

/** A text in which a tag may break the line. */
function broken(text) {
  const root = document.createDocumentFragment();
  text.split(BREAK).forEach((line, place) => root.append(...(place ? [made("br"), line] : [line])));
  return root;
}

function plainNode(token) {
  const node = made(ELEMENTS[token.type]),
    side = token.attrGet("style");
  if (start(token)) node.start = start(token);
  if (node.tagName === "TH") node.scope = "col";
  if (SIDES[side]) node.className = SIDES[side];
  return node;
}

/** Whether an item begins with a box; the box becomes a sign. */
function isTask(token) {
  if (token?.type !== "inline") return false;
  token.content = token.content.replace(/^\[([ xX])\] /, (_, mark) => (mark === " " ? "☐ " : "☑ "));
  return /^[☐☑] /.test(token.content);
}

/** A note, with its mark before it. */
function noteNode(label) {
  const mark = made("span", label),
    root = made("div", mark);
  mark.className = "mark-of-note";
  root.className = "note-text";
  root.dataset.note = label;
  root.tabIndex = -1;
  return root;
}

/** The mark of a note in a text. The page goes to the note on a click: an address of its own it has none. */
function referenceNode(label) {
  const node = made("button", label);
  node.type = "button";
  node.className = "to-note";
  node.dataset.note = label;
  node.setAttribute("aria-label", `Note ${label}`);
  return node;
}

function codeNode(token) {
  const button = made("button", "Copy"),
    [language] = token.info.trim().split(/\s/, 1),
    bar = made("div", made("span", language || "text"), button),
    root = made("div", bar, reachable(made("pre", made("code", code(token))), "Code"));
  button.type = "button";
  button.className = "copy-code";
  bar.className = "bar";
  root.className = "code";
  root.dataset.language = language.toLowerCase();
  if (token.map && isClosed(token)) colourSoon(root);
  return root;
}

function tableNode() {
  const root = reachable(made("div", made("table")), "Table");
  root.className = "table";
  return root;
}

/** A node that scrolls, and that a keyboard can therefore reach. */
function reachable(node, label) {
  node.tabIndex = 0;
  node.setAttribute("aria-label", label);
  node.setAttribute("role", "group");
  return node;
}

function anchor(address, label = "") {
  const node = made("a", label);
  node.href = address;
  node.title = address;
  node.rel = "noopener noreferrer nofollow";
  node.target = "_blank";
  return node;
}
