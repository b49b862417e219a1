// What is on the page: whether an attack ran, and every element, attribute and address that came from a text.

const within = [...document.querySelectorAll(".content *")];
const isMaths = (node) => node.namespaceURI.endsWith("MathML");
const inside = within.filter((node) => !isMaths(node)),
  formulas = within.filter(isMaths);
const attributes = (nodes) => [...new Set(nodes.flatMap((node) => [...node.attributes].map(({ name }) => name)))];
const plain = [
  ".text",
  ".thought",
  ".open",
  "#facts dd",
  "#statement",
  "#examples button",
  ".problem",
  ".note",
  ".notice p",
];
const foreign = [
  "iframe",
  "img",
  "object",
  "embed",
  "style",
  "link",
  "base",
  "script",
  "[onclick]",
  "[onload]",
  "[onerror]",
];
const fetched = performance.getEntriesByType("resource").map((entry) => entry.name);
const all = (selectors) => document.querySelectorAll(selectors.join());
// Whether something of an answer stands, and could be taken for the page's own, where the answer is not.
const MARGIN = 9;
let escaped = 0;
for (let x = 1; x < innerWidth; x += 24) {
  for (let y = 1; y < innerHeight; y += 24) {
    const answer = document.elementFromPoint(x, y)?.closest(".content");
    if (!answer) continue;
    const { left, right, top, bottom } = answer.getBoundingClientRect();
    escaped += x < left - MARGIN || x > right + MARGIN || y < top - MARGIN || y > bottom + MARGIN;
  }
}
return {
  hacked: "hacked" in window,
  elements: [...new Set(inside.map((node) => node.nodeName))],
  attributes: attributes(inside),
  mathsElements: [...new Set(formulas.map((node) => node.nodeName))],
  mathsAttributes: attributes(formulas),
  mathsClasses: [...new Set(formulas.flatMap((node) => [...node.classList]))],
  codeClasses: [...new Set([...document.querySelectorAll(".content code *")].flatMap((node) => [...node.classList]))],
  styles: [...new Set(formulas.flatMap((node) => [...node.style]))],
  escaped,
  addresses: [...document.querySelectorAll("a[href]")].map((link) => link.protocol),
  rels: [...new Set([...document.querySelectorAll(".content a")].map((link) => `${link.rel} ${link.target}`))],
  inPlain: all([...plain, "#announcer p"].map((selector) => `${selector} *`)).length,
  foreign: all(foreign.map((selector) => `body ${selector}`)).length,
  scripts: [...document.scripts].map((script) => script.getAttribute("src")),
  fetched: fetched.filter((name) => !name.startsWith(location.origin)),
};
