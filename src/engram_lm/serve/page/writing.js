// Text that is being generated: tokens with heat as they come, one line on the token pointed at, and the same words told to
// screen readers a phrase at a time.

import { el, part, visible, whole } from "./elements.js";
import { stream } from "./server.js";
import { Strip, legend } from "./strip.js";
import { word } from "./words.js";

export class Writing {
  /** show(line) is told about the token pointed at; live is a polite live region; given is the text that is gone on with. */
  constructor(container, { label, live, given = "", show = () => {} }) {
    this.tokens = [];
    this.given = given;
    this.live = live;
    this.phrase = "";
    this.heat = "r";
    this.strip = new Strip(container, {
      label,
      show: (place) => { if (place >= 0) show(this.#line(place)); },
      open: (place) => show(this.#line(place)),
      close: () => show(""),
    });
    if (given) container.prepend(el("span", { class: "given", dir: "auto" }, given));
    live.textContent = "";
  }

  /** Follows /api/generate to its end; gives its last event. say(text) is told what is being waited for. */
  async follow(body, signal, say) {
    for await (const event of stream("/api/generate", body, { signal })) {
      if (event.type === "queued") say(word("queued", { before: event.before }));
      else if (event.type === "start") {
        this.start = event;
        say(word("writing"));
      } else if (event.type === "token") this.#add(event);
      else if (event.type === "done") {
        // Half a character may be left over at the end.
        if (event.text && this.tokens.length) this.#add({ ...this.tokens.at(-1), text: event.text });
        this.#tell();
        return event;
      }
    }
    return null;
  }

  get text() {
    return this.tokens.map((token) => token.text).join("");
  }

  /** heat: "r" (the exact index) or "tables" (the learned ones). */
  colour(heat, legendBox = null) {
    this.heat = heat || "r";
    this.strip.paint((i) => this.#paint(i));
    if (legendBox) legend(legendBox, { low: "0", high: "1" });
  }

  speak(heat, legendBox) {
    this.colour(heat, legendBox);
  }

  #add(token) {
    this.tokens.push(token);
    // The blank before the first word would only look like a mistake.
    this.strip.add(token.text, this.tokens.length === 1 && !this.given ? token.text.trimStart() : token.text);
    this.strip.paint((i) => this.#paint(i), this.tokens.length - 1);
    this.phrase += token.text;
    if (/[.!?。！？\n]\s*$/.test(this.phrase) || this.phrase.length > 60) this.#tell();
  }

  #tell() {
    if (this.phrase.trim()) this.live.append(`${this.phrase} `);
    this.phrase = "";
  }

  #paint(i) {
    const value = this.tokens[i][this.heat === "tables" ? "tables" : "r"];
    return { heat: value ?? null, told: value === null || value === undefined ? word("none") : `${this.heat === "tables" ? word("m.tables.heat") : "r"} ${part(value)}` };
  }

  #line(place) {
    const token = this.tokens[place];
    const parts = [`“${visible(token.text)}”`, `r ${part(token.r)}`];
    if (token.tables !== null && token.tables !== undefined) parts.push(`${word("m.tables.heat")} ${part(token.tables)}`);
    if (token.lambda !== null && token.lambda !== undefined) parts.push(`λ ${part(token.lambda)}`);
    parts.push(token.depth ? word("match.short", { depth: token.depth, count: whole(token.count), documents: whole(token.documents) }) : word("match.short.none"));
    return parts.join(", ");
  }
}
