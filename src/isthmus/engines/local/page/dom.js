// Small things that every part of the page needs.

export const byId = (id) => document.getElementById(id);

/** A copy of what the template with this id holds. */
export function instance(id) {
  return byId(id).content.firstElementChild.cloneNode(true);
}

export function element(tag, className, text = "") {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

export function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

export function capitalised(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** Put a text on the clipboard. A page without TLS has no clipboard of its own and takes the old way. */
export function copy(text) {
  return navigator.clipboard ? navigator.clipboard.writeText(text) : copyBySelection(text);
}

async function copyBySelection(text) {
  const before = document.activeElement,
    box = element("textarea", "aside");
  box.value = text;
  document.body.append(box);
  box.select();
  const done = document.execCommand("copy");
  box.remove();
  before?.focus();
  if (!done) throw new Error("the browser does not let the page copy");
}

/** Copy, and say so on the button. */
export async function copyFrom(button, text) {
  const label = (button.dataset.label ??= button.textContent);
  button.textContent = await copy(text).then(
    () => "Copied",
    () => "Not copied",
  );
  setTimeout(() => {
    button.textContent = label;
  }, 1500);
}

/** Offer a text as a file. */
export function download(name, text, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const announced = byId("announcer"),
  MOST_ANNOUNCED = 12;

/** Say something to a screen reader, after what it is saying. */
export function announce(text) {
  if (!text.trim()) return;
  announced.append(element("p", "", text));
  while (announced.children.length > MOST_ANNOUNCED) announced.firstElementChild.remove();
}

/** A line above the conversation, once per `key`, with buttons. */
export function notify(key, text, actions = {}) {
  const notices = byId("notices");
  withdraw(key);
  const notice = element("div", "notice");
  notice.dataset.key = key;
  notice.append(element("p", "", text));
  for (const [label, act] of Object.entries({ ...actions, Dismiss: () => {} })) {
    const button = element("button", "quiet", label);
    button.type = "button";
    button.addEventListener("click", () => {
      notice.remove();
      act();
    });
    notice.append(button);
  }
  notices.append(notice);
}

export function withdraw(key) {
  document.querySelector(`#notices > [data-key="${key}"]`)?.remove();
}
