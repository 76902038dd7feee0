// The model behind the page, on a server or in this browser: the same two calls, the same answers.
//
//   open(say) -> info                          as GET /v1/model; `say` hears the share loaded so far
//   predict(photo, { budget, exitConfidence }) as POST /v1/predict with its trace

/** A server's refusal: its sentence, and the HTTP status. */
class Refusal extends Error {
  constructor(sentence, status) {
    super(sentence);
    this.status = status;
  }
}

export class ServerModel {
  key = null; // that the server wants; kept in this page alone
  #preprocess = null;

  async open() {
    const info = await this.#ask("v1/model");
    this.#preprocess = info.preprocess; // only drawn with: the server prepares photos itself
    return info;
  }

  async predict(photo, { budget, exitConfidence }) {
    const settings = new URLSearchParams({ trace: "true", top: "5" });
    if (budget !== null) settings.set("budget", budget);
    if (exitConfidence !== null) settings.set("exit_confidence", exitConfidence);
    const body = await photo.upload(this.#preprocess);
    const headers = { "Content-Type": body.type.startsWith("image/") ? body.type : "application/octet-stream" };
    return this.#ask(`v1/predict?${settings}`, { method: "POST", body, headers });
  }

  async #ask(path, options = {}) {
    const headers = { ...options.headers, ...(this.key && { "x-api-key": this.key }) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch {
      throw new Error("The server does not answer; check that it runs, and turn the dial again.");
    }
    const said = await response.json().catch(() => ({}));
    if (!response.ok) throw new Refusal(said.error ?? `The server answered ${response.status} without a word.`, response.status);
    return said;
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
      this.#worker.postMessage(message);
    });
  }
}
