// The panel Look: a text with each token's heat, everything known of a token beside it, and what the heat follows.

import { fill, forget, passages, refill } from "./card.js";
import { at, duration, el, number, quoted, table, whole } from "./elements.js";
import { chips } from "./examples.js";
import { measures, signed } from "./measures.js";
import { scatter } from "./scatter.js";
import { Task, post } from "./server.js";
import { Strip, legend } from "./strip.js";
import { word } from "./words.js";

export class Look {
  constructor() {
    this.task = new Task(at("look-status"));
    this.trace = null;
    this.pinned = -1;
    this.shown = -1;
    at("look-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    at("look-measure").addEventListener("change", () => {
      this.chosen = at("look-measure").value;
      this.colour();
    });
    at("look-order").addEventListener("change", () => this.plots());
    at("look-numbers").addEventListener("toggle", () => this.numbers());
    at("look-card").addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.close();
    });
  }

  ready(about) {
    this.about = about;
    chips(at("look-examples"), about.examples?.look, (example) => {
      at("look-text").value = example.text;
      this.run();
    });
    const first = about.examples?.look?.[0];
    if (first && !at("look-text").value) at("look-text").value = first.text;
  }

  speak() {
    if (this.about) this.ready(this.about);
    if (this.trace) this.draw();
  }

  async run() {
    const text = at("look-text").value;
    if (!text.trim()) {
      this.task.say(word("look.empty"), "error");
      at("look-text").focus();
      return;
    }
    await this.task.run(async (signal) => {
      const trace = await post("/api/trace", { text, without: false }, { signal });
      forget();
      this.trace = trace;
      this.draw();
      const done = word("look.done", { tokens: whole(trace.tokens.length), ms: duration(trace.ms) });
      // The loss without tables takes a second forward: it follows when the heat is on the screen.
      if (trace.tokens.some((token) => token.tables)) {
        this.task.say(`${done} ${word("look.follows")}`);
        const { losses } = await post("/api/losses", { text, tables: false }, { signal });
        trace.tokens.forEach((token, i) => { token.loss_off = losses[i]; });
        if (this.trace === trace) this.saved();
      }
      this.task.say(done);
    });
  }

  /** Draws again what the loss without tables belongs to; the token that is open stays open. */
  saved() {
    this.measures = measures(this.trace.tokens);
    this.#choices();
    this.colour();
    if (this.shown >= 0) refill(at("look-card"), this.trace.tokens[this.shown]);
    for (const dot of at("look-plots").querySelectorAll(".dot")) dot.classList.toggle("on", Number(dot.dataset.place) === this.pinned);
  }

  draw() {
    const { tokens } = this.trace;
    at("look-result").hidden = false;
    this.close({ refocus: false });
    this.measures = measures(tokens);
    this.strip = new Strip(at("look-tokens"), {
      label: word("look.tokens"),
      show: (place) => this.show(place),
      open: (place) => this.open(place),
      close: () => this.close(),
    });
    for (const token of tokens) this.strip.add(token.text);
    this.#choices();
    this.colour();
  }

  #choices() {
    const select = at("look-measure");
    select.replaceChildren(...["index", "tables", "loss"].map((group) => {
      const options = this.measures.filter((measure) => measure.group === group);
      return options.length ? el("optgroup", { label: word(`m.group.${group}`) }, options.map((measure) => el("option", { value: measure.key }, measure.name))) : null;
    }).filter(Boolean));
    // What was chosen stays; before that, the index where it saved anything to speak of, else the tables.
    const group = beginning(this.trace.tokens);
    const wanted = this.measures.find((measure) => measure.key === this.chosen) ?? this.measures.find((measure) => measure.group === group);
    if (wanted) select.value = wanted.key;
    const orders = [...new Set(this.trace.tokens.flatMap((token) => (token.seen ?? []).filter((one) => one.count !== null).map((one) => one.order)))].sort();
    const order = at("look-order").value;
    at("look-order").replaceChildren(...orders.map((n) => el("option", { value: n }, word("scatter.words", { n }))));
    if (orders.includes(Number(order))) at("look-order").value = order;
    else if (orders.includes(2)) at("look-order").value = 2;
    at("look-order-row").hidden = !orders.length;
  }

  get measure() {
    return this.measures.find((measure) => measure.key === at("look-measure").value) ?? this.measures[0];
  }

  colour() {
    const { measure } = this;
    if (!measure) {
      at("look-note").textContent = word("look.nothing");
      at("look-legend").replaceChildren();
      at("look-plots").replaceChildren();
      this.strip.paint(() => ({ heat: null, told: word("none") }));
      return;
    }
    this.strip.paint((i) => {
      const value = measure.values[i];
      if (value === null || value === undefined) return { heat: null, told: word("none") };
      return { heat: value / measure.full, told: measure.told(value) };
    });
    legend(at("look-legend"), { low: measure.low, high: measure.high, signed: measure.signed });
    at("look-note").textContent = measure.note;
    this.plots();
    this.numbers();
  }

  #points(of) {
    const { tokens } = this.trace;
    return tokens.map((token, place) => ({ x: of(token, place), y: this.measure.values[place], place, text: token.text }))
      .filter((point) => typeof point.x === "number" && typeof point.y === "number");
  }

  #count(token) {
    const order = Number(at("look-order").value);
    return (token.seen ?? []).find((one) => one.order === order)?.count ?? null;
  }

  plots() {
    const { measure } = this;
    if (!measure) return;
    const choose = (place) => {
      this.strip.focus(place);
      this.open(place);
    };
    const figures = [];
    if (at("look-order").value) {
      figures.push(scatter({ points: this.#points((token) => this.#count(token)), counts: true, unit: measure.full === 1 && !measure.signed, choose, yName: measure.name,
        xName: word("scatter.frequency", { n: at("look-order").value }) }));
    }
    if (measure.saved?.some((value) => typeof value === "number")) {
      figures.push(scatter({ points: this.#points((_, place) => measure.saved[place]), unit: measure.full === 1 && !measure.signed, choose, yName: measure.name,
        xName: word(measure.group === "tables" ? "scatter.saved.next" : "scatter.saved") }));
    }
    at("look-plots").replaceChildren(...figures);
  }

  numbers() {
    if (!at("look-numbers").open || !this.measure) return;
    const { measure } = this;
    at("look-table").replaceChildren(table(
      word("scatter.table", { name: measure.name }),
      [word("token"), measure.name, word("scatter.seen"), word("scatter.saved.short")],
      this.trace.tokens.map((token, i) => [quoted(token.text), number(measure.values[i]), whole(this.#count(token)), measure.saved ? signed(measure.saved[i] ?? null) : "–"]),
    ));
  }

  /** Shows token `place` in the card without pinning it; -1 goes back to the pinned one. */
  show(place) {
    const wanted = place < 0 ? this.pinned : place;
    if (this.closing || wanted < 0 || wanted === this.shown) return;
    this.shown = wanted;
    this.asking?.abort();
    clearTimeout(this.later);
    fill(at("look-card"), this.trace.tokens, wanted, {
      close: () => this.close(),
      sources: (box) => {
        this.asking = new AbortController();
        const { signal } = this.asking;
        // A pointer that only passes asks for nothing.
        this.later = setTimeout(() => passages(box, this.trace.tokens, wanted, signal), 350);
      },
    });
  }

  open(place) {
    this.pinned = place;
    this.show(place);
    this.strip.mark(place);
    at("look-card").dataset.open = "yes";
    // Where the card is a sheet over the page's lower part, the token goes above it.
    if (getComputedStyle(at("look-card")).position === "fixed") this.strip.tokens[place].scrollIntoView({ block: "start" });
    for (const dot of at("look-plots").querySelectorAll(".dot")) dot.classList.toggle("on", Number(dot.dataset.place) === place);
  }

  close({ refocus = true } = {}) {
    this.asking?.abort();
    clearTimeout(this.later);
    const before = this.pinned;
    this.pinned = -1;
    this.shown = -1;
    delete at("look-card").dataset.open;
    at("look-card").replaceChildren(el("h3", { id: "look-card-title" }, word("card.title")), el("p", { class: "note" }, word("card.empty")));
    this.strip?.mark(-1);
    for (const dot of at("look-plots").querySelectorAll(".dot.on")) dot.classList.remove("on");
    if (!refocus || before < 0) return;
    this.closing = true;
    this.strip.focus(before);
    this.closing = false;
  }
}

/** The group to begin with. The losses without tables are not there yet, so the tables cannot be asked what they saved. */
function beginning(tokens) {
  const saved = tokens.reduce((sum, token) => sum + (token.index && typeof token.loss_tables === "number" ? token.loss_tables - token.loss : 0), 0);
  return saved > 0.1 * tokens.length || !tokens.some((token) => token.tables) ? "index" : "tables";
}
