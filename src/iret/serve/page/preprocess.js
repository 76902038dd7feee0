// From a decoded photo to what a model takes; `iret.runtime.preprocess` in JavaScript.
// Decoding is the browser's own: upright by EXIF, colour profiles left alone, transparency over white, as in Python.

import { resize } from "./resize.js";

export const MAX_PIXELS = 64_000_000;

/** The largest centred crop of the model's shape, times `crop_ratio`: [left, top, right, bottom]. */
export function cropBox(width, height, { img_size: [rows, columns], crop_ratio: ratio = 1 }) {
  const scale = ratio * Math.min(width / columns, height / rows);
  const [wide, high] = [columns * scale, rows * scale];
  const [left, top] = [(width - wide) / 2, (height - high) / 2];
  return [Math.max(0, left), Math.max(0, top), Math.min(width, left + wide), Math.min(height, top + high)];
}

/** uint8 [Y, X, C] of an image as `resize` takes it. */
export function fit(image, preprocess) {
  const { img_size: [rows, columns], mean, interpolation = "bicubic" } = preprocess;
  const source = mean.length === 1 ? greyed(image) : image;
  const rgb = resize(source, [columns, rows], interpolation, cropBox(image.width, image.height, preprocess));
  return mean.length === 1 ? rgb.filter((_, place) => place % 3 === 0) : rgb;
}

/** Pillow turns an image grey before it resizes it. */
function greyed({ width, height, read }) {
  return {
    width,
    height,
    read: (...box) => {
      const data = read(...box).slice();
      for (let at = 0; at < data.length; at += 4) {
        const grey = (data[at] * 19595 + data[at + 1] * 38470 + data[at + 2] * 7471 + 0x8000) >> 16;
        data.fill(grey, at, at + 3);
      }
      return data;
    },
  };
}

/** float32 [C, Y, X] of uint8 [Y, X, C]. */
export function normalise(pixels, { img_size: [rows, columns], mean, std }) {
  const channels = mean.length;
  const out = new Float32Array(pixels.length);
  for (let c = 0; c < channels; c++) {
    const [shift, scale] = [Math.fround(mean[c]), Math.fround(std[c])];
    for (let at = 0; at < rows * columns; at++) {
      const part = Math.fround(pixels[at * channels + c] / 255);
      out[c * rows * columns + at] = Math.fround(Math.fround(part - shift) / scale);
    }
  }
  return out;
}
