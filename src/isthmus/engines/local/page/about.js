// What is served: in the header in short, in a dialog in full, with what its seal is worth.

import { byId, capitalised, count, download, element, notify } from "./dom.js";
import { SILENT } from "./stream.js";
import * as settings from "./settings.js";

const STANDINGS = {
  sealed:
    "The weights that answer here are those that passed the parity gate: the model as it was trained and the model as " +
    "it runs here were compared, and the seal was checked, file by file, before the server began to answer.",
  replaced:
    "The bundle was sealed, but its weights have been replaced since, by who runs this server. The seal says nothing " +
    "about the new ones.",
  unsealed: "No parity gate has passed this model. Nobody vouches that it is the model that was trained.",
  untrusted: "It has a seal, but nobody whom this server trusts has signed it.",
  tampered: "Something in it has changed since it was sealed. It is not the model that passed the parity gate.",
  refused: "The parity gate compared this model with the one that was trained, and refused it.",
};

/** Let the buttons work. */
export function start() {
  const dialog = byId("about");
  byId("open-about").addEventListener("click", () => dialog.showModal());
  byId("close-about").addEventListener("click", () => dialog.close());
  byId("dossier").addEventListener("click", (event) => {
    if (!settings.hasKey()) return;
    event.preventDefault(); // A link carries no key.
    saveDossier();
  });
}

/** Show what /health says. */
export function show(health) {
  const facts = {
    model: health.model,
    format: health.format,
    seal: health.seal ?? "none",
    weights: `version ${health.weight_version}`,
    pool: health.pool,
  };
  fill("facts", facts);
  const standing = standingOf(health),
    isSealed = standing === "sealed";
  byId("standing").textContent = isSealed ? "sealed" : "not sealed";
  byId("open-about").classList.toggle("sealed", isSealed);
  byId("about-model").textContent = health.model;
  byId("explanation").textContent = STANDINGS[standing];
  fill("about-facts", {
    ...facts,
    "signed by": health.seal && (health.signer ?? "nobody: the seal shows what changed, not who made it"),
    verdict: verdict(health),
    context: health.max_model_len && count(health.max_model_len, "token"),
    chip: health.rehearsal && capitalised(String(health.rehearsal.statement)),
  });
  byId("dossier").hidden = !health.report;
}

function standingOf({ seal, state, sealed_weights: isOriginal }) {
  if (seal) return isOriginal === false ? "replaced" : "sealed";
  return Object.hasOwn(STANDINGS, state) && state !== "sealed" ? state : "unsealed";
}

function verdict({ state, checks }) {
  const outcomes = Object.entries(checks ?? {}),
    all = outcomes.reduce((sum, [, number]) => sum + number, 0);
  if (state === "refused") return "refused";
  if (!all) return null;
  return `passed; of ${count(all, "check")} ${outcomes.map(([outcome, number]) => `${number} ${outcome}`).join(", ")}`;
}

function fill(id, facts) {
  const pairs = Object.entries(facts).filter(([, value]) => value);
  byId(id).replaceChildren(
    ...pairs.map(([name, value]) => {
      const pair = document.createElement("div");
      pair.append(element("dt", "", name), element("dd", "", value));
      return pair;
    }),
  );
}

async function saveDossier() {
  const answer = await fetch("report", { headers: settings.authorisation() }).catch(() => null);
  if (answer?.ok) download("report.html", await answer.text(), "text/html");
  else notify("dossier", answer ? `The dossier is not given out (${answer.status}).` : SILENT);
}
