// Formulas: a plug-in for markdown-it that finds them, and their MathML nodes. A formula that does not end, that Temml
// refuses or that is too large is shown as it was written.

/* global temml */

const PAIRS = [
  ["$$", "$$"],
  ["\\[", "\\]"],
  ["\\(", "\\)"],
  ["$", "$"],
];
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
}

function inlineMaths(state, silent) {
  const { src, pos } = state;
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

/** Where a sign stands at or after a place, or -1; a text is not searched for it twice in vain. */
function find(state, sign, from) {
  state.missing ??= new Set();
  const place = state.missing.has(sign) ? -1 : state.src.indexOf(sign, from);
  if (place < 0) state.missing.add(sign);
  return place;
}

/** Where $...$ ends, or -1. As pandoc has it, so that a price stays one: no space inside, no digit after. */
function dollarEnd(text, start) {
  let end = text.indexOf("$", start);
  while (end >= 0 && text[end - 1] === "\\") end = text.indexOf("$", end + 1);
  return end < 0 || /\s/.test(text[start] + text[end - 1]) || /\d/.test(text[end + 1]) ? -1 : end;
}

/** A formula on lines of its own, up to its end. Without one it goes on to a blank line, and is shown as written. */
function blockMaths(state, first, end, silent) {
  const from = state.bMarks[first] + state.tShift[first];
  const pair = PAIRS.slice(0, 2).find(([opening]) => state.src.startsWith(opening, from));
  if (!pair) return false;
  const [opening, closing] = pair;
  const isWithin = (line) => line < end && !state.isEmpty(line) && state.sCount[line] >= state.blkIndent;
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
