// Examples ready to press, as the server names them: a name is a text, or one text a language.

import { el } from "./elements.js";
import { language } from "./words.js";

/** One button an example; press(example) is called with it. */
export function chips(box, examples, press) {
  box.replaceChildren(...(examples ?? []).map((example) =>
    el("button", { type: "button", class: "chip", onclick: () => press(example) }, nameOf(example))));
  box.hidden = !examples?.length;
}

/** What an example is called here. */
export function nameOf(example) {
  const name = typeof example === "string" ? example : (example.name ?? example.prompt ?? example.text);
  return typeof name === "object" ? (name[language()] ?? name.en) : name;
}
