// The model's trade-off as inline SVG: accuracy against the share of the full MACs, and where the dial stands on it.

import { interpolate } from "./points.js";

const EDGE = { left: 44, right: 14, top: 30, bottom: 40 };
const HEIGHT = 240;

/**
 * Held-out accuracy at a budget, between two points of the table on the chord. `points` dearest first.
 * On a cliff (`points.js`) less: there the cheaper point is served, and the chord is drawn all the same.
 */
export function accuracyAt(points, budget) {
  const rising = [...points].reverse();
  return interpolate(budget, rising.map((point) => point.share), rising.map((point) => point.accuracy));
}

/** Draws into `box`. `spent`: share of the full MACs that the photo took, or null. */
export function drawCurve(box, points, budget, spent) {
  const width = Math.max(260, box.clientWidth);
  const accuracies = points.map((point) => point.accuracy);
  const [low, high] = padded(Math.min(...accuracies), Math.max(...accuracies));
  const x = (share) => EDGE.left + share * (width - EDGE.left - EDGE.right);
  const y = (accuracy) => HEIGHT - EDGE.bottom - ((accuracy - low) / (high - low)) * (HEIGHT - EDGE.top - EDGE.bottom);
  const here = accuracyAt(points, budget);
  const said = `At ${percent(budget)} of the full MACs ${percent(here)} of held-out images are answered right.`;
  const svg = make("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", "aria-label": said });
  for (let k = 0; k <= 4; k++) {
    const [share, accuracy] = [k / 4, low + (k / 4) * (high - low)];
    svg.append(
      make("line", { class: "grid", x1: x(0), x2: x(1), y1: y(accuracy), y2: y(accuracy) }),
      make("text", { class: "tick", x: EDGE.left - 6, y: y(accuracy) + 4, "text-anchor": "end" }, `${Math.round(100 * accuracy)}`),
      make("text", { class: "tick", x: x(share), y: HEIGHT - EDGE.bottom + 17, "text-anchor": k === 4 ? "end" : "middle" }, percent(share)),
    );
  }
  svg.append(
    make("text", { class: "tick", x: 0, y: 12 }, "answered right, %"),
    make("text", { class: "tick", x: x(0.5), y: HEIGHT - 6, "text-anchor": "middle" }, "MACs an image, of the full model"),
    make("polyline", { class: "line", points: points.map((point) => `${x(point.share)},${y(point.accuracy)}`).join(" ") }),
    ...points.map((point) => make("circle", { class: "point", cx: x(point.share), cy: y(point.accuracy), r: 2.5 })),
  );
  if (spent !== null) svg.append(make("line", { class: "spent", x1: x(spent), x2: x(spent), y1: y(low), y2: y(high) }));
  svg.append(make("circle", { class: "here", id: "here", cx: x(budget), cy: y(here), r: 7 }));
  box.replaceChildren(svg);
}

/** Ends of the axis of accuracy, with whole percents at its quarters. */
function padded(low, high) {
  const step = Math.max(1, Math.ceil((100 * (high - low) + 0.5) / 4));
  const top = Math.ceil(100 * high);
  return [(top - 4 * step) / 100, top / 100];
}

export function percent(share) {
  return `${share > 0 && share < 0.01 ? "<1" : Math.round(100 * share)} %`;
}

function make(tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}
