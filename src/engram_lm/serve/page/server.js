// What the page asks the server: JSON, streamed JSON lines, and every way in which either may fail, in one sentence each.
//
//   const answer = await post("/api/trace", { text }, { signal });
//   for await (const event of stream("/api/generate", body, { signal })) ...

import { bytesOf } from "./elements.js";
import { word } from "./words.js";

/** Tells "lost" (nobody answers) and "changed" (documents came or went). */
export const server = new EventTarget();
server.bodyBytes = 1_000_000;

const token = document.querySelector('meta[name="engram-token"]').content;

/** An error whose message is a sentence for the visitor. */
export class Refused extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const get = (path, options = {}) => answered(path, { method: "GET", ...options });

export const post = (path, body, options = {}) => answered(path, { ...sending(body), ...options });

/** Events of a streamed answer. Aborting the signal closes the connection, which stops the computation. */
export async function* stream(path, body, { signal } = {}) {
  const response = await asked(path, { ...sending(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let ended = false;
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused(word("error.broke"));
    }
    const lines = (rest + (part.value || "")).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((one) => one.trim())) {
      const event = JSON.parse(line);
      if (event.type === "error") throw new Refused(event.error, response.status);
      ended = ended || event.type === "done";
      yield event;
    }
    if (part.done) break;
  }
  if (!ended) throw new Refused(word("error.broke"));
}

function sending(body) {
  const text = JSON.stringify(body);
  const bytes = bytesOf(text);
  if (bytes > server.bodyBytes) {
    throw new Refused(word("error.large", { size: kilobytes(bytes), limit: kilobytes(server.bodyBytes) }), 413);
  }
  return { method: "POST", body: text, headers: { "Content-Type": "application/json", "X-Engram-Token": token } };
}

async function answered(path, options) {
  const response = await asked(path, options);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(word("error.broke"));
  }
}

async function asked(path, options) {
  let response;
  try {
    response = await fetch(path, { credentials: "same-origin", cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    server.dispatchEvent(new Event("lost"));
    throw new Refused(word("error.lost"));
  }
  if (response.ok) return response;
  let told = null;
  try {
    const body = await response.json();
    told = typeof body.error === "string" ? body.error : null;
  } catch {
    // Not JSON: the status is all there is to tell.
  }
  if (response.status === 401 || response.status === 403) told = `${told || ""} ${word("error.reload")}`.trim();
  throw new Refused(told || word("error.status", { status: response.status }), response.status);
}

/** Bytes for reading: 12 KB, 1.2 MB. */
export function kilobytes(bytes) {
  return bytes < 1e6 ? `${Math.ceil(bytes / 1000)} KB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

/** One thing at a time: a new run stops the one before. Shows in `status` that it works, waits or failed. */
export class Task {
  #controller = null;
  #poll = 0;

  constructor(status) {
    this.status = status;
  }

  get running() {
    return this.#controller !== null;
  }

  stop() {
    this.#controller?.abort();
  }

  say(text, kind = "") {
    this.status.textContent = text;
    this.status.dataset.kind = kind;
  }

  /** Runs `work(signal)`; answers whether it came to its end. Stopping is no failure; what else goes wrong is told. */
  async run(work, { doing = "working" } = {}) {
    this.stop();
    const controller = new AbortController();
    this.#controller = controller;
    this.say(word(doing), "working");
    this.#follow(controller);
    try {
      await work(controller.signal);
      if (this.#controller === controller && this.status.dataset.kind === "working") this.say("");
      return true;
    } catch (error) {
      if (this.#controller !== controller) return false;
      if (error.name === "AbortError") this.say(word("stopped"));
      else if (error instanceof Refused) this.say(error.message, "error");
      else {
        this.say(word("error.page", { message: error.message }), "error");
        console.error(error);
      }
      return false;
    } finally {
      if (this.#controller === controller) this.#controller = null;
    }
  }

  /** Says who is before us, for answers that come in one piece and cannot say it themselves. */
  #follow(controller) {
    clearTimeout(this.#poll);
    this.#poll = setTimeout(async () => {
      if (this.#controller !== controller) return;
      try {
        const { waiting } = await get("/api/health", { signal: controller.signal });
        if (this.#controller === controller && this.status.dataset.kind === "working" && waiting > 0) {
          this.say(word("busy", { waiting }), "working");
        }
      } catch {
        return;
      }
      this.#follow(controller);
    }, 900);
  }
}
