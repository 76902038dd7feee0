// The model off the page's own thread, so that the dial turns while it computes.
// in: { kind: "open" }, then { kind: "run", pixels, budget, exitConfidence };  out: { progress } ..., { value } or { error }

import { openGraph } from "./engine.js";
import { normalise } from "./preprocess.js";
import { Session, softmax, whyNot } from "./session.js";

const TOP = 5;
const ORT = "ort/ort.wasm.min.js";
const SHARED = "weights.bin"; // that several graphs read; `iret.export.targets`
const here = (path) => new URL(`../${path}`, import.meta.url).href;
let session = null;

self.onmessage = async ({ data: { kind, ...given } }) => {
  try {
    self.postMessage({ value: kind === "open" ? await open() : await run(given) });
  } catch (error) {
    self.postMessage({ error: String(error?.message ?? error) });
  }
};

async function open() {
  const bundle = await readJson("bundle/bundle.json");
  const why = whyNot(bundle);
  if (why) throw new Error(why);
  const files = bundle.stages.map(([graph]) => graph.file);
  const { total } = await readJson("page/site.json");
  let loaded = 0;
  const count = (bytes) => self.postMessage({ progress: (loaded += bytes) / total });
  const ort = await import(here(ORT)).catch(() => fail(ORT));
  ort.env.wasm.numThreads = 1; // more need headers that a plain static server does not send
  ort.env.wasm.wasmPaths = { mjs: here("ort/ort-wasm-simd-threaded.js") };
  ort.env.wasm.wasmBinary = await download("ort/ort-wasm-simd-threaded.wasm", count);
  const read = async (file) => {
    const bytes = await download(`bundle/${file}`, count);
    await verify(file, bytes, bundle.checksums[file]);
    return bytes;
  };
  const shared = SHARED in bundle.checksums ? [{ path: SHARED, data: await read(SHARED) }] : [];
  const graphs = [];
  for (const file of files) graphs.push(await openGraph(ort, await read(file), shared));
  session = new Session(bundle, graphs);
  await session.run(new Float32Array(bundle.shape.in_chans * bundle.shape.img_size[0] * bundle.shape.img_size[1]));
  return describe(bundle, `onnxruntime-web ${ort.env.versions.web}, WebAssembly, 1 thread`);
}

/** Of what `GET /v1/model` of a server tells, that which the page reads. */
function describe(bundle, engine) {
  const { shape, points, name, labels, preprocess } = bundle;
  const side = shape.patch_size;
  return {
    name,
    labels,
    preprocess,
    grid: [shape.img_size[0] / side, shape.img_size[1] / side],
    stages: shape.depths.length,
    full_macs: session.fullMacs,
    points: points && points.points.map(({ accuracy, macs_mean: macs }) => ({ share: Math.min(1, macs / points.full_macs), accuracy })),
    data: points && { name: points.data, images: points.num_images },
    engine,
  };
}

/** Of what `POST /v1/predict` of a server answers with its trace, that which the page reads. */
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
    macs: out.macs,
    macs_share: out.macs / session.fullMacs,
    exit_stage: out.exitStage,
    joules: { value: out.joules },
    time_ms: { total },
    trace: { kept, refined, stage_probabilities: kept.map((_, s) => (out.stageLogits[s] ? best(out.stageLogits[s])[0] : null)) },
  };
}

/** Bytes of a file of this site, of no older one at its address; `count` hears of every piece. */
async function download(path, count = () => {}) {
  const response = await fetch(here(path), { cache: "no-cache" }).catch(() => fail(path));
  if (!response.ok) throw new Error(`${path} is missing from this site (${response.status}); copy the whole folder again.`);
  const pieces = [];
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read().catch(() => fail(path));
    if (done) break;
    pieces.push(value);
    count(value.length);
  }
  return new Uint8Array(await new Blob(pieces).arrayBuffer());
}

async function readJson(path) {
  const bytes = await download(path);
  try {
    return JSON.parse(new TextDecoder().decode(bytes));
  } catch {
    throw new Error(`${path} of this site is another file; copy the whole folder again.`);
  }
}

function fail(path) {
  throw new Error(`${path} could not be fetched; check the connection and load the page again.`);
}

/** A browser hashes on https and localhost alone; elsewhere the file is taken as it is. */
async function verify(file, bytes, expected) {
  if (!self.crypto.subtle) return;
  const digest = new Uint8Array(await self.crypto.subtle.digest("SHA-256", bytes));
  const found = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (found !== expected) throw new Error(`${file} is damaged or was changed; copy the site again.`);
}
