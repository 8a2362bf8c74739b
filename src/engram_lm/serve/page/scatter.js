// A scatter plot drawn by hand in SVG, and the two correlations written beside it.

import { el, number, svg, visible } from "./elements.js";
import { word } from "./words.js";

const WIDTH = 350;
const HEIGHT = 230;
const EDGE = { left: 46, right: 12, top: 12, bottom: 40 };

/** Pearson's correlation of two lists; null where one of them does not vary. */
export function pearson(xs, ys) {
  const n = xs.length;
  const [mx, my] = [xs, ys].map((list) => list.reduce((a, b) => a + b, 0) / n);
  let [xy, xx, yy] = [0, 0, 0];
  for (let i = 0; i < n; i += 1) {
    xy += (xs[i] - mx) * (ys[i] - my);
    xx += (xs[i] - mx) ** 2;
    yy += (ys[i] - my) ** 2;
  }
  return xx > 1e-18 && yy > 1e-18 ? xy / Math.sqrt(xx * yy) : null;
}

/** Spearman's: Pearson's of the ranks, equal values sharing their mean rank. */
export function spearman(xs, ys) {
  return pearson(ranks(xs), ranks(ys));
}

function ranks(values) {
  const order = values.map((value, i) => [value, i]).sort((a, b) => a[0] - b[0]);
  const out = new Array(values.length);
  for (let i = 0; i < order.length;) {
    let j = i;
    while (j + 1 < order.length && order[j + 1][0] === order[i][0]) j += 1;
    for (let k = i; k <= j; k += 1) out[order[k][1]] = (i + j) / 2;
    i = j + 1;
  }
  return out;
}

/** A figure: points { x, y, place, text }, their correlations, and a choice by mouse. counts: x is a count, drawn as log. unit: y goes from 0 to 1. */
export function scatter({ points, xName, yName, counts = false, unit = false, choose }) {
  const xs = points.map((point) => (counts ? Math.log10(1 + point.x) : point.x));
  const ys = points.map((point) => point.y);
  const [x0, x1] = range(xs, counts);
  const [y0, y1] = unit ? [-0.04, 1.04] : range(ys);
  const px = (x) => EDGE.left + ((x - x0) / (x1 - x0)) * (WIDTH - EDGE.left - EDGE.right);
  const py = (y) => HEIGHT - EDGE.bottom - ((y - y0) / (y1 - y0)) * (HEIGHT - EDGE.top - EDGE.bottom);
  const said = spoken(xs, ys);
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${yName} / ${xName}. ${said}` });
  for (const tick of ticks(y0, y1)) {
    drawing.append(svg("line", { class: "grid", x1: EDGE.left, x2: WIDTH - EDGE.right, y1: py(tick), y2: py(tick) }));
    drawing.append(svg("text", { class: "tick", x: EDGE.left - 6, y: py(tick) + 4, "text-anchor": "end" }, short(tick)));
  }
  for (const tick of counts ? decades(x1) : ticks(x0, x1)) {
    drawing.append(svg("text", { class: "tick", x: px(tick), y: HEIGHT - EDGE.bottom + 16, "text-anchor": "middle" },
      short(counts ? Math.round(10 ** tick - 1) : tick)));
  }
  drawing.append(svg("text", { class: "axis", x: (EDGE.left + WIDTH - EDGE.right) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, xName));
  points.forEach((point, i) => {
    const dot = svg("circle", { class: "dot", cx: px(xs[i]).toFixed(1), cy: py(ys[i]).toFixed(1), r: 4, "data-place": point.place },
      svg("title", {}, `${visible(point.text)}: ${yName} ${number(point.y)}, ${xName} ${counts ? point.x : number(point.x)}`));
    dot.addEventListener("click", () => choose(point.place));
    drawing.append(dot);
  });
  return el("figure", { class: "plot" }, el("figcaption", {}, el("b", {}, yName), ` ${word("scatter.against")} `, el("b", {}, xName)), drawing, el("p", { class: "note" }, said));
}

/** The correlations in words. */
function spoken(xs, ys) {
  const n = xs.length;
  if (n < 8) return word("scatter.few", { n });
  const r = pearson(xs, ys);
  const rho = spearman(xs, ys);
  if (r === null || rho === null) return word("scatter.flat", { n });
  // Below twice the standard error of no link at all, 1 / sqrt(n - 1), nothing is claimed.
  const size = Math.abs(rho) < 2 / Math.sqrt(n - 1) ? 0 : Math.abs(rho);
  const verdict = word(size < 0.2 ? "scatter.none" : size < 0.5 ? "scatter.some" : "scatter.much");
  return word("scatter.said", { r: fixed(r), rho: fixed(rho), n, verdict });
}

const fixed = (x) => `${x < 0 ? "−" : ""}${Math.abs(x).toFixed(2)}`;
const short = (x) => (Math.abs(x) >= 1000 ? `${Number((x / 1000).toPrecision(3))}k` : String(Number(x.toPrecision(3)))).replace("-", "−");

function range(values, fromZero = false) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (fromZero) low = 0;
  if (!(high - low > 1e-9)) [low, high] = [low - (fromZero ? 0 : 0.5), high + 0.5];
  const air = (high - low) * 0.05;
  return [low - air, high + air];
}

function ticks(low, high) {
  const raw = (high - low) / 4;
  const base = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * base).find((s) => s >= raw);
  const out = [];
  for (let t = Math.ceil(low / step) * step; t <= high + 1e-12; t += step) out.push(Math.abs(t) < step / 1e6 ? 0 : t);
  return out;
}

/** Counts 0, 1, 10, 100 … where they lie on an axis of log10(1 + count). */
function decades(high) {
  const out = [0];
  for (let count = 1; Math.log10(1 + count) <= high; count *= 10) out.push(Math.log10(1 + count));
  return out;
}
