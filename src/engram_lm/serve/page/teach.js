// The panel Teach: documents in and out of the index, a log of what happened, and one question answered three ways.

import { forget } from "./card.js";
import { at, bytesOf, duration, el, part, table, whole } from "./elements.js";
import { chips, nameOf } from "./examples.js";
import { Refused, Task, get, kilobytes, post, server } from "./server.js";
import { word } from "./words.js";
import { Writing } from "./writing.js";

const EXAMPLE = {
  name: "observatory.md",
  text: "The observatory on Mount Calder is run by Odalys Brandt. Its dome opens at 21:40 and closes when the owls come home. "
    + "Visitors bring a red lamp; white light is forbidden on the terrace.\n",
  question: "Who runs the observatory on Mount Calder?",
};
const ARMS = ["alone", "retrieval", "memory"];

export class Teach {
  constructor() {
    this.adding = new Task(at("teach-status"));
    this.asking = new Task(at("teach-ask-status"));
    this.documents = [];
    this.next = null;
    this.writings = {};
    this.results = {};
    at("teach-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.addPasted();
    });
    at("teach-example").addEventListener("click", () => {
      at("teach-name").value = EXAMPLE.name;
      at("teach-text").value = EXAMPLE.text;
      at("teach-question").value = EXAMPLE.question;
      at("teach-chat").checked = Boolean(this.about.model.chat);
      this.addPasted();
    });
    at("teach-files").addEventListener("change", () => this.addFiles([...at("teach-files").files]));
    this.#dropping(at("teach-drop"));
    at("teach-ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask();
    });
    at("teach-stop").addEventListener("click", () => this.asking.stop());
  }

  ready(about) {
    this.about = about;
    chips(at("teach-questions"), about.examples?.ask, (example) => {
      this.#take(example);
      this.ask();
    });
    const first = about.examples?.ask?.[0];
    if (first && !at("teach-question").value) this.#take(first);
    for (const control of at("teach-form").elements) control.disabled = !about.index;
    at("teach-chat").parentElement.hidden = !about.model.chat;
    if (!about.index) this.adding.say(word("teach.no.index"), "error");
    else this.reload();
    this.columns();
  }

  speak() {
    if (this.about) {
      chips(at("teach-questions"), this.about.examples?.ask, (example) => {
        this.#take(example);
        this.ask();
      });
      this.list();
      this.columns();
    }
  }

  #take(example) {
    at("teach-question").value = typeof example === "string" ? example : (example.prompt ?? nameOf(example));
    at("teach-chat").checked = Boolean(example.chat);
  }

  // ---- documents in

  async addPasted() {
    const text = at("teach-text").value;
    if (!text.trim()) {
      this.adding.say(word("teach.empty"), "error");
      at("teach-text").focus();
      return;
    }
    const id = at("teach-name").value.trim() || text.trim().split(/\s+/).slice(0, 4).join("-").slice(0, 60);
    if (await this.#add([{ id, text, title: id }])) {
      at("teach-text").value = "";
      at("teach-name").value = "";
    }
  }

  async addFiles(files) {
    const documents = [];
    for (const file of files) {
      const refused = (key, values = {}) => this.log(word(key, { name: file.name, ...values }), "error");
      if (file.size > server.bodyBytes) refused("file.large", { size: kilobytes(file.size), limit: kilobytes(server.bodyBytes) });
      else {
        try {
          const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
          if (text.trim()) documents.push({ id: file.name, text, title: file.name });
          else refused("file.empty");
        } catch (error) {
          refused(error instanceof TypeError ? "file.encoding" : "file.unread");
        }
      }
    }
    at("teach-files").value = "";
    // Together while they fit into one request, which is one step of the index; else one by one.
    const together = documents.reduce((sum, one) => sum + bytesOf(JSON.stringify(one)), 0) < 0.9 * server.bodyBytes;
    if (documents.length && together) await this.#add(documents);
    else for (const one of documents) await this.#add([one]);
  }

  async #add(documents) {
    return this.adding.run(async (signal) => {
      const answer = await post("/api/index/add", { documents, replace: true }, { signal });
      this.#done(answer, word("log.added", { count: answer.added.length, tokens: whole(answer.tokens), ms: duration(answer.ms) }));
      await this.reload(signal);
    }, { doing: "teach.adding" }).then((fine) => {
      if (!fine) this.log(at("teach-status").textContent, "error");
      return fine;
    });
  }

  #done(answer, otherwise) {
    forget();
    for (const line of answer.log?.length ? answer.log : [otherwise]) this.log(line);
    server.dispatchEvent(new Event("changed"));
  }

  #dropping(zone) {
    const over = (on) => (event) => {
      event.preventDefault();
      zone.dataset.over = on ? "yes" : "no";
    };
    zone.addEventListener("dragenter", over(true));
    zone.addEventListener("dragover", over(true));
    zone.addEventListener("dragleave", over(false));
    zone.addEventListener("drop", (event) => {
      over(false)(event);
      if (event.dataTransfer.files.length) this.addFiles([...event.dataTransfer.files]);
      else if (event.dataTransfer.getData("text")) at("teach-text").value = event.dataTransfer.getData("text");
    });
    // A file that misses the zone must not replace the page.
    for (const kind of ["dragover", "drop"]) window.addEventListener(kind, (event) => event.preventDefault());
  }

  // ---- the log and the list

  log(line, kind = "") {
    if (!line) return;
    const box = at("teach-log");
    box.append(el("p", { class: kind || null }, el("span", { class: "time" }, new Date().toTimeString().slice(0, 8)), " ", el("bdi", {}, line)));
    box.scrollTop = box.scrollHeight;
  }

  async reload(signal = null) {
    try {
      const page = await get("/api/index/documents?limit=50", { signal });
      this.documents = page.documents;
      this.next = page.next;
      this.list();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      this.log(error.message, "error");
    }
  }

  async #more() {
    await this.adding.run(async (signal) => {
      const page = await get(`/api/index/documents?limit=50&after=${encodeURIComponent(this.next)}`, { signal });
      this.documents = [...this.documents, ...page.documents];
      this.next = page.next;
      this.list();
    });
  }

  list() {
    const box = at("teach-documents");
    if (!this.about?.index) {
      box.replaceChildren();
      return;
    }
    const rows = this.documents.map((one) => [
      el("span", { class: "name" }, one.title || one.id),
      whole(one.tokens),
      el("button", { type: "button", class: "quiet", "aria-label": word("teach.delete.one", { name: one.title || one.id }), onclick: () => this.remove(one) }, word("teach.delete")),
    ]);
    box.replaceChildren(
      el("div", {}, table(word("teach.documents", { count: whole(this.documents.length) + (this.next ? "+" : "") }),
        [word("teach.document"), word("tokens"), el("span", { class: "unseen" }, word("teach.delete"))], rows, { className: "documents" })),
      this.next ? el("button", { type: "button", class: "second", onclick: () => this.#more() }, word("teach.more")) : "",
      rows.length ? "" : el("p", { class: "note" }, word("teach.none")),
    );
  }

  async remove(one) {
    const fine = await this.adding.run(async (signal) => {
      const answer = await post("/api/index/delete", { ids: [one.id] }, { signal });
      this.#done(answer, word("log.deleted", { name: one.id, ms: duration(answer.ms) }));
    }, { doing: "teach.deleting" });
    if (!fine) this.log(at("teach-status").textContent, "error");
    // Deleted twice, or elsewhere: the list is read anew either way.
    await this.reload();
    at("teach-log").focus();
  }

  // ---- one question, three ways

  columns() {
    const kept = this.writings;
    at("teach-answers").replaceChildren(...ARMS.filter((arm) => arm === "alone" || this.about?.index).map((arm) => {
      const words = el("div", { class: "sheet small" });
      const told = el("p", { class: "note" });
      const column = el("section", { class: "answer", "data-arm": arm, "aria-labelledby": `answer-${arm}` },
        el("h4", { id: `answer-${arm}` }, word(`arm.${arm}`)), el("p", { class: "note what" }, word(`arm.${arm}.what`)), words, told);
      if (kept[arm]) {
        words.replaceChildren(kept[arm].strip.box);
        kept[arm].colour("r");
        told.textContent = this.#cost(this.results[arm]);
      }
      return column;
    }));
  }

  #cost(done) {
    if (!done) return "";
    return word("cost", { prompt: whole(done.prompt_tokens), tokens: whole(done.tokens), first: duration(done.first_token_ms), ms: duration(done.ms) });
  }

  async ask() {
    const prompt = at("teach-question").value;
    if (!prompt.trim()) {
      this.asking.say(word("teach.ask.empty"), "error");
      at("teach-question").focus();
      return;
    }
    this.writings = {};
    this.results = {};
    this.columns();
    at("teach-stop").hidden = false;
    const chat = at("teach-chat").checked;
    await this.asking.run(async (signal) => {
      for (const arm of ARMS) {
        const column = at("teach-answers").querySelector(`[data-arm="${arm}"]`);
        if (!column) continue;
        column.dataset.busy = "yes";
        const note = () => at("teach-answers").querySelector(`[data-arm="${arm}"] > .note:last-child`);
        try {
          const writing = new Writing(column.querySelector(".sheet"), {
            label: word(`arm.${arm}`), live: at("teach-live"), show: (line) => { note().textContent = line || this.#cost(this.results[arm]); },
          });
          this.writings[arm] = writing;
          const body = { prompt, chat, max_tokens: 32, arm, tables: Boolean(this.about.tables), lam: null, documents: null, temperature: 0 };
          const done = await writing.follow(body, signal, (text) => this.asking.say(`${word(`arm.${arm}`)}: ${text}`, "working"));
          this.results[arm] = { ...done, prompt_tokens: done.prompt_tokens ?? writing.start?.prompt_tokens };
          note().textContent = this.#cost(this.results[arm]);
          if (arm === "memory") this.log(found(writing.tokens));
          for (const line of done.told ?? []) this.log(line);
        } catch (error) {
          // What one way cannot do, such as a prompt grown too long, need not stop the others.
          if (!(error instanceof Refused) || !error.status) throw error;
          note().textContent = error.message;
        } finally {
          delete column.dataset.busy;
        }
      }
      this.asking.say(word("teach.asked"));
    }, { doing: "writing" });
    if (document.activeElement === at("teach-stop")) at("teach-question").focus();
    at("teach-stop").hidden = true;
  }
}

/** Where the token that memory gave most of was found, as a line of the log. */
function found(tokens) {
  const best = tokens.filter((token) => token.r > 0.05 && token.depth).sort((a, b) => b.r - a.r || b.depth - a.depth)[0];
  if (!best) return word("log.not.found");
  return word("log.found", { documents: whole(best.documents), depth: whole(best.depth), lambda: part(best.lambda) });
}
