// From a budget to a setting; `iret.runtime.points` in JavaScript. `table` is that of bundle.json, dearest point first.

const [CLIFF_SHARE, CLIFF_STEP] = [0.1, 0.02];

/** Of the full MACs, cheapest first. */
export function shares(table) {
  return table.points.map((point) => Math.min(1, point.macs_mean / table.full_macs)).reverse();
}

/**
 * { thresholds: [[keep, refine] per transition], exitConfidence: number or null } whose mean MACs are `budget` of the full.
 * Throws where there is no such setting.
 */
export function setting(table, budget, transitions) {
  if (!(budget > 0 && budget <= 1)) throw new Error(`A budget of ${budget} is outside (0, 1].`);
  if (budget === 1) return { thresholds: Array(transitions).fill([0, 0]), exitConfidence: null };
  if (!table) throw new Error("This model has no operating points, so it runs at its full budget alone.");
  const positions = shares(table);
  if (budget < positions[0]) {
    const least = Math.ceil(1e3 * positions[0]) / 1e3; // which can be asked for
    throw new Error(`A budget of ${budget} is below the model's cheapest point, ${least.toFixed(3)} of its MACs.`);
  }
  const ladder = table.points.map((point) => [...point.thresholds.flat(), point.exit_confidence ?? 1]).reverse();
  const found = positions.findIndex((share) => share > budget);
  const above = found < 0 ? positions.length : found;
  if (above > 0 && above < positions.length && isCliff(positions, ladder, above)) budget = positions[above - 1];
  const values = ladder[0].map((_, column) => interpolate(budget, positions, ladder.map((row) => row[column])));
  const confidence = values.pop();
  const thresholds = Array.from({ length: transitions }, (_, k) => [values[2 * k], values[2 * k + 1]]);
  return { thresholds, exitConfidence: confidence < 1 ? confidence : null };
}

/** Whether so little of the threshold lies between two points that nothing between them can be relied on. */
function isCliff(positions, ladder, above) {
  const steps = ladder[above].map((value, column) => Math.abs(value - ladder[above - 1][column]));
  return positions[above] - positions[above - 1] > CLIFF_SHARE && Math.max(...steps) < CLIFF_STEP;
}

/** numpy.interp: `positions` rise. */
export function interpolate(x, positions, values) {
  const last = positions.length - 1;
  if (x >= positions[last]) return values[last];
  if (x <= positions[0]) return values[positions.lastIndexOf(positions[0])];
  let at = 0;
  while (positions[at + 1] <= x) at++;
  const slope = (values[at + 1] - values[at]) / (positions[at + 1] - positions[at]);
  return slope * (x - positions[at]) + values[at];
}
