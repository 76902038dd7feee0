// What the page does when things happen in an unlucky order or fail, without a browser: `node behaviour.mjs` prints JSON, an
// entry for every scenario. Judging it is left to tests/serve/test_page_behaviour.py.

import { BrowserModel, ServerModel } from "../../src/iret/serve/page/models.js";
import { openGraph } from "../../src/iret/serve/page/engine.js";
import { Newest } from "../../src/iret/serve/page/newest.js";
import { openPhoto, Photo } from "../../src/iret/serve/page/photo.js";
import { Webcam } from "../../src/iret/serve/page/webcam.js";
import { later, makeBitmap, makeFile, makeStream, makeWorld, ring, settle } from "./stubs.mjs";

const PAGE = "../../src/iret/serve/page/";
const INFO = {
  name: "tiny", labels: ["cat", "dog"], grid: [2, 2], stages: 2, full_macs: 1e6, engine: "none", data: null,
  preprocess: { img_size: [4, 4], mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], interpolation: "bilinear" },
  points: [{ share: 1, accuracy: 0.9 }, { share: 0.2, accuracy: 0.5 }],
  limits: { body_bytes: 1e6, pixels: 1e6, timeout_s: 5 },
};

function answerOf(label = "cat") {
  const top = [{ index: 0, label, probability: 0.9 }, { index: 1, label: "dog", probability: 0.1 }];
  const grids = [[1, 1, 1, 1], [1, 0, 0, 1]];
  const trace = { kept: grids, refined: [[0, 0, 0, 0], [1, 0, 0, 0]], stage_probabilities: [top[0], top[0]] };
  return { top, macs: 5e5, macs_share: 0.5, exit_stage: 1, joules: { value: 1e-3 }, time_ms: { total: 5, queue: 1 }, trace };
}

const json = (value, status = 200) => new Response(JSON.stringify(value), { status });
const sentence = (promise) => promise.then(() => null, (error) => error.message);
let pages = 0;

/** The page in server mode, open; `world.asked` are its predictions, answered by `world.predict`. */
async function openPage(changes = {}) {
  const world = Object.assign(makeWorld(), { asked: [], fetched: [], predict: async () => json(answerOf()), model: async () => json(INFO) }, changes);
  world.fetch = async (path, options) => {
    world.fetched.push(path);
    if (path === "v1/model") return world.model(options);
    if (path === "page/photos.json") return json(world.examples ?? []);
    if (!path.startsWith("v1/predict")) return new Response(new Blob(["a photo"], { type: "image/jpeg" }));
    world.asked.push(options.body);
    return world.predict(options, world.asked.length);
  };
  await import(`${PAGE}main.js?${++pages}`);
  if (!world.isSlow) await settle();
  return world;
}

const drop = (...files) => document.fire("drop", { dataTransfer: { files } });
const outcome = ({ $ }) => $("outcome").attributes["aria-label"];
const alertOf = ({ $ }) => ($("alert").hidden ? null : $("alert").textContent);
const isStale = ({ $ }) => $("main").classList.contains("is-stale");

/** Photos decode when `world.decoded[name]` says so; frames at once. */
function slowly(world) {
  world.decoded = {};
  world.decode = (source) => (source.name ? (world.decoded[source.name] = later()).promise : Promise.resolve(makeBitmap(source)));
}

async function decode(world, name) {
  const bitmap = makeBitmap(name);
  world.decoded[name].resolve(bitmap);
  await settle();
  return bitmap;
}

