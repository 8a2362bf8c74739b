// The panel Think or look up: next tokens of the model alone, of memory and of their mix, candidates whose probability
// moves with λ, and generation whose heat follows token by token.

import { hits } from "./card.js";
import { Chances } from "./chances.js";
import { at, duration, el, part, percent, quoted, tune, whole } from "./elements.js";
import { chips } from "./examples.js";
import { Task, post } from "./server.js";
import { word } from "./words.js";
import { Writing } from "./writing.js";

export class Think {
  constructor() {
    this.task = new Task(at("think-status"));
    this.writer = new Task(at("think-writer-status"));
    this.answer = null;
    this.pinned = null;
    at("think-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    at("think-generate").addEventListener("click", () => this.generate());
    at("think-stop").addEventListener("click", () => this.writer.stop());
    at("think-lambda").addEventListener("input", () => this.pin(Number(at("think-lambda").value) / 100));
    at("think-rest").addEventListener("click", () => this.pin(null));
    for (const id of ["think-tables", "think-index"]) at(id).addEventListener("change", () => this.again());
    at("think-heat").addEventListener("change", () => this.writing?.colour(at("think-heat").value, at("think-legend")));
  }

  ready(about) {
    this.about = about;
    chips(at("think-examples"), about.examples?.think, (example) => {
      this.#take(example);
      this.run();
    });
    const first = about.examples?.think?.[0];
    if (first && !at("think-prompt").value) this.#take(first);
    at("think-tables-label").hidden = !about.tables;
    at("think-index-label").hidden = !about.index;
    const heats = [about.index ? ["r", word("m.r")] : null, about.tables ? ["tables", word("m.tables.heat")] : null].filter(Boolean);
    const before = at("think-heat").value;
    at("think-heat").replaceChildren(...heats.map(([key, name]) => el("option", { value: key }, name)));
    at("think-heat-field").hidden = !heats.length;
    if (heats.some(([key]) => key === before)) at("think-heat").value = before;
    this.#told();
  }

  speak() {
    if (this.about) this.ready(this.about);
    if (this.answer) this.draw();
    this.writing?.speak(at("think-heat").value, at("think-legend"));
  }

  #take(example) {
    this.pinned = null;
    at("think-prompt").value = example.prompt;
    at("think-candidates").value = (example.candidates ?? []).join("\n");
  }

