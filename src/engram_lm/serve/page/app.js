// The page: tabs, language, theme, whether the server is there, and what it serves. Each panel is a module of its own.

import { at, el, whole } from "./elements.js";
import { Look } from "./look.js";
import { Quiz } from "./quiz.js";
import { get, kilobytes, server } from "./server.js";
import { Teach } from "./teach.js";
import { Think } from "./think.js";
import { language, speak, word } from "./words.js";

const NAMES = ["look", "think", "teach", "quiz"];
const panels = { look: new Look(), think: new Think(), teach: new Teach(), quiz: new Quiz() };
let about = null;

// ---- tabs: one tab stop, arrows between them, the panel in the address

function open(name, { focus = false } = {}) {
  for (const one of NAMES) {
    const tab = at(`tab-${one}`);
    tab.setAttribute("aria-selected", String(one === name));
    tab.tabIndex = one === name ? 0 : -1;
    at(one).hidden = one !== name;
  }
  if (focus) at(`tab-${name}`).focus();
  // "#/look" and not "#look": a fragment that is an element's id would move the first tab stop there.
  if (location.hash !== `#/${name}`) history.replaceState(null, "", `#/${name}`);
  if (about && name === "quiz") panels.quiz.ready();
}

const asked = () => NAMES.find((name) => location.hash === `#/${name}`) ?? "look";

for (const name of NAMES) at(`tab-${name}`).addEventListener("click", () => open(name));
at("tabs").addEventListener("keydown", (event) => {
  const here = NAMES.findIndex((name) => at(`tab-${name}`) === event.target);
  const next = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: NAMES.length - 1 }[event.key];
  if (here < 0 || next === undefined) return;
  event.preventDefault();
  open(NAMES[(next + NAMES.length) % NAMES.length], { focus: true });
});
window.addEventListener("hashchange", () => open(asked()));
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  at("panels").focus();
});

// ---- language and theme, remembered

function remember(key, value) {
  try {
    localStorage.setItem(key, value);
  } catch {
    // Without storage the choice lasts as long as the page.
  }
}

const darkly = window.matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (darkly.matches ? "dark" : "light")) === "dark";

function showTheme() {
  at("theme").setAttribute("aria-pressed", String(isDark()));
}

at("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  remember("engram-theme", document.documentElement.dataset.theme);
  showTheme();
});
darkly.addEventListener("change", showTheme);

function showLanguage() {
  speak();
  const other = language() === "en" ? "zh" : "en";
  at("language").textContent = other === "zh" ? "中文" : "English";
  at("language").lang = other === "zh" ? "zh-Hans" : "en";
  describe();
  for (const panel of Object.values(panels)) panel.speak();
}

at("language").addEventListener("click", () => {
  document.documentElement.lang = language() === "en" ? "zh-Hans" : "en";
  remember("engram-language", document.documentElement.lang);
  showLanguage();
});

// Ctrl+Enter or ⌘+Enter in a text sends its form.
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.tagName === "TEXTAREA") event.target.form?.requestSubmit();
});

// The direction of what is typed. dir="auto" on a text area takes Chromium half a minute for a megabyte.
document.addEventListener("input", ({ target }) => {
  if (target.tagName === "TEXTAREA") target.dir = /^[^\p{L}]*[\u0590-\u08ff\ufb1d-\ufefc]/u.test(target.value.slice(0, 500)) ? "rtl" : "ltr";
});

// ---- the server: is it there, is it ready, what does it hold

function banner(key, reload = false) {
  if (at("banner").dataset.key === (key ?? "")) return;
  at("banner").hidden = !key;
  at("banner").replaceChildren(...(key ? [word(key)] : []));
  if (reload) at("banner").append(" ", el("button", { type: "button", class: "second", onclick: () => location.reload() }, word("reload")));
  at("banner").dataset.key = key ?? "";
}

let watching = 0;

/** Asks for health every two seconds while the server is away or loading. */
async function watch() {
  clearTimeout(watching);
  let health = null;
  try {
    health = await get("/api/health");
  } catch {
    // "lost" was told already.
  }
  if (health?.status === "ready") {
    // A server that was away may have been started anew, with another token and other documents.
    if (about) banner(at("banner").dataset.key ? "back" : null, true);
    else await begin();
    return;
  }
  if (health) banner("loading");
  watching = setTimeout(watch, health ? 700 : 2000);
}

server.addEventListener("lost", () => {
  if (at("banner").dataset.key === "lost") return;
  banner("lost");
  clearTimeout(watching);
  watching = setTimeout(watch, 2000);
});
server.addEventListener("changed", async () => {
  about = { ...about, ...(await get("/api/about").catch(() => about)) };
  describe();
});

async function begin() {
  try {
    about = await get("/api/about");
  } catch {
    watching = setTimeout(watch, 2000);
    return;
  }
  banner(null);
  server.bodyBytes = about.limits?.body_bytes ?? server.bodyBytes;
  describe();
  for (const name of ["look", "think", "teach"]) panels[name].ready(about);
  if (asked() === "quiz") panels.quiz.ready();
  document.body.dataset.ready = "yes";
}

/** What is served, in one line under the name. */
function describe() {
  if (!about) {
    at("about").textContent = word("about.none");
    return;
  }
  const { model, tables, index } = about;
  at("about").replaceChildren(...[
    word("about.model", { name: model.name, size: millions(model.parameters) }),
    tables ? word("about.tables", { rows: whole(tables.rows), layers: tables.layers.join(", "), size: kilobytes(tables.bytes) }) : word("about.tables.none"),
    index ? word("about.index", { documents: whole(index.documents), tokens: whole(index.tokens) }) : word("about.index.none"),
  ].map((text) => el("span", {}, text)));
  at("version").textContent = about.version ? `engram-lm ${about.version}` : "";
}

const millions = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(1)}B` : n >= 1e6 ? `${Math.round(n / 1e6)}M` : whole(n));

showTheme();
showLanguage();
open(asked());
watch();
