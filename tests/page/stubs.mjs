// As much of a browser as the page's modules touch, for node: elements by the ids of index.html, clocks that stand still.

import { readFileSync } from "node:fs";

const INDEX = readFileSync(new URL("../../src/iret/serve/page/index.html", import.meta.url), "utf8");
const pause = globalThis.setImmediate;

class Element {
  children = [];
  attributes = {};
  dataset = {};
  listeners = {};
  hidden = false;
  textContent = "";
  value = "";
  style = { setProperty() {} };
  clientWidth = 300;
  #names = new Set();
  classList = {
    add: (name) => this.#names.add(name),
    remove: (name) => this.#names.delete(name),
    contains: (name) => this.#names.has(name),
    toggle: (name, is) => (is ? this.#names.add(name) : this.#names.delete(name)),
  };

  constructor(tag) {
    this.tag = tag;
  }
  setAttribute(name, value) {
    this.attributes[name] = String(value);
  }
  addEventListener(name, hear) {
    (this.listeners[name] ??= []).push(hear);
  }
  /** What a visitor does. */
  fire(name, event = {}) {
    for (const hear of this.listeners[name] ?? []) hear({ preventDefault() {}, target: this, ...event });
  }
  append(...children) {
    for (const child of children) Object.assign(child, { parent: this });
    this.children.push(...children);
  }
  replaceChildren(...children) {
    this.children = children;
  }
  remove() {
    this.parent.children.splice(this.parent.children.indexOf(this), 1);
  }
  querySelectorAll(tag) {
    return this.children.filter((child) => child.tag === tag);
  }
  focus() {
    document.activeElement = this;
  }
  async play() {}
  getContext() {
    const drawImage = (source) => {
      if (source.isClosed) throw new Error("a closed picture was drawn");
    };
    const getImageData = (x, y, width, height) => ({ data: new Uint8ClampedArray(4 * width * height) });
    return new Proxy({ drawImage, getImageData }, { get: (own, name) => own[name] ?? (() => {}), set: () => true });
  }
  toBlob(take, type) {
    take(new Blob(["crop"], { type }));
  }
}

/** A page that was just loaded, in `mode`; what it asks of the browser is answered by the functions of the world returned. */
export function makeWorld(mode = "server") {
  const ids = new Map();
  for (const [tag, id] of INDEX.matchAll(/<\w+ [^>]*id="([\w-]+)"[^>]*>/g)) {
    const element = new Element("");
    element.hidden = / hidden>/.test(tag);
    element.value = tag.match(/ value="(\d+)"/)?.[1] ?? "";
    ids.set(id, element);
  }
  const world = {
    timers: [],
    frames: [],
    live: 0, // cameras that run
    decode: async (source) => makeBitmap(source),
    permit: async () => makeStream(world),
    fetch: async () => new Response("", { status: 404 }),
    $: (id) => ids.get(id),
  };
  const page = new Element("html");
  page.dataset.mode = mode;
  globalThis.document = Object.assign(new Element("document"), {
    documentElement: page,
    createElement: (tag) => new Element(tag),
    createElementNS: (_, tag) => new Element(tag),
    getElementById(id) {
      if (!ids.has(id)) throw new Error(`index.html has no ${id}`);
      return ids.get(id);
    },
  });
  const globals = {
    navigator: { mediaDevices: { getUserMedia: () => world.permit() } },
    createImageBitmap: (source) => world.decode(source),
    fetch: (path, options = {}) => world.fetch(String(path), options),
    requestAnimationFrame: (work) => world.frames.push(work),
    setTimeout: (work, ms) => world.timers.push({ work, ms }),
    clearTimeout: (place) => place && delete world.timers[place - 1],
    ResizeObserver: class { observe() {} },
    ImageData: class { constructor(width, height) { this.width = width; this.data = new Uint8ClampedArray(4 * width * height); } },
  };
  for (const [name, value] of Object.entries(globals)) Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });
  return world;
}

/** Lets everything run that waits for nothing but its turn. */
export async function settle() {
  for (let turn = 0; turn < 40; turn++) await new Promise((go) => pause(go));
}

/** The clocks that run end. */
export async function ring(world) {
  for (const { work } of world.timers.splice(0).filter(Boolean)) work();
  await settle();
}

export function makeBitmap(source, width = 8, height = 8) {
  return { source, width, height, isClosed: false, close() { this.isClosed = true; } };
}

export function makeStream(world) {
  world.live++;
  const track = new Element("track");
  track.stop = () => world.live--;
  return { getTracks: () => [track], getVideoTracks: () => [track] };
}

export function makeFile(name, type = "image/png") {
  return new File(["a picture"], name, { type });
}

/** A promise, and what settles it. */
export function later() {
  const made = {};
  made.promise = new Promise((resolve, reject) => Object.assign(made, { resolve, reject }));
  return made;
}
