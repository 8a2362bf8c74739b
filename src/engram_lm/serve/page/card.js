// Everything known of one token: what the exact index said when it was predicted, what the learned tables did when it was
// read, and the passages of the documents that the match stands in.

import { el, number, part, percent, quoted, table, tune, whole, wide } from "./elements.js";
import { signed } from "./measures.js";
import { post } from "./server.js";
import { word } from "./words.js";

/** Fills `card` for token `place` of a trace's tokens; sources(box) is called where passages may be shown. */
export function fill(card, tokens, place, { close, sources }) {
  const token = tokens[place];
  const title = el("h3", { id: "look-card-title", tabindex: "-1" }, quoted(token.text), " ",
    el("small", {}, word("card.place", { place: place + 1, id: token.id })));
  const box = el("div", { class: "sources" });
  card.replaceChildren(
    el("button", { type: "button", class: "quiet close", "aria-label": word("card.close"), onclick: close }, "✕"),
    title,
    ...predicted(token),
    box,
    ...read(token),
  );
  sources(box);
  return title;
}

function pairs(...rows) {
  return el("dl", { class: "pairs" }, rows.filter(Boolean).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

function predicted(token) {
  const out = [el("h4", {}, word("card.index"))];
  const memory = token.index;
  if (typeof token.loss !== "number") return [...out, el("p", { class: "note" }, word("card.first"))];
  if (!memory) out.push(el("p", { class: "note" }, word("card.no.index")));
  else {
    const match = memory.depth
      ? word("card.match.told", { depth: memory.depth, count: whole(memory.count), documents: whole(memory.documents), distinct: whole(memory.distinct) })
      : word("card.match.none");
    out.push(el("p", {}, match));
    out.push(pairs(
      ["r", el("span", {}, part(memory.r), " ", tune(el("i", { class: "bar memory", "aria-hidden": "true" }), "--p", memory.r ?? 0))],
      ["λ", part(memory.lambda)],
      [word("p.model"), percent(memory.p_model)],
      [word("p.memory"), percent(memory.p_memory)],
      [word("p.mix"), percent(memory.p)],
    ));
  }
  out.push(el("div", { class: "losses" }, losses(token)));
  return out;
}

/** The losses alone, in a card that shows `token` already: those without memory came later. */
export function refill(card, token) {
  card.querySelector(".losses")?.replaceChildren(losses(token));
}

function losses(token) {
  const after = (value) => `${word("nats", { value: number(value) })}${typeof token.loss_off === "number" ? ` (${word("saved", { value: signed(token.loss_off - value) })})` : ""}`;
  return pairs(
    [word("card.loss.off"), typeof token.loss_off === "number" ? word("nats", { value: number(token.loss_off) }) : "…"],
    typeof token.loss_tables === "number" ? [word("card.loss.tables"), after(token.loss_tables)] : null,
    token.index ? [word(token.tables ? "card.loss.both" : "card.loss.index"), after(token.loss)] : null,
  );
}

function read(token) {
  const out = [el("h4", {}, word("card.tables"))];
  const seen = (token.seen ?? []).filter((one) => one.count !== null);
  if (!token.tables?.length) out.push(el("p", { class: "note" }, word("card.no.tables")));
  for (const layer of token.tables ?? []) {
    const counts = new Map((token.seen ?? []).map((one) => [one.order, one.count]));
    out.push(el("div", { class: "layer" },
      el("h5", {}, word("card.layer", { layer: layer.layer })),
      el("ul", { class: "gates" }, layer.gates.map((gate, branch) => el("li", {},
        layer.gates.length > 1 ? word("card.branch", { branch: branch + 1 }) : word("card.gate"), " ", el("b", {}, part(gate)), " ",
        tune(el("i", { class: "bar memory", "aria-hidden": "true" }), "--p", gate ?? 0)))),
      el("p", { class: "note" }, word("card.added", { value: number(layer.added) })),
      wide(word("card.ngrams", { layer: layer.layer }), table(word("card.ngrams", { layer: layer.layer }), [word("card.ngram"), word("card.seen"), word("card.norm")],
        layer.ngrams.map((gram) => [quoted(gram.text), whole(counts.get(gram.order) ?? null), number(gram.norm)]), { unseenCaption: true })),
      el("details", {}, el("summary", {}, word("card.addresses")),
        el("ul", { class: "addresses" }, layer.ngrams.map((gram) => el("li", {}, quoted(gram.text), " ", gram.addresses.join(" "))))),
    ));
  }
  if (!token.tables?.length && seen.length) {
    out.push(pairs(...seen.map((one) => [word("card.order", { order: one.order }), word("card.times", { count: whole(one.count) })])));
  }
  return out;
}

const found = new Map();

/** Passages with the words that matched before token `place`, put into `box`; asked for once a text. */
export async function passages(box, tokens, place, signal) {
  const token = tokens[place];
  const depth = token.index?.depth ?? 0;
  const context = tokens.slice(Math.max(0, place - depth), place).map((one) => one.text).join("");
  if (!context.trim()) return;
  box.replaceChildren(el("h4", {}, word("card.sources")), el("p", { class: "note" }, word("card.looking")));
  try {
    // With the token itself, if it stands there; else what came before it.
    let list = await looked(context + token.text, signal);
    if (!list.length) list = await looked(context, signal);
    box.replaceChildren(el("h4", {}, word("card.sources")), hits(list));
  } catch (error) {
    if (error.name !== "AbortError") box.replaceChildren(el("h4", {}, word("card.sources")), el("p", { class: "note" }, error.message));
  }
}

async function looked(text, signal) {
  if (!found.has(text)) found.set(text, (await post("/api/index/search", { text, limit: 3 }, { signal })).hits);
  return found.get(text);
}

/** After documents came or went, passages are asked for again. */
export const forget = () => found.clear();

/** A list of passages: [{ document, count, passage }], the passage { before, match, after }. */
export function hits(list) {
  if (!list?.length) return el("p", { class: "note" }, word("card.sources.none"));
  return el("ul", { class: "hits" }, list.map((hit) => el("li", {},
    el("p", { class: "source" }, el("b", {}, el("bdi", {}, hit.document)), " ", word("card.times", { count: whole(hit.count) })),
    hit.passage ? el("blockquote", { dir: "auto" }, ...passage(hit.passage)) : null)));
}

// A passage may begin or end within a character.
const passage = ({ before, match, after }) => [before.replace(/^\ufffd+/, ""), el("mark", {}, match), after.replace(/\ufffd+$/, "")];
