// Answers questions about the page's modules: a JSON list of [name, ...arguments] in, a JSON list of answers out.
// tests/serve/test_page.py puts the same questions to Python.

import { readFileSync } from "node:fs";

import { choose, toImportance } from "../../src/iret/serve/page/choice.js";
import * as cost from "../../src/iret/serve/page/cost.js";
import { setting } from "../../src/iret/serve/page/points.js";
import { cropBox, fit, normalise } from "../../src/iret/serve/page/preprocess.js";
import { Session, whyNot } from "../../src/iret/serve/page/session.js";

/** RGB bytes in base64 as `resize` takes an image. */
function imageOf({ width, height, rgb }) {
  const bytes = Buffer.from(rgb, "base64");
  const rgba = new Uint8ClampedArray(width * height * 4).fill(255);
  for (let at = 0; at < width * height; at++) rgba.set(bytes.subarray(3 * at, 3 * at + 3), 4 * at);
  return { width, height, read: (top, bottom) => rgba.subarray(4 * width * top, 4 * width * bottom) };
}

/** Graphs whose answers are arithmetic on the cells they are given, which Python repeats. */
function pretend(shape) {
  const last = shape.depths.length - 1;
  return shape.depths.map((_, stage) => async (inputs) => {
    const tokens = stage ? inputs[0].dims[1] : cost.numPatches(shape) + 1;
    const dim = shape.embed_dims[stage];
    const logits = Float32Array.from({ length: shape.num_classes }, (_, k) => (k === stage ? 1 + stage : 0));
    if (stage === last) return [logits];
    const cells = stage ? Array.from(inputs[1].data, Number) : Array.from({ length: tokens }, (_, place) => place - 1);
    const received = Float32Array.from(cells, (cell) => ((cell * 7 + 3 * stage) % 16) / 16);
    return [new Float32Array(tokens * dim), received, logits];
  });
}

const answers = {
  fit: (image, preprocess) => Array.from(fit(imageOf(image), preprocess)),
  normalise: (pixels, preprocess) => Array.from(normalise(Uint8Array.from(pixels), preprocess)),
  cropBox,
  choose: (received, strengths, least) => choose(toImportance(received), strengths, least),
  setting,
  macs: cost.macs,
  fullMacs: cost.fullMacs,
  numbersMoved: cost.numbersMoved,
  estimateJoules: cost.estimateJoules,
  whyNot,
  run: async (bundle, options) => {
    const { img_size: [rows, columns], in_chans: channels } = bundle.shape;
    const session = new Session(bundle, pretend(bundle.shape));
    const { kept, refined, macs, exitStage } = await session.run(new Float32Array(channels * rows * columns), options);
    return { kept: kept.map((each) => [...each]), refined: refined.map((each) => [...each]), macs, exitStage };
  },
};

const found = [];
for (const [name, ...given] of JSON.parse(readFileSync(0, "utf8"))) {
  try {
    found.push(await answers[name](...given));
  } catch (error) {
    found.push({ error: error.message });
  }
}
process.stdout.write(JSON.stringify(found));
