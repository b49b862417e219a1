// The list of conversations: open, search, rename, export, delete, by pointer and by keyboard.

import { byId, element, instance } from "./dom.js";

const narrow = matchMedia("(max-width: 56rem)");
const BEHIND = ["log", "footer", "notices"]; // What the open drawer covers.

export class Sidebar {
  #actions;
  #items = [];
  #current = null;
  #list = byId("conversations");
  #search = byId("search");

  /** `actions` has open(id), rename(id, title), save(id), remove(id). */
  constructor(actions) {
    this.#actions = actions;
    this.#search.addEventListener("input", () => this.#draw());
    byId("sidebar").addEventListener("keydown", (event) => this.#onKey(event));
    byId("menu").addEventListener("click", () => this.toggle());
    byId("scrim").addEventListener("click", () => this.toggle(false));
    narrow.addEventListener("change", () => this.toggle(false));
  }

  get isOpen() {
    return document.body.classList.contains("drawer");
  }

  /** Open or close the drawer, which a narrow page has in place of a column. */
  toggle(open = !this.isOpen) {
    if (open === this.isOpen) return;
    document.body.classList.toggle("drawer", open);
    byId("menu").setAttribute("aria-expanded", String(open));
    for (const id of BEHIND) byId(id).inert = open;
    if (open) byId("new").focus();
    else if (narrow.matches) byId("menu").focus();
  }

  /** Items are {id, title, busy, text}; `text` is what a search looks through. */
  show(items, current) {
    this.#items = items;
    this.#current = current;
    this.#draw();
  }

  #draw() {
    if (this.#list.querySelector("input")) return; // A title is being written.
    const words = this.#search.value.toLowerCase().trim(),
      focused = document.activeElement?.closest("#conversations li")?.dataset.id;
    const found = this.#items.filter((item) => !words || item.text.toLowerCase().includes(words));
    this.#list.replaceChildren(...found.map((item) => this.#row(item)));
    byId("nothing").hidden = Boolean(found.length);
    byId("nothing").textContent = words ? "Nothing found." : "Conversations are kept in this browser.";
    if (focused)
      this.#rows()
        .find((row) => row.dataset.id === focused)
        ?.querySelector(".open")
        .focus();
  }

  #row({ id, title, busy }) {
    const row = instance("conversation"),
      open = row.querySelector(".open");
    row.dataset.id = id;
    row.classList.toggle("busy", busy);
    row.classList.toggle("current", id === this.#current);
    if (id === this.#current) open.setAttribute("aria-current", "page");
    open.textContent = title;
    open.title = title;
    open.addEventListener("click", () => {
      this.toggle(false);
      this.#actions.open(id);
    });
    for (const [name, act] of [
      ["rename", () => this.#rename(row, title)],
      ["save", () => this.#actions.save(id)],
      ["delete", () => this.#remove(row)],
    ]) {
      const button = row.querySelector(`.${name}`);
      button.setAttribute("aria-label", `${button.title} “${title}”`);
      button.addEventListener("click", act);
    }
    return row;
  }

  #rename(row, title) {
    const box = element("input", "title"),
      { id } = row.dataset;
    const close = (text) => {
      box.onblur = null;
      row.querySelector(".open").focus();
      box.remove();
      row.classList.remove("renaming");
      if (text && text !== title) this.#actions.rename(id, text);
    };
    box.value = title;
    box.maxLength = 100;
    box.setAttribute("aria-label", "Title");
    box.onblur = () => close(box.value.trim());
    box.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Enter" && !event.isComposing) close(box.value.trim());
      if (event.key === "Escape") close(null);
    });
    row.classList.add("renaming");
    row.prepend(box);
    box.select();
  }

  #remove(row) {
    const rows = this.#rows(),
      place = rows.indexOf(row),
      next = rows[place + 1] ?? rows[place - 1];
    next?.querySelector(".open").focus();
    this.#actions.remove(row.dataset.id);
    if (!next) byId("new").focus();
  }

  #onKey(event) {
    const { key, target } = event,
      rows = this.#rows(),
      row = target.closest("#conversations li"),
      place = rows.indexOf(row);
    if (target.tagName === "INPUT" && !["ArrowDown", "ArrowUp"].includes(key)) return;
    const next = { ArrowDown: place + 1, ArrowUp: Math.max(place - 1, 0), Home: 0, End: rows.length - 1 }[key];
    if (next !== undefined && rows[next]) {
      event.preventDefault();
      rows[next].querySelector(".open").focus();
    }
    if (row && target.matches(".open") && key === "F2") this.#rename(row, target.textContent);
    if (row && target.matches(".open") && key === "Delete") this.#remove(row);
  }

  #rows() {
    return [...this.#list.children];
  }
}
