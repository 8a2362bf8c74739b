// What a trace can be coloured by: every layer and branch of the learned tables, what they added, their means, the exact
// index's responsibility, and the loss that either saved. No one of these is the truth about "how much memory did".
//
// Positions: a gate is read where the model READS a token, and acts on the prediction of the next one; r and the losses
// belong to the PREDICTION of the token itself. So a gate at i is set against the loss saved at i + 1.

import { number, part } from "./elements.js";
import { word } from "./words.js";

const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);

/** Measures of a trace's tokens: { key, group, name, values, low, high, signed, saved, told }, `saved` being the loss to
 * set the values against (null where the measure is itself a loss). */
export function measures(tokens) {
  const found = [];
  const add = (measure) => {
    if (measure.values.some((value) => value !== null && value !== undefined)) found.push(measure);
  };
  // Without tables the index stands on the model's own loss.
  const byIndex = tokens.map((token) => (token.index ? difference(token.loss_tables ?? token.loss_off, token.loss) : null));
  const byTables = tokens.map((token) => difference(token.loss_off, token.loss_tables));
  const byBoth = tokens.map((token) => difference(token.loss_off, token.loss));
  const next = tokens.map((token, i) => byTables[i + 1] ?? null);
  const unit = { low: "0", high: "1", full: 1, signed: false };

  add({ key: "r", group: "index", name: word("m.r"), values: tokens.map((token) => token.index?.r ?? null),
    saved: byIndex, told: (value) => `r ${part(value)}`, note: word("m.r.note"), ...unit });
  add({ key: "lambda", group: "index", name: word("m.lambda"), values: tokens.map((token) => token.index?.lambda ?? null),
    saved: byIndex, told: (value) => `λ ${part(value)}`, note: word("m.lambda.note"), ...unit });

  const layers = tokens.find((token) => token.tables?.length)?.tables ?? [];
  const of = (take) => tokens.map((token) => (token.tables?.length ? take(token.tables) : null));
  const several = new Set(layers.map((layer) => layer.memory)).size > 1;
  const named = (layer) => (several ? `${layer.layer} (${layer.memory})` : layer.layer);
  if (layers.length) {
    const gate = (value) => `${word("m.gate")} ${part(value)}`;
    const note = word("m.gate.note");
    if (layers.length > 1 || layers[0].gates.length > 1) {
      const gates = (tables) => mean(tables.flatMap((one) => one.gates).filter((one) => one !== null));
      add({ key: "gate", group: "tables", name: word("m.gate.mean"), values: of(gates),
        saved: next, told: gate, note, ...unit });
    }
    layers.forEach((layer, at) => layer.gates.forEach((_, branch) => add({
      key: `gate-${at}-${branch}`, group: "tables",
      name: layer.gates.length > 1 ? word("m.gate.branch", { layer: named(layer), branch: branch + 1 }) : word("m.gate.layer", { layer: named(layer) }),
      values: of((tables) => tables[at]?.gates[branch] ?? null), saved: next, told: gate, note, ...unit,
    })));
    layers.forEach((layer, at) => {
      const values = of((tables) => tables[at]?.added ?? null);
      const full = Math.max(...values.filter((value) => value !== null), 0.01);
      add({ key: `added-${at}`, group: "tables", name: word("m.added", { layer: named(layer) }), values, saved: next,
        told: (value) => word("m.added.told", { value: number(value) }), note: word("m.added.note"), low: "0", high: number(full), full, signed: false });
    });
  }
  const loss = (key, name, values) => {
    const full = Math.max(1, ...values.filter((value) => value !== null).map(Math.abs));
    add({ key, group: "loss", name, values, saved: null, told: (value) => word("m.saved.told", { value: signed(value) }),
      note: word("m.saved.note"), low: `−${number(full)}`, high: `+${number(full)}`, full, signed: true });
  };
  const either = byIndex.some((value) => value) && byTables.some((value) => value);
  if (either) loss("saved", word("m.saved.both"), byBoth);
  if (byIndex.some((value) => value)) loss("saved-index", word("m.saved.index"), byIndex);
  if (byTables.some((value) => value)) loss("saved-tables", word("m.saved.tables"), byTables);
  return found;
}

const difference = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : null);

/** A number with its sign. */
export const signed = (x) => (x === null ? "–" : `${x < 0 ? "−" : "+"}${number(Math.abs(x))}`);
