// Elements and numbers. Every text a visitor or the server wrote goes through textContent; there is no innerHTML anywhere.
//
//   el("p", { class: "note", dir: "auto" }, "text", el("b", {}, "more"))

const SVG = "http://www.w3.org/2000/svg";

/** The element with this id. */
export const at = (id) => document.getElementById(id);

/** A new HTML element. Properties that begin with "on" are listeners, the others attributes; null and false leave one out. */
export function el(tag, properties = {}, ...children) {
  return filled(document.createElement(tag), properties, children);
}

/** A new SVG element. */
export function svg(tag, properties = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), properties, children);
}

function filled(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** Sets a CSS custom property: the only way numbers reach the style sheet, as the policy forbids style attributes. */
export function tune(node, name, value) {
  node.style.setProperty(name, String(value));
  return node;
}

/** A table with its caption; rows are lists of cells, the first of each row its header. A cell is text or a node. */
export function table(caption, heads, rows, { unseenCaption = false, className = "" } = {}) {
  const cell = (tag, content, properties = {}) => el(tag, properties, content);
  return el(
    "table",
    { class: className || null },
    el("caption", { class: unseenCaption ? "unseen" : null }, caption),
    el("thead", {}, el("tr", {}, heads.map((head) => cell("th", head, { scope: "col" })))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((content, column) =>
      column ? cell("td", content) : cell("th", content, { scope: "row", dir: "auto" }))))),
  );
}

/** A box whose content may be wider than the page, for keyboards too. */
export const wide = (label, ...children) => el("div", { class: "wide", role: "region", tabindex: 0, "aria-label": label }, ...children);

/** Whole numbers with thousands separators. */
export const whole = (n) => (n === null || n === undefined ? "–" : Math.round(n).toLocaleString(document.documentElement.lang));

/** A number with some digits, in plain or scientific notation: 0.83, 12.4, 3.1 × 10⁻⁵. */
export function number(x, digits = 2) {
  if (x === null || x === undefined || !Number.isFinite(x)) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 0.001 && size < 1e5) return size >= 100 ? x.toFixed(0) : x.toFixed(size < 0.1 ? digits + 1 : digits);
  const [mantissa, power] = x.toExponential(1).split("e");
  const raised = [...String(Number(power))].map((sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)]).join("");
  return `${mantissa} × 10${raised}`;
}

/** A part of one, such as r, λ or a gate: 0.83, and "< 0.01" rather than many zeros. */
export function part(x) {
  if (x === null || x === undefined) return "–";
  return x > 0 && x < 0.005 ? "<\u00a00.01" : x.toFixed(2);
}

/** A probability in percent. */
export function percent(p) {
  if (p === null || p === undefined) return "–";
  if (p === 0) return "0\u00a0%";
  if (p < 0.0005) return "<\u00a00.05\u00a0%";
  return `${(100 * p).toFixed(p === 1 ? 0 : 1)}\u00a0%`;
}

/** A duration given in ms: 1.3 ms, 210 ms, 2.4 s. */
export function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 10) return `${ms.toFixed(1)}\u00a0ms`;
  return ms < 1000 ? `${Math.round(ms)}\u00a0ms` : `${(ms / 1000).toFixed(1)}\u00a0s`;
}

/** A token's text where it must be seen alone: spaces as ␣, line breaks as ↵, a part of a character as ‹…›. */
export function visible(text) {
  if (!text.replaceAll("\ufffd", "")) return "‹…›";
  return text.replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length)).replace(/\r?\n/g, "↵").replace(/\t/g, "⇥");
}

/** A token's text in a node of its own: isolated, so that right-to-left text leaves its neighbours in place. */
export const quoted = (text) => el("bdi", { class: "token" }, visible(text));

/** UTF-8 bytes of a text. */
export const bytesOf = (text) => new TextEncoder().encode(text).length;
