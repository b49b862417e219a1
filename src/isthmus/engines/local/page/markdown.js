// Markdown as DOM nodes. What a model wrote reaches the page through text nodes alone: the elements are those named
// here, their attributes come from this file, and a link keeps its address only if its scheme is one of SCHEMES.
// Formulas stay text, HTML stays text, an image becomes a link, and a line break stays a line break.

const SCHEMES = new Set(["http:", "https:", "mailto:"]);
const DEEPEST = 8; // Blocks within blocks and marks within marks below this are text.
const LONGEST_LABEL = 1000,
  LONGEST_ADDRESS = 2000; // Characters; they keep the search for an end short.
const HEADINGS = ["h3", "h4", "h5", "h6", "h6", "h6"]; // The page's own headings stand above those of an answer.

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/,
  HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/,
  QUOTE = /^ {0,3}> ?/;
const FORMULA = /^ {0,3}(\$\$|\\\[)/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/,
  ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const MARKS = /[\\`$*_~[!<h\n]/,
  PUNCTUATION = /[!-/:-@[-`{-~]/,
  WORD = /[A-Za-z0-9]/,
  SPACE = /\s/;

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
  const root = document.createDocumentFragment();
  root.append(...parseBlocks(lines(text)).map(blockNode));
  return root;
}

/** An element that shows a growing text: blocks that did not change keep their nodes. */
export class MarkdownView {
  #root;
  #blocks = [];

  constructor(root) {
    this.#root = root;
  }

  /** The nodes of the blocks that nothing can be added to while more text comes. */
  get settled() {
    return [...this.#root.children].slice(0, -1);
  }

  update(text) {
    const blocks = parseBlocks(lines(text));
    blocks.forEach((block, place) => this.#put(block, place));
    while (this.#root.children.length > blocks.length) this.#root.lastElementChild.remove();
    this.#blocks = blocks;
  }

  #put(block, place) {
    const before = this.#blocks[place],
      node = this.#root.children[place];
    if (before?.kind === block.kind && before.source === block.source) return;
    if (!node) this.#root.append(blockNode(block));
    else if (continues(before, block))
      node.querySelector("code").firstChild.appendData(block.text.slice(before.text.length));
    else node.replaceWith(blockNode(block));
  }
}

function continues(before, block) {
  return (
    before?.kind === "code" &&
    block.kind === "code" &&
    before.language === block.language &&
    block.text.startsWith(before.text)
  );
}

function lines(text) {
  return text.split(/\r\n|\r|\n/).map((line) => line.replace(/^[ \t]+/, (space) => space.replaceAll("\t", "    ")));
}

// Blocks: {kind, source, ...}

function parseBlocks(all, depth = 0) {
  if (depth > DEEPEST) return [{ kind: "text", text: all.join("\n") }];
  const blocks = [];
  let at = 0;
  while (at < all.length) {
    if (!all[at].trim()) {
      at += 1;
      continue;
    }
    const [block, end] = parseBlock(all, at, depth);
    blocks.push({ ...block, source: all.slice(at, end).join("\n") });
    at = end;
  }
  return blocks;
}

function parseBlock(all, at, depth) {
  const line = all[at];
  if (FENCE.test(line)) return parseCode(all, at);
  if (HEADING.test(line)) return [parseHeading(line), at + 1];
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  if (QUOTE.test(line)) return parseQuote(all, at, depth);
  if (ITEM.test(line)) return parseList(all, at, depth);
  if (startsTable(all, at)) return parseTable(all, at);
  return parseFormula(all, at) ?? parseParagraph(all, at);
}

function parseCode(all, at) {
  const [, fence, info] = FENCE.exec(all[at]),
    indent = all[at].search(/\S/);
  const closes = (line) => {
    const text = line.trim();
    return text.length >= fence.length && text === fence[0].repeat(text.length) && line.search(/\S/) < 4;
  };
  let end = at + 1;
  while (end < all.length && !closes(all[end])) end += 1;
  const text = all
    .slice(at + 1, end)
    .map((line) => dedent(line, indent))
    .join("\n");
  return [{ kind: "code", language: info.trim().split(/\s/, 1)[0], text }, Math.min(end + 1, all.length)];
}

function parseHeading(line) {
  const level = HEADING.exec(line)[1].length;
  const text = line.trim().slice(level).trim();
  let end = text.length;
  while (text[end - 1] === "#") end -= 1;
  const isClosed = end === 0 || SPACE.test(text[end - 1]);
  return { kind: "heading", level, text: isClosed ? text.slice(0, end).trimEnd() : text };
}

function parseQuote(all, at, depth) {
  let end = at;
  while (end < all.length && QUOTE.test(all[end])) end += 1;
  return [
    {
      kind: "quote",
      blocks: parseBlocks(
        all.slice(at, end).map((line) => line.replace(QUOTE, "")),
        depth + 1,
      ),
    },
    end,
  ];
}

function parseList(all, at, depth) {
  const first = ITEM.exec(all[at]),
    base = first[1].length,
    ordered = isOrdered(first);
  const isNext = (match) => match?.[2].at(-1) === first[2].at(-1) && match[1].length <= base + 1;
  const items = [];
  let end = at,
    loose = false;
  while (end < all.length) {
    const match = ITEM.exec(all[end]);
    if (!isNext(match) || RULE.test(all[end])) break;
    const [content, next] = itemLines(all, end, match);
    items.push(parseBlocks(content, depth + 1));
    let following = next;
    while (following < all.length && !all[following].trim()) following += 1;
    const goesOn = following < all.length && isNext(ITEM.exec(all[following]));
    loose ||=
      content.some((line, place) => !line.trim() && place && place < content.length - 1) ||
      (goesOn && following > next);
    end = goesOn ? following : next;
  }
  while (end > at + 1 && !all[end - 1].trim()) end -= 1;
  return [{ kind: "list", ordered, start: ordered ? Number.parseInt(first[2], 10) : 1, loose, items }, end];
}

/** The lines of one item without its marker and indent, and where the next line stands. */
function itemLines(all, at, match) {
  const indent = match[1].length + match[2].length + (match[3].length > 4 ? 1 : Math.max(match[3].length, 1));
  const content = [all[at].slice(indent)];
  let end = at + 1,
    blank = false;
  for (; end < all.length; end += 1) {
    const line = all[end],
      space = line.search(/\S/);
    if (space < 0) {
      blank = true;
      content.push("");
      continue;
    }
    const within = space >= indent || (space >= match[1].length + 2 && (ITEM.test(line) || !blank));
    if (!within && (blank || ITEM.test(line) || interrupts(all, end))) break;
    content.push(dedent(line, indent));
    blank = false;
  }
  while (content.length > 1 && !content.at(-1)) {
    content.pop();
    end -= 1;
  }
  return [content, end];
}

function isOrdered(match) {
  return match[2].length > 1;
}

function dedent(line, indent) {
  return line.slice(Math.min(indent, Math.max(line.search(/\S/), 0)));
}

function startsTable(all, at) {
  if (!all[at].includes("|") || at + 1 >= all.length) return false;
  const below = cells(all[at + 1]);
  return (
    /-[^]*\||\|[^]*-/.test(all[at + 1]) &&
    below.every((cell) => /^:?-+:?$/.test(cell)) &&
    below.length === cells(all[at]).length
  );
}

function parseTable(all, at) {
  const head = cells(all[at]);
  const sides = cells(all[at + 1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "centre" : "right") : "",
  );
  let end = at + 2;
  const rows = [];
  for (; end < all.length && all[end].trim() && !interrupts(all, end); end += 1) {
    const row = cells(all[end]);
    rows.push(head.map((_, column) => row[column] ?? ""));
  }
  return [{ kind: "table", head, sides, rows }, end];
}

function cells(line) {
  const found = [];
  let cell = "";
  for (let at = 0; at < line.length; at += 1) {
    if (line[at] === "\\" && line[at + 1] === "|") {
      cell += "|";
      at += 1;
    } else if (line[at] === "|") {
      found.push(cell.trim());
      cell = "";
    } else cell += line[at];
  }
  found.push(cell.trim());
  if (!found[0]) found.shift();
  if (found.length && !found.at(-1)) found.pop();
  return found;
}

/** A formula that stands on lines of its own, up to its end or a blank line. */
function parseFormula(all, at) {
  const opening = all[at].trimStart().slice(0, 2),
    closing = { $$: "$$", "\\[": "\\]" }[opening];
  if (!closing) return null;
  let end = at,
    text = all[at].trimStart().slice(2);
  while (!text.includes(closing) && end + 1 < all.length && all[end + 1].trim()) {
    end += 1;
    text = all[end];
  }
  if (text.includes(closing) && !text.trimEnd().endsWith(closing)) return null;
  return [{ kind: "text", text: all.slice(at, end + 1).join("\n") }, end + 1];
}

function parseParagraph(all, at) {
  let end = at + 1;
  while (end < all.length && all[end].trim() && !interrupts(all, end)) end += 1;
  return [
    {
      kind: "paragraph",
      text: all
        .slice(at, end)
        .map((line) => line.trim())
        .join("\n"),
    },
    end,
  ];
}

/** Whether a line ends the paragraph before it. A number does only if it is 1: others are often just numbers. */
function interrupts(all, at) {
  const line = all[at],
    item = ITEM.exec(line);
  return (
    [FENCE, HEADING, RULE, QUOTE, FORMULA].some((start) => start.test(line)) ||
    startsTable(all, at) ||
    (item !== null && item[0].length < line.length && (!isOrdered(item) || Number.parseInt(item[2], 10) === 1))
  );
}

// Nodes

function blockNode(block) {
  switch (block.kind) {
    case "code":
      return codeNode(block);
    case "heading":
      return textual(HEADINGS[block.level - 1], block.text);
    case "rule":
      return document.createElement("hr");
    case "quote":
      return parent("blockquote", block.blocks.map(blockNode));
    case "list":
      return listNode(block);
    case "table":
      return tableNode(block);
    case "text":
      return verbatim(block.text);
    default:
      return textual("p", block.text);
  }
}

function codeNode({ language, text }) {
  const bar = parent("div", [parent("span", [language || "text"])]),
    button = parent("button", ["Copy"]);
  const pre = parent("pre", [parent("code", [document.createTextNode(text)])]),
    root = parent("div", [bar, pre]);
  root.className = "code";
  bar.className = "bar";
  button.type = "button";
  button.className = "copy-code";
  pre.tabIndex = 0;
  pre.setAttribute("aria-label", "Code");
  pre.setAttribute("role", "group");
  bar.append(button);
  return root;
}

function listNode({ ordered, start, loose, items }) {
  const list = parent(
    ordered ? "ol" : "ul",
    items.map((blocks) => itemNode(blocks, loose)),
  );
  if (ordered && start !== 1) list.start = start;
  return list;
}

function itemNode(blocks, loose) {
  const task = blocks[0]?.kind === "paragraph" && /^\[([ xX])\] /.exec(blocks[0].text);
  if (task)
    blocks = [{ ...blocks[0], text: `${task[1] === " " ? "☐" : "☑"} ${blocks[0].text.slice(4)}` }, ...blocks.slice(1)];
  const item = parent(
    "li",
    blocks.map((block) => (loose || block.kind !== "paragraph" ? blockNode(block) : inline(block.text))),
  );
  if (task) item.className = "task";
  return item;
}

function tableNode({ head, sides, rows }) {
  const row = (kind, texts) =>
    parent(
      "tr",
      texts.map((text, column) => {
        const cell = textual(kind, text);
        if (sides[column]) cell.className = sides[column];
        if (kind === "th") cell.scope = "col";
        return cell;
      }),
    );
  const body = rows.length
    ? [
        parent(
          "tbody",
          rows.map((texts) => row("td", texts)),
        ),
      ]
    : [];
  const root = parent("div", [parent("table", [parent("thead", [row("th", head)]), ...body])]);
  root.className = "table";
  root.tabIndex = 0;
  root.setAttribute("aria-label", "Table");
  root.setAttribute("role", "group");
  return root;
}

function verbatim(text) {
  const node = parent("p", [text]);
  node.className = "verbatim";
  return node;
}

function parent(tag, children) {
  const node = document.createElement(tag);
  node.append(...children);
  return node;
}

function textual(tag, text) {
  return parent(tag, [inline(text)]);
}

// Marks within a text

function inline(text, depth = 0, links = true) {
  const root = document.createDocumentFragment(),
    scan = { text, depth, links, missing: new Set() };
  let plain = "",
    at = 0;
  while (at < text.length) {
    const found = MARKS.test(text[at]) && depth <= DEEPEST ? mark(scan, at) : null;
    if (!found) {
      plain += text[at];
      at += 1;
      continue;
    }
    if (typeof found.node === "string") plain += found.node;
    else {
      root.append(plain, found.node);
      plain = "";
    }
    at = found.end;
  }
  root.append(plain);
  root.normalize();
  return root;
}

/** What begins at a place: {node, end} with a node or a literal text, or null for nothing but the character. */
function mark(scan, at) {
  switch (scan.text[at]) {
    case "\\":
      return formula(scan, at, "\\(", "\\)") ?? formula(scan, at, "\\[", "\\]") ?? escaped(scan.text, at);
    case "`":
      return codeSpan(scan, at);
    case "$":
      return formula(scan, at, "$$", "$$") ?? dollars(scan, at);
    case "!":
      return scan.text[at + 1] === "[" ? link(scan, at + 1) : null;
    case "[":
      return link(scan, at);
    case "<":
      return lineBreak(scan.text, at) ?? automaticLink(scan, at);
    case "h":
      return bareAddress(scan, at);
    case "\n":
      return { node: document.createElement("br"), end: at + 1 };
    default:
      return emphasis(scan, at);
  }
}

function escaped(text, at) {
  const next = text[at + 1];
  return next && PUNCTUATION.test(next) ? { node: next, end: at + 2 } : null;
}

/** Where `needle` stands at or after a place, or -1; a failed search is not done twice. */
function find(scan, needle, from) {
  if (scan.missing.has(needle)) return -1;
  const place = scan.text.indexOf(needle, from);
  if (place < 0) scan.missing.add(needle);
  return place;
}

function formula(scan, at, opening, closing) {
  if (!scan.text.startsWith(opening, at)) return null;
  const end = find(scan, closing, at + 2);
  return end < 0 ? null : { node: scan.text.slice(at, end + 2), end: end + 2 };
}

/** $...$ as pandoc knows it: no space inside the dollars, no digit after them. */
function dollars(scan, at) {
  const { text } = scan;
  if (!text[at + 1] || SPACE.test(text[at + 1])) return null;
  for (let end = find(scan, "$", at + 1); end > 0; end = find(scan, "$", end + 1)) {
    if (text[end - 1] === "\\") continue;
    if (SPACE.test(text[end - 1]) || /\d/.test(text[end + 1] ?? "")) return null;
    return { node: text.slice(at, end + 1), end: end + 1 };
  }
  return null;
}

function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

/** Where the code span that opens at a place ends, or -1. */
function codeEnd(text, at, size) {
  for (let end = text.indexOf("`", at + size); end >= 0; end = text.indexOf("`", end)) {
    const run = runLength(text, end);
    if (run === size) return end;
    end += run;
  }
  return -1;
}

function codeSpan(scan, at) {
  const size = runLength(scan.text, at),
    key = `code ${size}`;
  const end = scan.missing.has(key) ? -1 : codeEnd(scan.text, at, size);
  if (end < 0) {
    scan.missing.add(key);
    return { node: "`".repeat(size), end: at + size };
  }
  let content = scan.text.slice(at + size, end).replaceAll("\n", " ");
  if (content.startsWith(" ") && content.endsWith(" ") && content.trim()) content = content.slice(1, -1);
  return { node: parent("code", [content]), end: end + size };
}

function emphasis(scan, at) {
  const { text } = scan,
    sign = text[at],
    run = runLength(text, at);
  const literal = { node: sign.repeat(run), end: at + run };
  if (run > 3 || (sign === "~" && run !== 2) || !opens(text, at, run)) return literal;
  for (const size of run === 3 ? [3, 2, 1] : [run]) {
    const end = closing(scan, at + size, sign, size);
    if (end < 0) continue;
    const inner = inline(text.slice(at + size, end), scan.depth + 1, scan.links);
    return { node: emphasised(sign, size, inner), end: end + size };
  }
  return literal;
}

/** Whether a run can open emphasis. 3*4*5, 2**3 and snake_case are none. */
function opens(text, at, run) {
  const before = text[at - 1] ?? " ",
    after = text[at + run] ?? " ";
  if (SPACE.test(after)) return false;
  return text[at] === "*" && run > 1 ? !/[0-9)]/.test(before) : !/[A-Za-z0-9)\]]/.test(before);
}

