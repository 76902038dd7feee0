// The model off the page's own thread, so that the dial turns while it computes.
// in: { kind: "open" }, then { kind: "run", pixels, budget, exitConfidence };  out: { progress } ..., { value } or { error }

import { JOULES_SOURCES } from "./cost.js";
import { openGraph } from "./engine.js";
import { normalise } from "./preprocess.js";
import { Session, softmax, whyNot } from "./session.js";

const TOP = 5;
const here = (path) => new URL(`../${path}`, import.meta.url).href;
let session = null;

self.onmessage = async ({ data: { kind, ...given } }) => {
  try {
    self.postMessage({ value: kind === "open" ? await open() : await run(given) });
  } catch (error) {
    self.postMessage({ error: error.message });
  }
};

async function open() {
  const bundle = JSON.parse(new TextDecoder().decode(await download("bundle/bundle.json")));
  const why = whyNot(bundle);
  if (why) throw new Error(why);
  const files = bundle.stages.map(([graph]) => graph.file);
  const { total } = JSON.parse(new TextDecoder().decode(await download("page/site.json")));
  let loaded = 0;
  const count = (bytes) => self.postMessage({ progress: (loaded += bytes) / total });
  const ort = await import(here("ort/ort.wasm.min.js"));
  ort.env.wasm.numThreads = 1; // more need headers that a plain static server does not send
  ort.env.wasm.wasmPaths = { mjs: here("ort/ort-wasm-simd-threaded.js") };
  ort.env.wasm.wasmBinary = await download("ort/ort-wasm-simd-threaded.wasm", count);
  const graphs = [];
  for (const file of files) {
    const bytes = await download(`bundle/${file}`, count);
    await verify(file, bytes, bundle.checksums[file]);
    graphs.push(await openGraph(ort, bytes));
  }
  session = new Session(bundle, graphs);
  await session.run(new Float32Array(bundle.shape.in_chans * bundle.shape.img_size[0] * bundle.shape.img_size[1]));
  return describe(bundle, `onnxruntime-web ${ort.env.versions.web}, WebAssembly, 1 thread`);
}

/** As `GET /v1/model` of a server, and what this page knows beside. */
function describe(bundle, engine) {
  const { shape, points, name, labels, preprocess } = bundle;
  const side = shape.patch_size;
  return {
    name,
    labels,
    preprocess,
    grid: [shape.img_size[0] / side, shape.img_size[1] / side],
    img_size: shape.img_size,
    stages: shape.depths.length,
    full_macs: session.fullMacs,
    points: points && points.points.map(({ accuracy, macs_mean: macs }) => ({ share: Math.min(1, macs / points.full_macs), accuracy, macs })),
    data: points && { name: points.data, images: points.num_images },
    engine,
  };
}

/** As `POST /v1/predict` of a server, with its trace. */
async function run({ pixels, budget, exitConfidence }) {
  const { bundle } = session;
  const began = performance.now();
  const out = await session.run(normalise(pixels, bundle.preprocess), { budget, exitConfidence });
  const total = performance.now() - began;
  const named = (index, probability) => ({ index, label: bundle.labels?.[index] ?? null, probability });
  const best = (logits) => softmax(logits).map((p, index) => named(index, p)).sort((a, b) => b.probability - a.probability);
  const { kept, refined } = out;
  return {
    top: best(out.logits).slice(0, TOP),
    budget,
    macs: out.macs,
    macs_share: out.macs / session.fullMacs,
    tokens: kept.map((grid) => grid.reduce((sum, each) => sum + each, 0)),
    exit_stage: out.exitStage,
    joules: { value: out.joules, source: JOULES_SOURCES[bundle.precision], measured: false },
    time_ms: { total, engine: out.engineMs, queue: 0 },
    trace: { kept, refined, stage_probabilities: kept.map((_, s) => (out.stageLogits[s] ? best(out.stageLogits[s])[0] : null)) },
  };
}

/** Bytes of a file of this site; `count` hears of every piece. */
async function download(path, count = () => {}) {
  let response;
  try {
    response = await fetch(here(path));
  } catch {
    throw new Error(`${path} could not be fetched; check the connection and load the page again.`);
  }
  if (!response.ok) throw new Error(`${path} is missing from this site (${response.status}); copy the whole folder again.`);
  const pieces = [];
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    pieces.push(value);
    count(value.length);
  }
  return new Uint8Array(await new Blob(pieces).arrayBuffer());
}

/** A browser hashes on https and localhost alone; elsewhere the file is taken as it is. */
async function verify(file, bytes, expected) {
  if (!self.crypto.subtle) return;
  const digest = new Uint8Array(await self.crypto.subtle.digest("SHA-256", bytes));
  const found = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (found !== expected) throw new Error(`${file} is damaged or was changed; copy the site again.`);
}
