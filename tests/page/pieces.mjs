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
  const read = (top, bottom, left, right) => {
    const wide = 4 * (right - left);
    const out = new Uint8ClampedArray((bottom - top) * wide);
    for (let y = top; y < bottom; y++) out.set(rgba.subarray(4 * (width * y + left), 4 * (width * y + right)), (y - top) * wide);
    return out;
  };
  return { width, height, read };
}

/**
 * Graphs whose answers are whole numbers made of all that they are given, place by place, which Python repeats exactly;
 * `isBroken`: every logit is NaN.
 */
function pretend(shape, isBroken) {
  const last = shape.depths.length - 1;
  return shape.depths.map((_, stage) => async ([first, cell, pixels, source, bias]) => {
    const cells = stage ? Array.from(cell.data, Number) : Array.from({ length: cost.numPatches(shape) + 1 }, (_, place) => place - 1);
    const values = cells.map((each, place) => {
      if (stage === 0) return each + 3 + weigh(first.data, 0, first.data.length);
      const [width, size] = [first.dims[2], pixels.data.length / pixels.dims[0]];
      const read = weigh(pixels.data, Number(source.data[place]) * size, size);
      return each + 3 + weigh(first.data, place * width, width) + read + bias.data[place];
    });
    const sure = (values.reduce((sum, each) => sum + each, 0) % 8) / 64;
    const logits = Float32Array.from({ length: shape.num_classes }, (_, k) => (isBroken ? NaN : k === stage ? 1 + stage + sure : 0));
    if (stage === last) return [logits];
    const x = values.flatMap((each) => Array.from({ length: shape.embed_dims[stage] }, (_, d) => (each + d) % 97));
    return [Float32Array.from(x), Float32Array.from(values, (each) => (each % 16) / 16), logits];
  });
}

function weigh(data, from, count) {
  let sum = 0;
  for (let k = 0; k < count; k++) sum += data[from + k] * (1 + (k % 7));
  return sum;
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
  run: async (bundle, options, isBroken = false) => {
    const { img_size: [rows, columns], in_chans: channels } = bundle.shape;
    const image = Float32Array.from({ length: channels * rows * columns }, (_, place) => place % 251);
    const { kept, refined, logits, ...rest } = await new Session(bundle, pretend(bundle.shape, isBroken)).run(image, options);
    return { ...rest, kept: kept.map((each) => [...each]), refined: refined.map((each) => [...each]), logits: [...logits] };
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
