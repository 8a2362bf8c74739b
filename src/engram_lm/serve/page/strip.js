// A text as a row of tokens with heat. Heat is never colour alone: an underline grows with it, and each token's label says
// the value. One tab stop: arrows move through the tokens, Home and End to the ends, Enter opens, Escape closes.
//
//   const strip = new Strip(container, { label: "Tokens", show: (i) => ..., open: (i) => ..., close: () => ... });
//   strip.add("Alex"); strip.paint((i) => ({ heat: 0.4, told: "gate 0.40" }));

import { el, tune, visible } from "./elements.js";

export class Strip {
  /** show(i): token i is pointed at or focused; open(i): it was chosen; close(): Escape, or the strip was left. */
  constructor(container, { label, show = () => {}, open = () => {}, close = () => {} }) {
    this.calls = { show, open, close };
    this.tokens = [];
    this.current = 0;
    this.box = el("div", { class: "strip", role: "listbox", dir: "auto", "aria-label": label, "aria-orientation": "horizontal" });
    this.box.addEventListener("keydown", (event) => this.#key(event));
    this.box.addEventListener("pointerover", (event) => {
      const place = this.#place(event.target);
      if (place >= 0 && event.pointerType === "mouse") show(place);
    });
    this.box.addEventListener("pointerleave", () => show(-1));
    this.box.addEventListener("focusin", (event) => {
      const place = this.#place(event.target);
      if (place >= 0) show(this.#stop(place));
    });
    this.box.addEventListener("click", (event) => {
      const place = this.#place(event.target);
      if (place < 0) return;
      this.focus(place);
      open(place);
    });
    container.replaceChildren(this.box);
  }

  /** shown: what is seen of it, where that is not its text. */
  add(text, shown = text) {
    const first = this.tokens.length === 0;
    const token = el("span", { class: "tok", role: "option", tabindex: first ? 0 : -1, "aria-selected": "false" });
    // A line break is shown as a sign and then made, so that it can be pointed at.
    token.textContent = shown.replaceAll("\n", "↵\n") || "\u200b";
    token.dataset.text = text;
    this.tokens.push(token);
    this.box.append(token);
    return token;
  }

  /** of(i) gives { heat: -1 to 1 or null, told }: negative heat is where memory did harm. */
  paint(of, from = 0) {
    for (let i = from; i < this.tokens.length; i += 1) {
      const token = this.tokens[i];
      const { heat, told } = of(i);
      tune(token, "--heat", Math.min(1, Math.abs(heat ?? 0)).toFixed(3));
      token.classList.toggle("cold", (heat ?? 0) < 0);
      token.setAttribute("aria-label", `${visible(token.dataset.text)}, ${told}`);
    }
  }

  mark(place) {
    this.tokens.forEach((token, i) => token.setAttribute("aria-selected", String(i === place)));
  }

  focus(place) {
    this.tokens[this.#stop(place)]?.focus();
  }

  /** Makes token `place` the tab stop. */
  #stop(place) {
    this.tokens[this.current]?.setAttribute("tabindex", "-1");
    this.tokens[place]?.setAttribute("tabindex", "0");
    this.current = place;
    return place;
  }

  #place(target) {
    return this.tokens.indexOf(target.closest?.(".tok"));
  }

  #key(event) {
    const here = this.#place(event.target);
    if (here < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    const last = this.tokens.length - 1;
    const forwards = getComputedStyle(this.box).direction === "rtl" ? "ArrowLeft" : "ArrowRight";
    let next = null;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") next = here + (event.key === forwards ? 1 : -1);
    else if (event.key === "ArrowDown") next = this.#line(here, 1);
    else if (event.key === "ArrowUp") next = this.#line(here, -1);
    else if (event.key === "Home") next = 0;
    else if (event.key === "End") next = last;
    else if (event.key === "Enter" || event.key === " ") this.calls.open(here);
    else if (event.key === "Escape") this.calls.close();
    else return;
    event.preventDefault();
    if (next !== null) this.focus(Math.max(0, Math.min(last, next)));
  }

  /** The token nearest to token `here` in the next line below (1) or above (-1). */
  #line(here, way) {
    const from = this.tokens[here].getBoundingClientRect();
    let line = null;
    let best = here;
    let least = Infinity;
    for (let i = here + way; i >= 0 && i < this.tokens.length; i += way) {
      const box = this.tokens[i].getBoundingClientRect();
      if (Math.abs(box.top - from.top) < from.height / 2) continue;
      if (line === null) line = box.top;
      if (Math.abs(box.top - line) > from.height / 2) break;
      const distance = Math.abs(box.left + box.width / 2 - from.left - from.width / 2);
      if (distance < least) [best, least] = [i, distance];
    }
    return best;
  }
}

/** What the colours mean: a ramp between two values, with harm on its left where values may be negative. */
export function legend(container, { low, high, signed = false }) {
  container.replaceChildren(
    el("span", { class: "end" }, low),
    el("span", { class: signed ? "ramp signed" : "ramp", "aria-hidden": "true" },
      [...Array(9).keys()].map((step) => {
        const heat = signed ? (step - 4) / 4 : (step + 0.5) / 9;
        return tune(el("i", { class: heat < 0 ? "cold" : null }), "--heat", Math.abs(heat).toFixed(2));
      })),
    el("span", { class: "end" }, high),
  );
}