const scenarios = {
  async newest() {
    let [wanted, runs, gate] = [0, [], later()];
    const newest = new Newest(async () => {
      runs.push(wanted);
      await gate.promise;
      if (wanted === 9) throw new Error("a bug");
    });
    for (wanted = 1; wanted <= 5; wanted++) newest.ask();
    wanted = 5;
    gate.resolve();
    await settle();
    process.once("unhandledRejection", () => {});
    wanted = 9;
    newest.ask();
    await settle();
    wanted = 10;
    newest.ask();
    await settle();
    return runs;
  },

  async cameras() {
    const found = {};
    const tell = (name, world, camera) => (found[name] = [camera.isOn, world.live, world.$("webcam").textContent]);
    let [world, grants, streams, video] = [makeWorld(), [], [], null];
    const create = document.createElement;
    document.createElement = (tag) => (video = create(tag));
    world.permit = () => new Promise((grant) => grants.push(() => grant(streams[streams.push(makeStream(world)) - 1])));
    let camera = new Webcam(() => {});
    const starts = [camera.start(), camera.start()];
    grants.reverse().forEach((grant) => grant());
    await Promise.all(starts);
    tell("twice", world, camera);
    found.newest = video.srcObject === streams[0]; // the second click was answered first
    camera.stop();
    tell("stopped", world, camera);
    const start = camera.start();
    camera.stop();
    grants.at(-1)();
    await start;
    tell("overtaken", world, camera);
    const plays = later();
    video.play = () => plays.promise;
    const begun = camera.start();
    grants.at(-1)();
    await settle();
    camera.stop();
    plays.resolve();
    await begun;
    tell("interrupted", world, camera);

    world = makeWorld();
    const make = document.createElement;
    document.createElement = (tag) => Object.assign(make(tag), { play: () => Promise.reject(new DOMException("no", "NotAllowedError")) });
    camera = new Webcam(() => {});
    found.refusedToPlay = await sentence(camera.start());
    tell("silent", world, camera);
    world.permit = () => Promise.reject(new DOMException("no", "NotAllowedError"));
    found.refused = await sentence(camera.start());

    world = makeWorld();
    const stream = makeStream(world);
    world.permit = async () => stream;
    camera = new Webcam(() => {});
    await camera.start();
    stream.getVideoTracks()[0].fire("ended");
    found.unplugged = [camera.isOn, world.$("webcam").textContent];
    return found;
  },

  async servers() {
    const world = makeWorld();
    const model = new ServerModel();
    const found = {};
    world.fetch = async () => Promise.reject(new TypeError("Failed to fetch"));
    found.closed = await sentence(model.open());
    world.fetch = async () => Promise.reject(new DOMException("late", "TimeoutError"));
    found.stalled = await sentence(model.open());
    world.fetch = async () => new Response("<p>Sign in to this network</p>");
    found.portal = await sentence(model.open());
    world.fetch = async () => new Response("bad gateway", { status: 502 });
    found.gateway = await sentence(model.open());
    model.key = "\u201ckey\u201d";
    found.quoted = await sentence(model.open());
    model.key = "key";
    let heard;
    world.fetch = async (path, options) => (heard = options) && json(INFO);
    await model.open();
    found.key = [heard.headers.get("x-api-key"), heard.signal instanceof AbortSignal];
    world.fetch = async () => Promise.reject(new TypeError("Failed to fetch"));
    found.later = await sentence(model.predict(new Photo(makeBitmap(), "x", makeFile("x.png")), { budget: 1, exitConfidence: null }));

    const workers = [];
    globalThis.Worker = class {
      constructor() {
        workers.push(this);
      }
      postMessage() {
        this.onmessageerror();
      }
    };
    found.unreadable = await sentence(new BrowserModel().open());
    return found;
  },

  async uploads() {
    const world = makeWorld();
    const given = async (type, { width = 8, limits = {} } = {}) => {
      const photo = new Photo(makeBitmap(null, width, 8), "x", type && makeFile("x", type));
      return (await photo.upload({ ...INFO, limits: { ...INFO.limits, ...limits } })).size === 9 ? "file" : "crop";
    };
    const found = { jpeg: await given("image/jpeg"), avif: await given("image/avif"), heic: await given("image/heic"), svg: await given("image/svg+xml") };
    found.frame = await given(null);
    found.wide = await given("image/png", { width: 1e6 });
    found.small = await given("image/png", { limits: { body_bytes: 8 } });
    const huge = makeBitmap(null, 10_000, 10_000);
    world.decode = async () => huge;
    found.huge = [await sentence(openPhoto(makeFile("huge.png"), "huge.png")), huge.isClosed];
    const make = document.createElement;
    document.createElement = (tag) => Object.assign(make(tag), { toBlob: (take) => take(null) });
    found.unmade = await sentence(new Photo(makeBitmap(), "x.png").upload(INFO));
    return found;
  },

  async engines() {
    const feeds = { inputNames: [], outputNames: [], run: () => Promise.reject(5_283_016) };
    const given = [];
    const create = async (_, options) => (given.push(options.externalData), feeds);
    const shared = [{ path: "weights.bin", data: new Uint8Array(2) }];
    const graph = await openGraph({ InferenceSession: { create } }, new Uint8Array(), shared);
    const broken = { InferenceSession: { create: () => Promise.reject(new Error("no such op")) } };
    return { given: given[0] === shared, run: await sentence(graph([])), open: await sentence(openGraph(broken, new Uint8Array())) };
  },

  async sites() {
    const world = makeWorld("browser");
    const said = [];
    globalThis.self = { postMessage: (message) => said.push(message), crypto };
    await import(`${PAGE}worker.js`);
    const open = async (fetch) => {
      world.fetch = fetch;
      await globalThis.self.onmessage({ data: { kind: "open" } });
      return said.at(-1).error;
    };
    const caches = new Set();
    const bundle = { format: 4, kind: "onnx", stages: [[{ file: "stage_0.onnx", tokens: null }]] };
    const breaking = () => new Response(new ReadableStream({ pull: (pipe) => pipe.error(new TypeError("network error")) }));
    return {
      offline: await open(async () => Promise.reject(new TypeError("Failed to fetch"))),
      missing: await open(async () => new Response("", { status: 404 })),
      cut: await open(async () => breaking()),
      html: await open(async () => new Response("<!doctype html>")),
      engine: await open(async (path, { cache }) => {
        caches.add(cache);
        return json(path.endsWith("bundle.json") ? bundle : { total: 1 });
      }),
      caches: [...caches],
    };
  },

  async photos() {
    const world = await openPage();
    slowly(world);
    drop(makeFile("first"));
    drop(makeFile("second"));
    const second = await decode(world, "second");
    const first = await decode(world, "first");
    const found = { shown: outcome(world), asked: world.asked.length, closed: [first.isClosed, second.isClosed] };
    drop(makeFile("third"));
    await decode(world, "third");
    found.before = second.isClosed;
    drop(makeFile("fourth"));
    world.$("webcam").fire("click");
    await settle();
    found.late = (await decode(world, "fourth")).isClosed;
    found.webcam = [world.live, outcome(world).split(":")[0]];
    return found;
  },

  async frames() {
    const world = await openPage();
    const frame = later();
    world.decode = (source) => (source.name ? Promise.resolve(makeBitmap(source)) : frame.promise);
    world.$("webcam").fire("click");
    await settle();
    drop(makeFile("dropped"));
    await settle();
    const bitmap = makeBitmap();
    frame.resolve(bitmap);
    await settle();
    return { shown: outcome(world).split(":")[0], closed: bitmap.isClosed, live: world.live, alert: alertOf(world) };
  },

  async failures() {
    const world = await openPage();
    const [first, second] = [later(), later()];
    world.predict = (_, count) => (count === 1 ? first : second).promise;
    drop(makeFile("old"));
    await settle();
    drop(makeFile("new"));
    await settle();
    first.resolve(json({ error: "too late to matter" }, 500));
    await settle();
    const found = { overtaken: alertOf(world) };
    second.resolve(json(answerOf("dog")));
    await settle();
    found.shown = outcome(world).split(":")[0];
    world.predict = async () => json({ error: "broken." }, 500);
    world.$("budget").fire("input");
    await settle();
    found.once = alertOf(world);
    world.$("budget").fire("input");
    await settle();
    found.again = alertOf(world);
    world.predict = async () => json(answerOf());
    world.$("budget").fire("input");
    await settle();
    found.mended = [alertOf(world), isStale(world)];
    const frame = later();
    world.predict = () => frame.promise;
    world.$("webcam").fire("click");
    await settle();
    world.$("webcam").fire("click");
    frame.resolve(json({ error: "too late to matter" }, 500));
    await settle();
    found.stopped = alertOf(world);
    return found;
  },

  async busy() {
    const world = await openPage();
    world.predict = async () => json({ error: "the line is full." }, 429);
    world.$("webcam").fire("click");
    await settle();
    const found = { full: [alertOf(world), world.live, world.asked.length] };
    world.predict = async () => json(answerOf());
    await ring(world);
    found.free = [alertOf(world), world.live, world.asked.length];
    world.predict = async () => json({ error: "broken." }, 500);
    for (const work of world.frames.splice(0)) work();
    await settle();
    found.broken = [alertOf(world), world.live];
    return found;
  },

  async aloud() {
    const world = await openPage();
    const { $ } = world;
    drop(makeFile("first"));
    await settle();
    drop(makeFile("second"));
    world.predict = () => new Promise(() => {});
    await settle();
    const stale = [isStale(world), outcome(world)];
    await ring(world); // the answer before is not said of this photo
    const found = { stale, status: $("status").textContent };

    const camera = await openPage();
    const said = [];
    const labels = ["cat", "cat", "dog", "cat", "dog", "dog", "dog"];
    camera.predict = async () => json(answerOf(labels[camera.asked.length - 1]));
    camera.$("webcam").fire("click");
    await settle();
    for (const _ of labels.slice(1)) {
      await ring(camera);
      const status = camera.$("status").textContent.split(",")[0];
      if (said.at(-1) !== status) said.push(status);
      for (const work of camera.frames.splice(0)) work();
      await settle();
    }
    return { ...found, said, clocks: camera.timers.filter(Boolean).length };
  },

  async waiting() {
    const model = later();
    const world = await openPage({ isSlow: true, model: () => model.promise });
    drop(makeFile("early"));
    await settle();
    const before = world.asked.length;
    model.resolve(json(INFO));
    await settle();
    return { before, after: world.asked.length, shown: outcome(world).split(":")[0], hints: ["unstarted", "hint"].map((id) => world.$(id).hidden) };
  },

  async examples() {
    const examples = [{ file: "dog #1 100%?.jpg", name: "dog" }, { file: "b.jpg", name: "b" }];
    const world = await openPage({ examples });
    const fetched = world.fetched.filter((path) => path.startsWith("page/photos/"));
    world.fetch = async (path) => (path.startsWith("v1/predict") ? json(answerOf()) : Promise.reject(new TypeError("offline")));
    const [button] = world.$("examples").children;
    button.fire("click");
    await settle();
    return { fetched, shown: outcome(world).split(":")[0], hidden: button.hidden };
  },

  async keys() {
    const heard = [];
    const model = async ({ headers }) => {
      heard.push(headers.get("x-api-key"));
      return heard.at(-1) === "right" ? json(INFO) : json({ error: "the key is wrong." }, 401);
    };
    const world = await openPage({ model });
    const { $ } = world;
    const enter = async (key) => {
      $("key").value = key;
      $("key-form").fire("submit");
      const focus = document.activeElement === $("file");
      await settle();
      return [$("key-form").hidden, $("key-wrong").textContent, focus];
    };
    return { asked: [$("key-form").hidden, $("key-wrong").textContent], wrong: await enter("wrong"), right: await enter("right"), heard };
  },

  async drops() {
    const world = await openPage();
    drop();
    const found = { nothing: alertOf(world) };
    const over = () => world.$("drop").classList.contains("is-over");
    document.fire("dragover");
    document.fire("dragleave", { relatedTarget: world.$("hint") });
    found.inside = over();
    document.fire("dragleave", { relatedTarget: null });
    found.outside = over();
    return found;
  },
};

const found = {};
for (const [name, play] of Object.entries(scenarios)) {
  try {
    found[name] = await play();
  } catch (error) {
    found[name] = { crashed: error.stack };
  }
}
process.stdout.write(JSON.stringify(found), () => process.exit(0));