function closing(scan, from, sign, size) {
  const { text } = scan,
    key = `${sign} ${size}`;
  if (scan.missing.has(key)) return -1;
  for (let at = from; at < text.length; at += 1) {
    if (text[at] === "\\") {
      at += 1;
      continue;
    }
    if (text[at] === "`") {
      const run = runLength(text, at),
        end = codeEnd(text, at, run);
      at = end < 0 ? at + run - 1 : end + run - 1;
      continue;
    }
    if (text[at] !== sign) continue;
    const run = runLength(text, at),
      after = text[at + run] ?? " ";
    const fits = run === size || (run === 3 && sign !== "~");
    const ends = !SPACE.test(text[at - 1]) && (!WORD.test(after) || (sign !== "_" && size > 1));
    if (fits && ends && at > from) return at + run - size;
    at += run - 1;
  }
  scan.missing.add(key);
  return -1;
}

function emphasised(sign, size, inner) {
  if (sign === "~") return parent("del", [inner]);
  if (size === 3) return parent("em", [parent("strong", [inner])]);
  return parent(size === 2 ? "strong" : "em", [inner]);
}

function link(scan, at) {
  const { text } = scan,
    end = labelEnd(text, at);
  if (!scan.links || end < 0 || text[end + 1] !== "(") return null;
  const target = destination(text, end + 2);
  const address = target && safeAddress(target.address);
  if (!address) return null;
  const label = text.slice(at + 1, end);
  return { node: anchor(address, label.trim() ? inline(label, scan.depth + 1, false) : address), end: target.end };
}

