// The model behind the page, on a server or in this browser: the same two calls, the same answers.
//
//   open(say) -> info                          as GET /v1/model; `say` hears the share loaded so far
//   predict(photo, { budget, exitConfidence }) as POST /v1/predict with its trace

const PATIENCE_S = 30; // with a network, beyond what the server allows itself

/** A server's refusal: its sentence, and the HTTP status. */
class Refusal extends Error {
  constructor(sentence, status) {
    super(sentence);
    this.status = status;
  }
}

export class ServerModel {
  key = null; // that the server wants; kept in this page alone
  #info = null;

  async open() {
    this.#info = await this.#ask("v1/model", "load the page again");
    return this.#info;
  }

  async predict(photo, { budget, exitConfidence }) {
    const settings = new URLSearchParams({ trace: "true", top: "5" });
    if (budget !== null) settings.set("budget", budget);
    if (exitConfidence !== null) settings.set("exit_confidence", exitConfidence);
    const body = await photo.upload(this.#info);
    return this.#ask(`v1/predict?${settings}`, "turn the dial again", { method: "POST", body, headers: { "Content-Type": body.type } });
  }

  async #ask(path, next, options = {}) {
    const headers = this.#headers(options.headers);
    const patience = PATIENCE_S + (this.#info?.limits.timeout_s ?? 0);
    let response;
    let said;
    try {
      response = await fetch(path, { ...options, headers, signal: AbortSignal.timeout(1000 * patience) });
      said = await response.text();
    } catch (error) {
      const what = error.name === "TimeoutError" ? `did not answer within ${patience} s` : "does not answer";
      throw new Error(`The server ${what}; check that it runs, and ${next}.`);
    }
    const found = parsed(said);
    if (response.ok && found) return found;
    const unknown = `The server answered ${response.status}, but not as iret does; check the address, and ${next}.`;
    throw new Refusal(found?.error ?? unknown, response.status);
  }

  #headers(given) {
    try {
      return new Headers({ ...given, ...(this.key && { "x-api-key": this.key }) });
    } catch {
      throw new Refusal("This key holds a character that no key can, such as a curly quote; type it again.", 401);
    }
  }
}

/** What JSON says; null where it is none. */
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

export class BrowserModel {
  #worker = null;
  #preprocess = null;

  async open(say) {
    this.#worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
    const info = await this.#ask({ kind: "open" }, say);
    this.#preprocess = info.preprocess;
    return info;
  }

  predict(photo, settings) {
    return this.#ask({ kind: "run", pixels: photo.pixels(this.#preprocess), ...settings });
  }

  /** One question at a time. */
  #ask(message, say = () => {}) {
    return new Promise((resolve, reject) => {
      this.#worker.onmessage = ({ data }) => {
        if ("progress" in data) say(data.progress);
        else if ("error" in data) reject(new Error(data.error));
        else resolve(data.value);
      };
      this.#worker.onerror = () => reject(new Error("The model could not be started in this browser; a newer one may."));
      this.#worker.onmessageerror = () => reject(new Error("The model's answer could not be read; load the page again."));
      this.#worker.postMessage(message);
    });
  }
}
