// How likely each whole candidate is as λ moves, computed here from what each of its tokens got from model and memory:
// P(candidate) = product over its tokens of (1 − λ) p_model + λ p_memory. With λ null each token keeps its gate's own λ.
//
//   chanceOf([{ p_model: 0.5, p_memory: 1, lambda: 0.2 }], 0.5)  // 0.75

import { el, number, percent, quoted, tune, wide } from "./elements.js";
import { word } from "./words.js";

export const mixed = (token, lam) => {
  const l = lam ?? token.lambda ?? 0;
  return (1 - l) * token.p_model + l * (token.p_memory ?? 0);
};

export const chanceOf = (tokens, lam) => tokens.reduce((product, token) => product * mixed(token, lam), 1);

/** The table of candidates; `move(λ or null)` redraws it, and the same rows keep their place. */
export class Chances {
  constructor(box, candidates) {
    this.rows = candidates.map((candidate) => {
      const bar = el("i", { class: "bar split-bar", "aria-hidden": "true" });
      const p = el("td", { class: "figure" });
      const share = el("td", { class: "figure" });
      const parts = el("p", { class: "parts" });
      return { candidate, bar, p, share, parts,
        row: el("tr", {}, el("th", { scope: "row" }, el("bdi", {}, candidate.text), bar, parts), share, p) };
    });
    box.replaceChildren(el("h3", {}, word("chances.title")), el("p", { class: "note" }, word("chances.lead")),
      wide(word("chances.title"), el("table", { class: "chances" },
        el("caption", { class: "unseen" }, word("chances.title")),
        el("thead", {}, el("tr", {}, ["candidate", "share", "p"].map((key) => el("th", { scope: "col", class: key === "candidate" ? null : "figure" }, word(`chances.${key}`))))),
        el("tbody", {}, this.rows.map((one) => one.row)))));
  }

  move(lam) {
    const all = this.rows.map(({ candidate }) => chanceOf(candidate.tokens, lam));
    const total = all.reduce((a, b) => a + b, 0) || 1;
    this.rows.forEach((one, i) => {
      const { tokens } = one.candidate;
      // The red part is what would be missing if memory gave nothing.
      const alone = tokens.reduce((product, token) => product * (1 - (lam ?? token.lambda ?? 0)) * token.p_model, 1);
      tune(tune(one.bar, "--p", all[i] / total), "--red", all[i] ? 1 - alone / all[i] : 0);
      one.share.textContent = percent(all[i] / total);
      one.p.textContent = number(all[i]);
      one.parts.replaceChildren(...tokens.flatMap((token) => [quoted(token.text), ` ${number(mixed(token, lam))} `]));
    });
  }
}
