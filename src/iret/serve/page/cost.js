// Multiply-accumulates and an estimate of joules, in closed form; `iret.runtime.cost` and `iret.measure.estimate`.
// A shape is that of bundle.json. Exact: every count stays below 2^53.

// M. Horowitz, ISSCC 2014, 45 nm: one multiply and add; a byte to or from DRAM.
const MAC_J = { float32: 3.7e-12 + 0.9e-12, int8: 0.2e-12 + 0.03e-12 };
const BYTE_J = (1.3e-9 / 8 + 2.6e-9 / 8) / 2;

const levels = (shape) => shape.depths.length - 1;
const side = (shape, level) => shape.patch_size / 2 ** level;
const detailLevel = (shape, stage) => levels(shape) - stage + 1;

export function numPatches(shape) {
  return (shape.img_size[0] / shape.patch_size) * (shape.img_size[1] / shape.patch_size);
}

export function minKeep(shape) {
  return Math.max(4, Math.floor(numPatches(shape) / 24));
}

function levelMacs(shape, level, withDetails) {
  const half = side(shape, level);
  const channels = shape.in_chans;
  const whole = 2 * half;
  if (shape.lifting === "dawn") {
    const position = 4 * channels * 2 * channels + 2 * channels * channels;
    return position * half * (withDetails ? 4 * whole : whole + half);
  }
  const made = withDetails ? whole : half;
  return channels * (whole * whole * made + made * whole * made);
}

function coarseMacs(shape) {
  if (shape.lifting !== "dawn") return shape.in_chans * shape.patch_size ** 2 * side(shape, levels(shape)) ** 2;
  let total = 0;
  for (let level = 1; level <= levels(shape); level++) total += levelMacs(shape, level, false);
  return total;
}

function detailMacs(shape, level) {
  let total = levelMacs(shape, level, true);
  for (let earlier = 1; earlier < level; earlier++) total += levelMacs(shape, earlier, false);
  return total;
}

function leadInMacs(shape, stage, kept, refined) {
  const dim = shape.embed_dims[stage];
  if (stage === 0) {
    const coarse = shape.in_chans * side(shape, levels(shape)) ** 2;
    return numPatches(shape) * (coarseMacs(shape) + coarse * dim);
  }
  const level = detailLevel(shape, stage);
  const details = 3 * shape.in_chans * side(shape, level) ** 2;
  return (kept + 1) * shape.embed_dims[stage - 1] * dim + refined * (detailMacs(shape, level) + details * dim);
}

/** Tokens that pass an MLP of `stage`, in all its blocks; if scored those of the last are the ones that stay, and the head's. */
function mlpTokens(shape, kept, stage, isScored) {
  const [here, depth] = [kept[stage] + 1, shape.depths[stage]];
  if (!isScored || stage === levels(shape)) return depth * here;
  return (depth - 1) * here + (stage + 1 < kept.length ? kept[stage + 1] + 1 : 0) + 1;
}

function stageMacs(shape, stage, kept, refined, isScored, hasHead) {
  const [dim, depth, tokens] = [shape.embed_dims[stage], shape.depths[stage], kept[stage] + 1];
  let total = leadInMacs(shape, stage, kept[stage], refined[stage]) + depth * (4 * dim + 2 * tokens) * tokens * dim;
  total += 2 * shape.mlp_ratio * mlpTokens(shape, kept, stage, isScored) * dim * dim;
  if (isScored && stage < levels(shape)) {
    total +=
      shape.importance === "column"
        ? tokens * (tokens - 1) * dim
        : Math.min(shape.scored_blocks, shape.depths[stage]) * (tokens - 1) * dim;
  }
  return hasHead ? total + dim * shape.num_classes : total;
}

/** MACs spent on an image that passed `kept.length` stages, so many patches kept and refined in each. */
export function macs(shape, kept, refined, isScored) {
  return kept.reduce((sum, _, s) => sum + stageMacs(shape, s, kept, refined, isScored, true), 0);
}

/** MACs with nothing scored or dropped, and only the last head: what a budget is a share of. */
export function fullMacs(shape) {
  const every = shape.depths.map(() => numPatches(shape));
  return every.reduce((sum, _, s) => sum + stageMacs(shape, s, every, every, false, s === levels(shape)), 0);
}

/** Numbers to and from memory for one image; see `iret.runtime.cost.numbers_moved`. */
export function numbersMoved(shape, kept, refined, isScored) {
  const every = numPatches(shape);
  const [pixels, coarse] = [shape.in_chans * shape.patch_size ** 2, shape.in_chans * side(shape, levels(shape)) ** 2];
  const taps = { linear: 3, haar: 0, dawn: 10 * shape.in_chans ** 2 }[shape.lifting];
  let total = levels(shape) * 4 * taps + shape.embed_dims[0] * coarse + every * (pixels + shape.embed_dims[0]);
  kept.forEach((patches, stage) => {
    const dim = shape.embed_dims[stage];
    total += shape.depths[stage] * (4 + 2 * shape.mlp_ratio) * dim ** 2;
    total += shape.depths[stage] * 6 * (patches + 1) * dim; // of attention
    total += (2 + 2 * shape.mlp_ratio) * mlpTokens(shape, kept, stage, isScored) * dim;
    if (shape.num_classes) total += dim * shape.num_classes + dim + shape.num_classes;
    if (stage) {
      const before = shape.embed_dims[stage - 1];
      const details = 3 * shape.in_chans * side(shape, detailLevel(shape, stage)) ** 2;
      total += (before + details) * dim + (patches + 1) * (before + dim) + refined[stage] * (pixels + dim);
    }
  });
  return total;
}

/** Joules of arithmetic and memory alone, at published constants of one chip process: read ratios. */
export function estimateJoules(shape, kept, refined, isScored, precision = "float32") {
  const [work, moved] = [macs(shape, kept, refined, isScored), numbersMoved(shape, kept, refined, isScored)];
  if (precision !== "int8") return MAC_J.float32 * work + BYTE_J * 4 * moved;
  let [weights, rounded] = [0, 0]; // of the linear layers of the blocks, which alone are in 8 bits
  kept.forEach((patches, stage) => {
    const [size, depth] = [shape.embed_dims[stage] ** 2, shape.depths[stage]];
    weights += depth * (4 + 2 * shape.mlp_ratio) * size;
    rounded += (4 * depth * (patches + 1) + 2 * shape.mlp_ratio * mlpTokens(shape, kept, stage, isScored)) * size;
  });
  const inFloat = MAC_J.float32 * (work - rounded) + BYTE_J * 4 * (moved - weights);
  return inFloat + MAC_J.int8 * rounded + BYTE_J * weights;
}
