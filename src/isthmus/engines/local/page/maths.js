// Formulas: a plug-in for markdown-it that finds them, and their MathML nodes. A formula that does not end, that Temml
// refuses or that is too large is shown as it was written.

/* global temml */

const PAIRS = [
  ["$$", "$$"],
  ["\\[", "\\]"],
  ["\\(", "\\)"],
  ["$`", "`$"],
  ["$", "$"],
];
// Environments that stand for themselves in LaTeX, and languages whose code is a formula, as GitHub and GitLab have it.
const ENVIRONMENT = /^\\begin\{((?:equation|align|gather|alignat|multline|eqnarray|CD)\*?|[pbBvV]?matrix|cases|aligned)\}/;
const ENDS = /\\end\{([A-Za-z]+\*?)\}\s*[.,;:]?\s*$/;
const BOXED = "\\boxed{";
const FENCES = new Set(["math", "maths"]);
const AMOUNT = /^\d[\d.,]*\s?(k|m|bn?|thousand|million|billion)?$/i;
// What follows an amount of money: $10$-off, $5$ per seat, $9$/month. A number in a sum or $3$-dimensional is none.
const OF_MONEY =
  /^(-?\s?(off|bills?|notes?|coupons?|vouchers?|fees?|tickets?|tips?|discounts?|cash|deposits?|gift cards?|dollars?|usd|each|apiece)\b|(\s?\/\s?|\s(per|an?)\s|-(per|an?)-)(year|yr|month|mo|week|day|hour|hr|minute|seat|user|unit|person|head|kg|lb|night|gb|tb|kwh|token)s?\b)/i;
const LONGEST = 4000, // Characters of a formula,
  MOST_LINES = 200, // its lines,
  DEEPEST = 60, // its elements within each other,
  MOST = 20_000; // and its elements in all.
const LARGEST = [50, 600]; // The em and the points to which a length is cut.
// A formula defines no commands: what a short one may then expand to has no bound.
const DEFINING = "def edef gdef xdef let futurelet global long newcommand renewcommand providecommand".split(" ");
const MACROS = Object.fromEntries(DEFINING.map((name) => [`\\${name}`, "\\refused"]));

const MATHML = "http://www.w3.org/1998/Math/MathML";
const listed = (names) => new Set(names.trim().split(/\s+/));
const ELEMENTS = listed(`
  math menclose mfrac mi mmultiscripts mn mo mover mpadded mphantom mprescripts mroot mrow mspace msqrt mstyle msub
  msubsup msup mtable mtd mtext mtr munder munderover none`);
const ATTRIBUTES = listed(`
  columnspan depth display displaystyle fence form height largeop linethickness lspace mathbackground mathcolor mathsize
  mathvariant maxsize minsize movablelimits rspace scriptlevel separator stretchy symmetric voffset width`);
const STYLES = listed(`
  border borderBottom borderLeft borderRight borderTop color fontWeight marginLeft math-depth mathDepth padding
  paddingBottom paddingLeft paddingRight paddingTop textAlign width`);
