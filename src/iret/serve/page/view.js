// Pictures of what a model looked at: the photo under the outcome, and the photo as each stage saw it.
// A patch is drawn at the resolution its token holds, outlined where details were added, dark and hatched where it was dropped.

const SIDE = 576; // pixels along the longer side of a picture
const AMBER = "#ffb000"; // told apart from photos and by colour-blind eyes
const DIM = { stage: 0.86, photo: 0.66 }; // of dropped patches

/** The photo under the outcome: dark where the last stage looked no longer, outlined what was ever read in detail of the rest. */
export function drawOutcome(canvas, photo, { preprocess, grid }, trace) {
  [canvas.width, canvas.height] = sizeOf(preprocess.img_size);
  photo.draw(canvas, preprocess);
  if (!trace) return;
  const { kept, detailed } = outcomeOf(trace);
  mark(canvas, grid, kept, detailed, DIM.photo);
}

/** The photo as stage `stage` saw it. */
export function drawStage(canvas, photo, info, trace, stage) {
  const { img_size: [rows, columns] } = info.preprocess;
  [canvas.width, canvas.height] = sizeOf([rows, columns]);
  const context = canvas.getContext("2d");
  const small = document.createElement("canvas");
  [small.width, small.height] = [columns, rows];
  small.getContext("2d").putImageData(asRead(photo.pixels(info.preprocess), info, trace, stage), 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
  mark(canvas, info.grid, trace.kept[stage], trace.refined[stage], DIM.stage);
}

/** Patches that the last stage which ran looked at, and those of them that were ever read in detail. */
export function outcomeOf({ kept, refined }) {
  const last = [...kept].reverse().find((grid) => grid.some(Boolean));
  return { kept: last, detailed: last.map((each, cell) => each && refined.some((stage) => stage[cell])) };
}

/** A whole number of canvas pixels for each of the model's, about SIDE of them. */
function sizeOf([rows, columns]) {
  const scale = Math.max(1, Math.round(SIDE / Math.max(rows, columns)));
  return [columns * scale, rows * scale];
}

/** The model's pixels, every patch as means of squares as small as the details read so far allow. */
function asRead(pixels, { preprocess, grid, stages }, trace, stage) {
  const { img_size: [rows, columns], mean } = preprocess;
  const [channels, side] = [mean.length, rows / grid[0]];
  const image = new ImageData(columns, rows);
  for (let cell = 0; cell < grid[0] * grid[1]; cell++) {
    let level = stages - 1;
    for (let s = 1; s <= stage; s++) level -= trace.refined[s][cell];
    const [top, left] = [Math.floor(cell / grid[1]) * side, (cell % grid[1]) * side];
    const step = Math.max(1, Math.min(side, 2 ** level));
    for (let y = top; y < top + side; y += step) {
      for (let x = left; x < left + side; x += step) fillMean(image, pixels, channels, x, y, step);
    }
  }
  return image;
}

function fillMean({ data, width }, pixels, channels, left, top, step) {
  const sums = [0, 0, 0];
  const places = [];
  for (let y = top; y < top + step; y++) for (let x = left; x < left + step; x++) places.push(y * width + x);
  for (const at of places) for (let c = 0; c < 3; c++) sums[c] += pixels[at * channels + (channels === 3 ? c : 0)];
  for (const at of places) data.set([...sums.map((sum) => sum / places.length), 255], 4 * at);
}

function mark(canvas, [rows, columns], kept, refined, dim) {
  const context = canvas.getContext("2d");
  const [wide, high] = [canvas.width / columns, canvas.height / rows];
  const each = (cells, wanted, draw) => {
    cells.forEach((is, cell) => {
      if (Boolean(is) === wanted) draw((cell % columns) * wide, Math.floor(cell / columns) * high);
    });
  };
  context.fillStyle = `rgb(8 9 12 / ${dim})`;
  each(kept, false, (x, y) => context.fillRect(x, y, wide, high));
  context.save();
  context.beginPath();
  each(kept, false, (x, y) => context.rect(x, y, wide, high));
  context.clip();
  hatch(context, canvas, Math.max(6, wide / 5));
  context.restore();
  const pen = Math.max(1.5, wide / 40);
  context.lineWidth = pen;
  context.strokeStyle = AMBER;
  each(refined, true, (x, y) => context.strokeRect(x + pen / 2, y + pen / 2, wide - pen, high - pen));
}

/** Fine slanting lines, so that what was dropped is told from what is dark. */
function hatch(context, { width, height }, gap) {
  context.strokeStyle = "rgb(255 255 255 / 0.16)";
  context.lineWidth = 1.5;
  context.beginPath();
  for (let at = -height; at < width; at += gap) {
    context.moveTo(at, height);
    context.lineTo(at + height, 0);
  }
  context.stroke();
}