  get #asked() {
    return {
      prompt: at("think-prompt").value,
      tables: Boolean(this.about?.tables) && at("think-tables").checked,
      index: Boolean(this.about?.index) && at("think-index").checked,
      lam: this.pinned,
    };
  }

  #empty() {
    if (at("think-prompt").value.trim()) return false;
    this.task.say(word("think.empty"), "error");
    at("think-prompt").focus();
    return true;
  }

  async run({ quiet = false } = {}) {
    if (this.#empty()) return;
    const candidates = at("think-candidates").value.split("\n").map((line) => line.trim()).filter(Boolean);
    await this.task.run(async (signal) => {
      this.answer = await post("/api/next", { ...this.#asked, k: 10, candidates }, { signal });
      this.draw();
      this.task.say(quiet ? "" : word("think.done", { ms: duration(this.answer.ms) }));
    });
  }

  /** λ pinned, or null for the gate's own. Candidates move at once, the lists when the slider has come to rest. */
  pin(lam) {
    this.pinned = lam;
    this.chances?.move(this.#lam);
    this.again(300);
  }

  again(wait = 0) {
    clearTimeout(this.later);
    this.#told();
    if (this.answer) this.later = setTimeout(() => this.run({ quiet: true }), wait);
  }

  get #lam() {
    return at("think-index").checked && this.about?.index ? this.pinned : 0;
  }

  #told() {
    const slider = at("think-lambda");
    const resting = this.gateLambda ?? 0;
    if (this.pinned === null) slider.value = String(Math.round(100 * resting));
    const told = this.pinned === null
      ? (this.gateLambda === undefined ? word("lambda.gate") : word("lambda.gate.is", { value: part(resting) }))
      : word("lambda.pinned", { value: part(this.pinned) });
    at("think-lambda-told").textContent = told;
    slider.setAttribute("aria-valuetext", told);
    tune(slider, "--rest", resting);
    slider.dataset.rests = this.gateLambda === undefined ? "no" : "yes";
    at("think-rest").disabled = this.pinned === null;
    slider.disabled = !this.about?.index || !at("think-index").checked;
  }

  draw() {
    const { answer } = this;
    const { match } = answer;
    at("think-result").hidden = false;
    // A pinned answer names the gate's λ only where there is a candidate: at its first token.
    if (at("think-index").checked) this.gateLambda = this.pinned === null ? (answer.lambda ?? 0) : (answer.candidates?.[0]?.tokens[0]?.lambda ?? this.gateLambda);
    this.#told();
    const note = at("think-match");
    if (!match) note.replaceChildren(word("think.match.off"));
    else if (!match.depth) note.replaceChildren(word("think.match.none"));
    else {
      note.replaceChildren(word("think.match", { depth: match.depth, count: whole(match.count), documents: whole(match.documents) }), " ",
        el("bdi", { class: "quote" }, match.text.trim()));
    }
    const lam = answer.lambda ?? 0;
    const model = new Map(answer.model.map((one) => [one.id, one.p]));
    const memory = new Map((answer.memory ?? []).map((one) => [one.id, one.p]));
    const red = (one) => {
      const given = memory.has(one.id) ? lam * memory.get(one.id) : model.has(one.id) ? one.p - (1 - lam) * model.get(one.id) : 0;
      return one.p ? Math.min(1, Math.max(0, given / one.p)) : 0;
    };
    at("think-lists").replaceChildren(
      list(word("think.alone"), answer.model, () => 0, word("think.alone.none")),
      list(word("think.memory"), answer.memory ?? [], () => 1, word("think.memory.none")),
      list(word("think.mix", { value: part(lam) }), answer.mix, red, ""),
    );
    this.chances = null;
    at("think-chances").replaceChildren();
    if (answer.candidates?.length) {
      this.chances = new Chances(at("think-chances"), answer.candidates);
      this.chances.move(this.#lam);
    }
    at("think-sources").replaceChildren();
    if (answer.sources?.length) at("think-sources").append(el("h3", {}, word("think.sources")), hits(answer.sources));
  }

  async generate() {
    if (this.#empty()) return;
    const { prompt, tables, index, lam } = this.#asked;
    const body = { prompt, chat: false, max_tokens: Number(at("think-length").value), arm: index ? "memory" : "alone", tables,
      lam: index ? lam : null, documents: null, temperature: 0 };
    at("think-written").hidden = false;
    at("think-lines").replaceChildren();
    at("think-told").textContent = "";
    this.writing = new Writing(at("think-tokens"), {
      label: word("think.written"), live: at("think-live"), given: prompt, show: (told) => { at("think-told").textContent = told; },
    });
    this.writing.colour(at("think-heat").value, at("think-legend"));
    at("think-stop").hidden = false;
    await this.writer.run(async (signal) => {
      const done = await this.writing.follow(body, signal, (text) => this.writer.say(text, "working"));
      this.writer.say(word("written", { tokens: done.tokens, ms: duration(done.ms), first: duration(done.first_token_ms) }));
      at("think-lines").replaceChildren(...(done.told ?? []).map((line) => el("li", {}, line)));
    }, { doing: "writing" });
    if (document.activeElement === at("think-stop")) at("think-generate").focus();
    at("think-stop").hidden = true;
  }
}

/** A next-token list with bars; red(token) is the part of its probability that memory gave, 0 to 1. */
function list(name, tokens, red, none) {
  const rows = tokens.map((one) => el("tr", {},
    el("th", { scope: "row" }, quoted(one.text)),
    el("td", { class: "bars" }, tune(tune(el("i", { class: "bar split-bar", "aria-hidden": "true" }), "--p", one.p), "--red", red(one))),
    el("td", { class: "figure" }, percent(one.p))));
  return el("div", { class: "list" },
    el("table", {}, el("caption", {}, name),
      el("thead", { class: "unseen" }, el("tr", {}, el("th", { scope: "col" }, word("token")), el("td"), el("th", { scope: "col" }, word("probability")))),
      el("tbody", {}, rows)),
    rows.length ? null : el("p", { class: "note" }, none));
}
