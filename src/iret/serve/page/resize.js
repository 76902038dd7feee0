// Pillow's `Image.resize(size, filter, box=)` on 8-bit channels, to the bit: antialiased, in two passes, both rounded to 8 bits.
// A canvas resizes in a way of its own in every browser, and other pixels would tip other patches.
// Source: Pillow's libImaging/Resample.c and, for "nearest", Geometry.c. Held to Pillow by tests/serve/test_page.py.

const PRECISION_BITS = 32 - 8 - 2;
const STRIP_PIXELS = 1 << 20; // of a photo read at a time: a phone's canvas is smaller than its camera

const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { support: 2, weight: cubic },
  lanczos: { support: 3, weight: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

function cubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

/**
 * The part `box` [left, top, right, bottom] of an image as RGB [rows, columns, 3].
 *
 * image: { width, height, read(top, bottom, left, right) }; `read` returns RGBA bytes, row after row.
 */
export function resize(image, [columns, rows], filter, box) {
  const [left, top, right, bottom] = box.map(Math.fround); // C floats in Pillow
  if (filter === "nearest") return nearest(image, [columns, rows], [left, top, right, bottom]);
  if (!(filter in FILTERS)) throw new Error(`Interpolation "${filter}" is unknown to this page; export the model again.`);
  const isWide = columns === image.width && left === 0 && right === columns; // nothing to do in this direction
  const isHigh = rows === image.height && top === 0 && bottom === rows;
  const down = isHigh ? null : coefficients(image.height, top, bottom, rows, FILTERS[filter]);
  const reaching = isWide ? null : coefficients(image.width, left, right, columns, FILTERS[filter]);
  const [west, east] = ends(reaching, image.width); // columns beyond are never read
  const part = { width: east - west, height: image.height, read: (begin, end) => image.read(begin, end, west, east) };
  const across = shifted(reaching, west);
  // As of Pillow 13; before it the first pass always went across. Found from its answers: 1,490 of 1,490 sizes.
  const isDownFirst = rows < image.height && image.height - rows > 2 * (image.width - columns);
  if (across && down && isDownFirst) return passAcross(asImage(passDown(part, down), part.width, rows), across, columns, 0, rows);
  const [first, last] = ends(down, image.height);
  const narrow = passAcross(part, across, columns, first, last);
  if (!down) return narrow;
  return rgbOf(passDown(asImage(rgbaOf(narrow), columns, last - first), shifted(down, first)));
}

/** For every output place, where its inputs begin and their weights in fixed point. */
function coefficients(size, from, to, count, { support, weight }) {
  const scale = Math.fround(to - from) / count;
  const stretch = Math.max(scale, 1);
  const reach = support * stretch;
  return Array.from({ length: count }, (_, place) => {
    const centre = from + (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach + 0.5));
    const end = Math.min(size, Math.trunc(centre + reach + 0.5));
    const raw = Array.from({ length: end - first }, (_, k) => weight((k + first - centre + 0.5) * (1 / stretch)));
    const sum = raw.reduce((total, each) => total + each, 0);
    const weights = raw.map((each) => (sum === 0 ? each : each / sum) * (1 << PRECISION_BITS));
    return { first, weights: Int32Array.from(weights, (each) => Math.trunc(each < 0 ? each - 0.5 : each + 0.5)) };
  });
}

/** Of the inputs, the first that is read and the first that is no longer; all where nothing is weighed. */
function ends(weighed, size) {
  if (!weighed) return [0, size];
  return [Math.min(...weighed.map((each) => each.first)), Math.max(...weighed.map((each) => each.first + each.weights.length))];
}

/** The same, of inputs that begin at `start`. */
function shifted(weighed, start) {
  return weighed && weighed.map((each) => ({ ...each, first: each.first - start }));
}

function clip8(sum) {
  const value = sum >> PRECISION_BITS;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

/** RGBA rows that are there already, as `resize` takes an image. */
function asImage(data, width, height) {
  return { width, height, read: (top, bottom) => data.subarray(4 * width * top, 4 * width * bottom) };
}

/** Rows `from` to `to`, some at a time: draw(data, first row, count). */
function inStrips(image, from, to, draw) {
  const strip = Math.max(1, Math.floor(STRIP_PIXELS / image.width));
  for (let row = from; row < to; row += strip) {
    const count = Math.min(strip, to - row);
    draw(image.read(row, row + count), row, count);
  }
}

/** Rows `first` to `last` of the image at `columns` columns, RGB; `across` null: as they are. */
function passAcross(image, across, columns, first, last) {
  const out = new Uint8Array((last - first) * columns * 3);
  let to = 0;
  inStrips(image, first, last, (data, _, count) => {
    for (let y = 0; y < count; y++) {
      for (let x = 0; x < columns; x++) {
        const at = 4 * (y * image.width + (across ? across[x].first : x));
        for (let c = 0; c < 3; c++) out[to++] = across ? weigh(data, at + c, across[x].weights) : data[at + c];
      }
    }
  });
  return out;
}

function weigh(data, at, weights) {
  let sum = 1 << (PRECISION_BITS - 1);
  for (let k = 0; k < weights.length; k++) sum += data[at + 4 * k] * weights[k];
  return clip8(sum);
}

/** All columns of the image at `down.length` rows, RGBA. */
function passDown(image, down) {
  const wide = 4 * image.width;
  const sums = new Int32Array(down.length * wide).fill(1 << (PRECISION_BITS - 1));
  inStrips(image, ...ends(down, image.height), (data, row, count) => {
    down.forEach(({ first, weights }, place) => {
      const end = Math.min(row + count, first + weights.length);
      for (let y = Math.max(row, first); y < end; y++) {
        const [weight, from, to] = [weights[y - first], (y - row) * wide, place * wide];
        for (let at = 0; at < wide; at++) sums[to + at] += data[from + at] * weight;
      }
    });
  });
  return Uint8Array.from(sums, clip8);
}

function rgbaOf(rgb) {
  const out = new Uint8Array((rgb.length / 3) * 4);
  for (let at = 0; at < rgb.length / 3; at++) for (let c = 0; c < 3; c++) out[4 * at + c] = rgb[3 * at + c];
  return out;
}

function rgbOf(rgba) {
  return rgba.filter((_, at) => at % 4 !== 3);
}

function nearest(image, [columns, rows], [left, top, right, bottom]) {
  const places = (from, to, count, size) => {
    const step = (to - from) / count;
    const found = [];
    for (let at = from + step * 0.5; found.length < count; at += step) found.push(Math.min(size - 1, Math.trunc(at)));
    return found;
  };
  const across = places(left, right, columns, image.width);
  const out = new Uint8Array(rows * columns * 3);
  let to = 0;
  for (const row of places(top, bottom, rows, image.height)) {
    const data = image.read(row, row + 1, 0, image.width);
    for (const column of across) for (let c = 0; c < 3; c++) out[to++] = data[4 * column + c];
  }
  return out;
}
