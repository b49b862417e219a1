// What is on the page: whether an attack ran, and every element, attribute and address that came from a text.

const inside = [...document.querySelectorAll(".content *")];
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
return {
  hacked: "hacked" in window,
  elements: [...new Set(inside.map((node) => node.nodeName))],
  attributes: [...new Set(inside.flatMap((node) => [...node.attributes].map((attribute) => attribute.name)))],
  addresses: [...document.querySelectorAll("a[href]")].map((link) => link.protocol),
  rels: [...new Set([...document.querySelectorAll(".content a")].map((link) => `${link.rel} ${link.target}`))],
  inPlain: all([...plain, "#announcer p"].map((selector) => `${selector} *`)).length,
  foreign: all(foreign.map((selector) => `body ${selector}`)).length,
  scripts: [...document.scripts].map((script) => script.getAttribute("src")),
  fetched: fetched.filter((name) => !name.startsWith(location.origin)),
};