const CLASSES = /^(tml-|(up|down)strike$|sout$)/;
const HUGE = /(?<![.\d#])\d{3,}[.\d]*[a-z]|e\+/i; // A hundred or more of any unit.

/** The plug-in. It makes tokens of type "maths" with the source in `content` and, if they stand alone, `block`. */
export function maths(markdown) {
  markdown.inline.ruler.before("escape", "maths", inlineMaths);
  markdown.block.ruler.before("fence", "maths", blockMaths, { alt: ["paragraph", "blockquote", "list"] });
  markdown.block.ruler.before("maths", "environment", environment, { alt: ["paragraph", "blockquote", "list"] });
}

function inlineMaths(state, silent) {
  const { src, pos } = state;
  if (src.startsWith(BOXED, pos)) return boxed(state, silent);
  const pair = PAIRS.find(([opening]) => src.startsWith(opening, pos));
  if (!pair) return false;
  const [opening, closing] = pair,
    start = pos + opening.length;
  const end = opening === "$" ? dollarEnd(src, start) : find(state, closing, start),
    after = end + closing.length;
  if (end >= 0 && after <= state.posMax && src.slice(start, end).trim()) {
    if (!silent) push(state, src.slice(start, end), opening, src.slice(pos, after));
    state.pos = after;
    return true;
  }
  if (opening !== "$$") return false;
  if (!silent) state.pending += opening;
  state.pos = start;
  return true;
}

/** \boxed{...} without signs around it, as models that were trained on sums end. */
function boxed(state, silent) {
  const { src, pos, posMax } = state;
  let end = pos + BOXED.length;
  for (let open = 1; open && end < posMax && end - pos < LONGEST; end += 1) {
    if (src[end] === "\\") end += 1;
    else if (src[end] === "{") open += 1;
    else if (src[end] === "}") open -= 1;
    if (!open) {
      const written = src.slice(pos, end + 1);
      if (!silent) push(state, written, "$", written);
      state.pos = end + 1;
      return true;
    }
  }
  return false;
}

/** Where a sign stands at or after a place, or -1; a text is not searched for it twice in vain. */
function find(state, sign, from) {
  state.missing ??= new Set();
  const place = state.missing.has(sign) ? -1 : state.src.indexOf(sign, from);
  if (place < 0) state.missing.add(sign);
  return place;
}

/**
 * Where $...$ ends, or -1. As pandoc has it, so that a price stays one: no space inside, no digit after. What looks like a
 * variable of a shell after it, or has words and no sign of a formula, is none either, nor is an amount before what is
 * said of money; with a space at both ends it is one only if it has a sign and no word.
 */
function dollarEnd(text, start) {
  let end = text.indexOf("$", start);
  while (end >= 0 && text[end - 1] === "\\") end = text.indexOf("$", end + 1);
  if (end < 0 || /[\dA-Z_{]/.test(text[end + 1] ?? "")) return -1;
  if (end - start < 24 && AMOUNT.test(text.slice(start, end)) && OF_MONEY.test(text.slice(end + 1, end + 24))) return -1;
  const isSpaced = [text[start], text[end - 1]].map((sign) => /\s/.test(sign));
  if (isSpaced[0] !== isSpaced[1]) return -1;
  if (end - start > LONGEST) return isSpaced[0] ? -1 : end;
  const bare = text.slice(start, end).replaceAll(/\\(text|mathrm|operatorname)\{[^{}]*\}|\\[A-Za-z]+/g, "\\");
  const [hasSign, hasWord] = [/[\\^_=+<>]/.test(bare), /\p{L}{3}/u.test(bare)];
  if (isSpaced[0]) return hasSign && !hasWord && !bare.includes("\n") ? end : -1;
  return !hasSign && hasWord && /\s/.test(bare) ? -1 : end;
}

/** A formula on lines of its own, up to its end. Without one it goes on to a blank line, and is shown as written. */
function blockMaths(state, first, end, silent) {
  const from = state.bMarks[first] + state.tShift[first];
  const pair = PAIRS.slice(0, 2).find(([opening]) => state.src.startsWith(opening, from));
  if (!pair) return false;
  const [opening, closing] = pair;
  const isAlone = (line, sign) => state.src.slice(state.bMarks[line], state.eMarks[line]).trim() === sign;
  // Some models leave a line free after \[ and before \].
  const isLoose = opening === "\\[" && isAlone(first, opening) && first + 1 < end && state.isEmpty(first + 1);
  const isFree = (line) => isLoose && state.isEmpty(line) && (line === first + 1 || (line + 1 < end && isAlone(line + 1, closing)));
  const isWithin = (line) => line < end && (isFree(line) || (!state.isEmpty(line) && state.sCount[line] >= state.blkIndent));
  const endIn = (line, at) => state.src.slice(at, state.eMarks[line]).indexOf(closing);
  let line = first,
    found = endIn(line, from + 2);
  while (found < 0 && isWithin(line + 1) && line - first < MOST_LINES) {
    line += 1;
    found = endIn(line, state.bMarks[line]);
  }
  const written = state.getLines(first, line + 1, state.blkIndent, false).trim(),
    close = written.indexOf(closing, 2);
  const after = close < 0 ? "" : written.slice(close + 2).trim();
  if (!/^[.,;:]?$/.test(after)) return false; // A text goes on after it: it belongs to a paragraph.
  if (silent) return true;
  push(state, close < 0 ? "" : written.slice(2, close) + after, opening, written, [first, line + 1]);
  state.line = line + 1;
  return true;
}

/** \begin{align} ... \end{align} on lines of its own, without signs around it; without an end as in blockMaths. */
function environment(state, first, end, silent) {
  const from = state.bMarks[first] + state.tShift[first];
  const [, name] = ENVIRONMENT.exec(state.src.slice(from, state.eMarks[first])) ?? [];
  if (!name) return false;
  if (silent) return true;
  const isWithin = (line) => line < end && !state.isEmpty(line) && state.sCount[line] >= state.blkIndent;
  const ends = (line) => ENDS.exec(state.src.slice(state.bMarks[line], state.eMarks[line]))?.[1] === name;
  let line = first;
  while (!ends(line) && isWithin(line + 1) && line - first < MOST_LINES) line += 1;
  const written = state.getLines(first, line + 1, state.blkIndent, false).trim();
  push(state, ends(line) ? written : "", "$$", written, [first, line + 1]);
  state.line = line + 1;
  return true;
}

/** Whether a code is a formula, by its language. */
export function isMaths({ info }) {
  return FENCES.has(info.trim().split(/\s/, 1)[0].toLowerCase());
}

/** The node of a formula that is written as code. */
export function fenceNode({ content, markup, info }) {
  const written = `${markup}${info}\n${content}${markup}`;
  return mathsNode({ content, markup: "$$", info: written, block: true });
}

function push(state, content, opening, written, map = null) {
  const token = state.push("maths", "", 0);
  Object.assign(token, { content, map, block: map !== null, markup: opening, info: written });
}

const made = new Map(),
  MOST_MADE = 1000;

/** The node of a token of the plug-in. */
export function mathsNode({ content, markup, info, block }) {
  const key = `${block} ${info}`;
  if (!made.has(key)) {
    if (made.size >= MOST_MADE) made.clear();
    made.set(key, formulaNode(content, markup === "$$" || markup === "\\[", info));
  }
  return made.get(key).cloneNode(true);
}

function formulaNode(tex, isDisplay, written) {
  const root = document.createElement("span");
  root.className = isDisplay ? "display maths" : "maths";
  try {
    if (!tex.trim() || tex.length > LONGEST) throw new Error("it has no end, or is too long");
    const options = { displayMode: isDisplay, throwOnError: true, wrap: "tex", maxSize: LARGEST };
    options.macros = { ...MACROS };
    root.append(mathNode(temml.__renderToMathMLTree(tex, options), { left: MOST }));
    root.firstElementChild.setAttribute("alttext", tex);
  } catch (error) {
    root.classList.add("written");
    root.textContent = written;
    root.title = `Not shown as a formula: ${error.message.slice(0, 200)}`;
  }
  return root;
}

/** A node of Temml's tree as one of the document. What is on no list above is left out; its children are not. */
function mathNode(tree, budget, depth = 0) {
  budget.left -= 1;
  if (depth > DEEPEST || budget.left < 0) throw new Error("it is too large");
  if (typeof tree.text === "string") return document.createTextNode(tree.text);
  const node = ELEMENTS.has(tree.type)
    ? document.createElementNS(MATHML, tree.type)
    : document.createDocumentFragment();
  node.append(...tree.children.map((child) => mathNode(child, budget, depth + 1)));
  if (!(node instanceof Element)) return node;
  for (const [name, value] of Object.entries(tree.attributes))
    if (ATTRIBUTES.has(name) && !HUGE.test(value)) node.setAttribute(name, value);
  for (const [name, value] of Object.entries(tree.style))
    if (STYLES.has(name) && !HUGE.test(value)) node.style[name] = value;
  const classes = tree.classes.filter((name) => CLASSES.test(name));
  if (classes.length) node.setAttribute("class", classes.join(" "));
  return node;
}
