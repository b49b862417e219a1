// What a reader set: how to sample, what to send along, the API key, and the colours.

import { byId } from "./dom.js";
import { area } from "./store.js";

const SETTINGS = "isthmus.settings",
  KEY = "isthmus.key",
  THEME = "isthmus.theme",
  VERSION = 1;
const DEFAULTS = { system: "", temperature: null, topP: null, maxTokens: null, seed: null, history: null };
const local = area("localStorage"),
  session = area("sessionStorage");
const dark = matchMedia("(prefers-color-scheme: dark)");

let settings = stored(),
  key = local?.getItem(KEY) ?? session?.getItem(KEY) ?? "";

export function current() {
  return settings;
}

export function change(changes) {
  settings = { ...settings, ...changes };
  write(local, SETTINGS, JSON.stringify({ version: VERSION, ...settings }));
}

/** The fields of a request that were set; the others are the server's. */
export function sampling() {
  const { temperature, topP, maxTokens, seed } = settings;
  const fields = { temperature, top_p: topP, max_tokens: maxTokens, seed };
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null));
}

export function hasKey() {
  return Boolean(key);
}

export function authorisation() {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** Let the dialog and the buttons work; `changed` is called when a new key may open what was shut. */
export function start(changed) {
  const dialog = byId("settings"),
    form = dialog.querySelector("form"),
    field = form.elements;
  byId("open-settings").addEventListener("click", () => open());
  byId("close-settings").addEventListener("click", () => dialog.close());
  byId("theme").addEventListener("click", () => setTheme(shownTheme() === "dark" ? "light" : "dark"));
  dark.addEventListener("change", nameTheme);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const number = (name) => (Number.isNaN(field[name].valueAsNumber) ? null : field[name].valueAsNumber);
    change({
      system: field.system.value.trim(),
      temperature: number("temperature"),
      topP: number("topP"),
      maxTokens: number("maxTokens"),
      seed: number("seed"),
    });
    setKey(field.key.value.trim(), field.keepKey.checked);
    setTheme(field.theme.value);
    dialog.close();
    changed();
  });
  nameTheme();
}

/** Show the dialog, with the cursor in one of its fields. */
export function open(name = "system") {
  const field = byId("settings").querySelector("form").elements;
  for (const name of ["system", "temperature", "topP", "maxTokens", "seed"]) field[name].value = settings[name] ?? "";
  field.key.value = key;
  field.keepKey.checked = Boolean(local?.getItem(KEY));
  field.theme.value = document.documentElement.dataset.theme ?? "system";
  byId("settings").showModal();
  field[name].focus();
}

function stored() {
  try {
    const { version, ...found } = JSON.parse(local?.getItem(SETTINGS) ?? "{}");
    const numbers = { temperature: "number", topP: "number", maxTokens: "number", seed: "number" };
    const fits = { system: "string", history: "boolean", ...numbers };
    const known = Object.entries(found).filter(([name, value]) => version === VERSION && typeof value === fits[name]);
    return { ...DEFAULTS, ...Object.fromEntries(known) };
  } catch {
    return { ...DEFAULTS };
  }
}

function setKey(text, keep) {
  key = text;
  local?.removeItem(KEY);
  session?.removeItem(KEY);
  if (key) write(keep ? local : session, KEY, key);
}

/** What the browser does not keep still holds until the page is closed. */
function write(storage, name, value) {
  try {
    storage?.setItem(name, value);
  } catch (error) {
    if (error.name !== "QuotaExceededError") throw error;
  }
}

function shownTheme() {
  return document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
}

function setTheme(theme) {
  if (theme === "system") {
    delete document.documentElement.dataset.theme;
    local?.removeItem(THEME);
  } else {
    document.documentElement.dataset.theme = theme;
    write(local, THEME, theme);
  }
  nameTheme();
}

function nameTheme() {
  const other = shownTheme() === "dark" ? "light" : "dark",
    button = byId("theme");
  button.setAttribute("aria-label", `Switch to ${other} colours`);
  button.title = `Switch to ${other} colours`;
}
