// A bundle through the page's own session and the engine it ships with, in node: `node parity.mjs BUNDLE REQUESTS`.
// REQUESTS: JSON of { pixels (base64 of float32 [C, Y, X], one an image), settings [{ budget, exitConfidence }] }.
// Prints JSON, an entry for every image and setting: { kept, refined, exitStage, macs, joules, logits, importance }.

import { readFileSync } from "node:fs";
import { join } from "node:path";

import * as ort from "onnxruntime-web/wasm";

import { openGraph } from "../../src/iret/serve/page/engine.js";
import { Session } from "../../src/iret/serve/page/session.js";

const [folder, requests] = process.argv.slice(2);
const dist = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url);
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = { mjs: new URL("ort-wasm-simd-threaded.mjs", dist).href };
ort.env.wasm.wasmBinary = readFileSync(new URL("ort-wasm-simd-threaded.wasm", dist));

const bundle = JSON.parse(readFileSync(join(folder, "bundle.json"), "utf8"));
const read = (file) => new Uint8Array(readFileSync(join(folder, file)));
const shared = "weights.bin" in bundle.checksums ? [{ path: "weights.bin", data: read("weights.bin") }] : [];
const graphs = [];
for (const [{ file }] of bundle.stages) graphs.push(await openGraph(ort, read(file), shared));
const session = new Session(bundle, graphs);
const { pixels, settings } = JSON.parse(readFileSync(requests, "utf8"));
const found = [];
for (const each of pixels) {
  const bytes = Buffer.from(each, "base64");
  const image = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
  for (const options of settings) {
    const { kept, refined, exitStage, macs, joules, logits, importance } = await session.run(image, options);
    const lists = [kept, refined, importance].map((grids) => grids.map((grid) => [...grid]));
    found.push({ kept: lists[0], refined: lists[1], importance: lists[2], exitStage, macs, joules, logits: [...logits] });
  }
}
process.stdout.write(JSON.stringify(found));
