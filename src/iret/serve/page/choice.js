// From attention to kept patches; `iret.runtime.choice` and `keep` in JavaScript, for one image.
// Places: the class token at 0, whose entries mean nothing, then one patch each.

export const ROUNDING_SHARE = 1e-6;

/** Attention as "times uniform": mean 1 over the patches. */
export function toImportance(received) {
  const importance = Float64Array.from(received);
  importance[0] = 0;
  let sum = 0;
  for (const each of importance) sum += each;
  const scale = (importance.length - 1) / sum;
  return importance.map((each) => each * scale);
}

/**
 * Which places are kept at `keep`, at least `minKeep` patches, and which of them refined at `refine`, as large or larger.
 * Where the two are equal all that is kept is refined, the floor too: `refined` is null.
 */
export function choose(importance, [keep, refine], minKeep) {
  const kept = reaching(importance, keep);
  kept[0] = true;
  if (kept.filter(Boolean).length - 1 < minKeep) {
    const places = Array.from(importance.keys()).slice(1);
    places.sort((a, b) => importance[b] - importance[a] || a - b);
    for (const place of places.slice(0, minKeep)) kept[place] = true;
  }
  if (keep === refine) return { kept, refined: null };
  const refined = reaching(importance, refine);
  refined[0] = false;
  return { kept, refined };
}

function reaching(importance, strength) {
  return Array.from(importance, (each) => each >= strength - ROUNDING_SHARE);
}
