// A bundle at work in the page: the engine computes a stage, this chooses, the engine computes the next.
// `iret.runtime.session` in JavaScript, for one image a call. Knows no engine: a graph is a function
// async (inputs [{ data, dims }]) -> outputs [typed array].

import { choose, toImportance } from "./choice.js";
import * as cost from "./cost.js";
import { setting } from "./points.js";

export class Session {
  /** `bundle` is bundle.json, checked by `whyNot`; `graphs` one for each stage. */
  constructor(bundle, graphs) {
    this.bundle = bundle;
    this.graphs = graphs;
    this.shape = bundle.shape;
    this.cells = cost.numPatches(bundle.shape);
    this.fullMacs = cost.fullMacs(bundle.shape);
  }

  /**
   * What `image`, float32 [C, Y, X], shows; `budget` null: all of it; `exitConfidence` in place of the one that goes with it.
   *
   * { logits, stageLogits [a stage that ran each], exitStage, kept and refined [S][cells] of 0 and 1, importance [a choice
   *   each: the class token's, then one a token], macs, joules }
   */
  async run(image, { budget = null, exitConfidence = null } = {}) {
    const { shape, cells } = this;
    const last = shape.depths.length - 1;
    const found = setting(this.bundle.points, budget ?? 1, last);
    const leave = exitConfidence ?? found.exitConfidence ?? Infinity;
    const drops = found.thresholds.flat().some((each) => each > 0);
    const trace = { kept: [], refined: [], importance: [], stageLogits: [] };
    let [x, tokens] = [null, Array.from({ length: cells + 1 }, (_, place) => ({ cell: place - 1, isRefined: place > 0 }))];
    for (let stage = 0; stage <= last; stage++) {
      const [nextX, received, logits] = await this.#call(stage, image, x, tokens);
      trace.kept.push(this.#mark(tokens, (token) => token.cell >= 0));
      trace.refined.push(this.#mark(tokens, (token) => stage > 0 && token.isRefined));
      trace.stageLogits.push(logits);
      const isSure = leave !== Infinity && !(confidence(logits) < Math.fround(leave));
      if (stage === last || isSure) break;
      [x, tokens] = [nextX, tokens.map(({ cell }) => ({ cell, isRefined: cell >= 0 }))];
      if (!drops) continue;
      const importance = toImportance(received);
      trace.importance.push(importance);
      const choice = choose(importance, found.thresholds[stage], cost.minKeep(shape));
      [x, tokens] = this.#cut(stage, x, tokens, choice);
    }
    return this.#report(trace, drops);
  }

  /** [tokens, received attention, logits] of a stage; of the last, logits alone. */
  async #call(stage, image, x, tokens) {
    const { in_chans: channels, img_size: size, patch_size: side, embed_dims: dims } = this.shape;
    let inputs = [{ data: image, dims: [1, channels, ...size] }];
    if (stage > 0) {
      const read = tokens.filter((token) => token.isRefined);
      let row = 0;
      inputs = [
        { data: x, dims: [tokens.length, 1, dims[stage - 1]] },
        { data: BigInt64Array.from(tokens, (token) => BigInt(token.cell)), dims: [tokens.length, 1] },
        { data: this.#patches(image, read), dims: [1 + read.length, channels, side, side] },
        { data: BigInt64Array.from(tokens, (token) => BigInt(token.isRefined ? ++row : 0)), dims: [tokens.length, 1] },
        { data: new Float32Array(tokens.length), dims: [1, tokens.length] },
      ];
    }
    const outputs = await this.graphs[stage](inputs);
    return outputs.length === 1 ? [null, null, outputs[0]] : outputs;
  }

  /** A patch of zeros, then the pixels of these tokens' patches: float32 [1 + count, C, P, P]. */
  #patches(image, tokens) {
    const { in_chans: channels, img_size: [rows, columns], patch_size: side } = this.shape;
    const out = new Float32Array((1 + tokens.length) * channels * side * side);
    let to = channels * side * side;
    for (const { cell } of tokens) {
      const [top, left] = [Math.floor(cell / (columns / side)) * side, (cell % (columns / side)) * side];
      for (let c = 0; c < channels; c++) {
        for (let y = 0; y < side; y++, to += side) {
          const from = (c * rows + top + y) * columns + left;
          out.set(image.subarray(from, from + side), to);
        }
      }
    }
    return out;
  }

  #cut(stage, x, tokens, { kept, refined }) {
    const dim = this.shape.embed_dims[stage];
    const rows = [...tokens.keys()].filter((place) => kept[place]);
    const out = new Float32Array(rows.length * dim);
    rows.forEach((row, place) => out.set(x.subarray(row * dim, (row + 1) * dim), place * dim));
    const stay = rows.map((row) => ({ cell: tokens[row].cell, isRefined: refined ? refined[row] : tokens[row].cell >= 0 }));
    return [out, stay];
  }

  #mark(tokens, isMarked) {
    const grid = new Uint8Array(this.cells);
    for (const token of tokens) if (isMarked(token)) grid[token.cell] = 1;
    return grid;
  }

  #report({ kept, refined, importance, stageLogits }, drops) {
    const count = (grid) => grid.reduce((sum, each) => sum + each, 0);
    const [keptCounts, refinedCounts] = [kept.map(count), refined.map(count)];
    const none = () => new Uint8Array(this.cells);
    const missing = Array.from({ length: this.shape.depths.length - kept.length }, none);
    return {
      logits: stageLogits.at(-1),
      stageLogits,
      exitStage: stageLogits.length - 1,
      kept: [...kept, ...missing],
      refined: [...refined, ...missing],
      importance,
      macs: cost.macs(this.shape, keptCounts, refinedCounts, drops),
      joules: cost.estimateJoules(this.shape, keptCounts, refinedCounts, drops, this.bundle.precision),
    };
  }
}

/** Largest softmax probability, in single precision as in Python. */
function confidence(logits) {
  const most = Math.max(...logits);
  let sum = 0;
  for (const each of logits) sum = Math.fround(sum + Math.fround(Math.exp(Math.fround(each - most))));
  return Math.fround(1 / sum);
}

export function softmax(logits) {
  const most = Math.max(...logits);
  const parts = Array.from(logits, (each) => Math.exp(each - most));
  const sum = parts.reduce((total, each) => total + each, 0);
  return parts.map((each) => each / sum);
}

/** Why this page cannot run a bundle, in one sentence; null where it can. */
export function whyNot(bundle) {
  if (bundle.is_single) return "A single graph does not run in this page; export without --single-graph.";
  if (bundle.format !== 4) return `bundle.json has format ${bundle.format}; this page reads format 4: build it again.`;
  if (bundle.kind !== "onnx") return `A bundle of kind ${bundle.kind} does not run in a browser; export with --format onnx.`;
  if (bundle.is_convolved) return "A browser computes convolutions slowly; export without --convolutions.";
  if (bundle.stages.some((stage) => stage[0].tokens !== null)) return "Graphs of fixed token counts do not run in this page; export without --buckets.";
  return null;
}