function labelEnd(text, at) {
  let depth = 0;
  for (let end = at; end < Math.min(text.length, at + LONGEST_LABEL); end += 1) {
    if (text[end] === "\\") end += 1;
    else if (text[end] === "[") depth += 1;
    else if (text[end] === "]" && (depth -= 1) === 0) return end;
  }
  return -1;
}

/** The address of a link up to its closing parenthesis; a title after it is dropped. */
function destination(text, at) {
  const pattern = /^\s*(?:<([^<>\n]*)>|([^\s<>]*))(?:\s+(?:"[^"]*"|'[^']*'))?\s*$/;
  let depth = 1;
  for (let end = at; end < Math.min(text.length, at + LONGEST_ADDRESS); end += 1) {
    if (text[end] === "(") depth += 1;
    if (text[end] !== ")" || (depth -= 1) > 0) continue;
    const match = pattern.exec(text.slice(at, end));
    return match ? { address: match[1] ?? match[2], end: end + 1 } : null;
  }
  return null;
}

function lineBreak(text, at) {
  const match = /^<br ?\/?>/i.exec(text.slice(at, at + 6));
  return match && { node: document.createElement("br"), end: at + match[0].length };
}

function automaticLink(scan, at) {
  const match = /^<([^\s<>]+)>/.exec(scan.text.slice(at, at + LONGEST_ADDRESS));
  const address = match && scan.links && safeAddress(match[1]);
  return address ? { node: anchor(address, match[1]), end: at + match[0].length } : null;
}

function bareAddress(scan, at) {
  const { text } = scan;
  if (!scan.links || (at && WORD.test(text[at - 1]))) return null;
  const match = /^https?:\/\/[^\s<>"`]+/.exec(text.slice(at, at + LONGEST_ADDRESS));
  if (!match) return null;
  let shown = match[0];
  while (/[.,;:!?'*_~\])]/.test(shown.at(-1)) && !(shown.endsWith(")") && shown.includes("(")))
    shown = shown.slice(0, -1);
  const address = safeAddress(shown);
  return address ? { node: anchor(address, shown), end: at + shown.length } : null;
}

function anchor(address, label) {
  const node = parent("a", [label]);
  node.href = address;
  node.title = address;
  node.rel = "noopener noreferrer nofollow";
  node.target = "_blank";
  return node;
}
