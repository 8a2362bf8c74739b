// The panel Quiz: closed-book questions on invented facts. The visitor answers first, then the model alone, with retrieval
// and with memory; questions in the document's words and in other words are counted apart.

import { at, duration, el, table, whole, wide } from "./elements.js";
import { Task, get, post } from "./server.js";
import { word } from "./words.js";

const PLAYERS = ["you", "alone", "retrieval", "memory"];
const KINDS = ["verbatim", "paraphrased"];

export class Quiz {
  constructor() {
    this.questions = null;
    this.place = 0;
    this.scores = Object.fromEntries(PLAYERS.map((player) => [player, Object.fromEntries(KINDS.map((kind) => [kind, [0, 0]]))]));
    this.status = el("p", { class: "status", role: "status" });
    this.task = new Task(this.status);
    this.answers = null;
  }

  async ready() {
    if (this.questions) return;
    await this.task.run(async (signal) => {
      const { questions } = await get("/api/quiz", { signal });
      this.questions = alternating(questions);
      this.draw();
    });
    if (!this.questions) this.draw();
  }

  speak() {
    this.draw();
  }

  get question() {
    return this.questions?.[this.place];
  }

  draw({ focus = false } = {}) {
    const box = at("quiz-question");
    this.#scores();
    if (!this.questions?.length) {
      box.replaceChildren(el("p", { class: "note" }, this.questions ? word("quiz.none") : ""), this.status);
      return;
    }
    if (!this.question) {
      box.replaceChildren(el("h3", { tabindex: "-1" }, word("quiz.end")), el("p", {}, word("quiz.end.what")),
        el("button", { type: "button", class: "second", onclick: () => this.#turn(0) }, word("quiz.again")));
      return;
    }
    const { question } = this;
    const kept = at("quiz-answer")?.value ?? "";
    const input = el("input", { type: "text", id: "quiz-answer", dir: "auto", autocomplete: "off" });
    input.value = this.answers?.you?.typed ?? kept;
    input.readOnly = Boolean(this.answers);
    const heading = el("h3", { tabindex: "-1" }, word("quiz.count", { place: this.place + 1, all: this.questions.length }), " ",
      el("span", { class: "kind" }, word(`quiz.${question.kind}`)));
    box.replaceChildren(
      heading,
      el("p", { class: "question", dir: "auto" }, question.prompt),
      el("form", { class: "ask", onsubmit: (event) => { event.preventDefault(); this.answer(); } },
        el("label", { for: "quiz-answer" }, word("quiz.yours")), input,
        el("div", { class: "actions" },
          this.answers ? null : el("button", { type: "submit", class: "primary" }, word("quiz.answer")),
          this.answers ? null : el("button", { type: "button", class: "second", onclick: () => this.answer("") }, word("quiz.unknown")),
          el("button", { type: "button", id: "quiz-next", class: this.answers?.memory ? "primary" : "second", onclick: () => this.#turn(this.place + 1) }, word(this.answers ? "quiz.next" : "quiz.skip")),
          this.status)),
      this.#answers(),
    );
    if (focus) heading.focus();
  }

  #turn(place) {
    this.task.stop();
    this.place = place;
    this.answers = null;
    const input = at("quiz-answer");
    if (input) input.value = "";
    this.task.say("");
    this.draw({ focus: true });
  }

  #answers() {
    const box = el("div", { id: "quiz-answers" });
    if (!this.answers) return box;
    const rows = PLAYERS.filter((player) => this.answers[player]).map((player) => {
      const one = this.answers[player];
      return [word(`player.${player}`), el("bdi", { class: "said" }, one.text || "–"),
        el("span", { class: one.right ? "right" : "wrong" }, one.right ? `✓ ${word("right")}` : `✗ ${word("wrong")}`),
        one.ms === undefined ? "" : duration(one.ms), one.prompt_tokens === undefined ? "" : whole(one.prompt_tokens)];
    });
    box.append(
      el("p", {}, word("quiz.expected"), " ", el("b", {}, el("bdi", {}, this.expected)), this.question.document ? el("small", {}, " ", word("quiz.from", { name: this.question.document })) : null),
      wide(word("quiz.table"), table(word("quiz.table"), ["player", "answer", "result", "time", "prompt.tokens"].map((key) => word(key)), rows, { unseenCaption: true })));
    return box;
  }

  async answer(typed = at("quiz-answer").value) {
    const { question } = this;
    const answers = {};
    this.answers = answers;
    // Whoever went on to another question wants no answers to this one.
    const keep = (player, one) => { if (this.answers === answers) this.#keep(player, question, one); };
    await this.task.run(async (signal) => {
      const mine = await post("/api/quiz/answer", { id: question.id, answer: typed }, { signal });
      this.expected = Array.isArray(mine.expected) ? mine.expected.join(" / ") : mine.expected;
      keep("you", { typed, text: typed, right: mine.right });
      for (const arm of PLAYERS.slice(1)) {
        this.task.say(`${word(`player.${arm}`)}: ${word("writing")}`, "working");
        const one = await post("/api/quiz/answer", { id: question.id, arm }, { signal });
        keep(arm, { text: one.answer, right: one.right, ms: one.ms, prompt_tokens: one.prompt_tokens });
      }
      this.task.say(word("quiz.told", { names: PLAYERS.filter((player) => answers[player].right).map((player) => word(`player.${player}`)).join(", ") || word("nobody") }));
    });
    if (this.question === question) {
      if (!this.answers?.you) this.answers = null;
      this.draw();
      // The button that was pressed is gone: go on where the answers are.
      if (document.activeElement === document.body) at("quiz-next")?.focus();
    }
  }

  #keep(player, question, one) {
    this.answers[player] = one;
    const score = this.scores[player][question.kind];
    score[0] += one.right ? 1 : 0;
    score[1] += 1;
    this.draw();
  }

  #scores() {
    at("quiz-scores").replaceChildren(el("h3", {}, word("quiz.scores")), table(
      word("quiz.scores.caption"), [word("player"), ...KINDS.map((kind) => word(`quiz.${kind}`))],
      PLAYERS.map((player) => [word(`player.${player}`), ...KINDS.map((kind) => this.scores[player][kind].join(" / "))]), { unseenCaption: true }),
    el("p", { class: "note" }, word("quiz.scores.note")));
  }
}

/** Verbatim and paraphrased questions in turn, each kind in the order it came. */
function alternating(questions) {
  const lists = KINDS.map((kind) => questions.filter((question) => question.kind === kind));
  return questions.map((_, i) => i).flatMap((i) => lists.map((list) => list[i])).filter(Boolean);
}
