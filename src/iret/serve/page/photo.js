// A photo as the browser decoded it: its pixels for the model, itself for a server, and a drawing of what the model sees of it.

import { cropBox, fit, MAX_PIXELS } from "./preprocess.js";

const UPLOAD_BYTES = 512 * 1024; // a larger file is sent to a server as the crop that it would take
const UPLOAD_SIDE = 1024;
const UPLOAD_TYPES = ["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"]; // a server decodes no more

/** Throws a sentence where `blob` is no image. */
export async function openPhoto(blob, name) {
  let bitmap;
  try {
    const asStored = { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" };
    bitmap = await createImageBitmap(blob, asStored);
  } catch {
    throw new Error(`${name} is not an image that this browser can read, or too large for it; give a JPEG, PNG or WebP.`);
  }
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) {
    bitmap.close();
    throw new Error(`${name} has ${width} x ${height} pixels, more than ${MAX_PIXELS / 1e6} million; resize it first.`);
  }
  return new Photo(bitmap, name, blob);
}

export class Photo {
  #pixels = null;
  #upload = null;

  /** `blob`: the file it came from; null: none, as a frame of a webcam. */
  constructor(bitmap, name, blob = null) {
    this.bitmap = bitmap;
    this.name = name;
    this.blob = blob;
  }

  /** uint8 [Y, X, C] as the model takes it. */
  pixels(preprocess) {
    this.#pixels ??= fit({ width: this.bitmap.width, height: this.bitmap.height, read: reader(this.bitmap) }, preprocess);
    return this.#pixels;
  }

  /** What is sent to a server: the file itself or, where it would not be taken or there is none, the centre that is looked at. */
  async upload({ preprocess, limits }) {
    this.#upload ??= this.#isTaken(limits) ? this.blob : await this.#cropped(preprocess);
    return this.#upload;
  }

  /** The part that the model sees, filling the canvas. */
  draw(canvas, preprocess) {
    const [left, top, right, bottom] = cropBox(this.bitmap.width, this.bitmap.height, preprocess);
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.fillStyle = "white";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(this.bitmap, left, top, right - left, bottom - top, 0, 0, canvas.width, canvas.height);
  }

  close() {
    this.bitmap.close();
  }

  #isTaken({ body_bytes: bytes, pixels }) {
    const { blob, bitmap } = this;
    if (!blob || !UPLOAD_TYPES.includes(blob.type)) return false;
    return blob.size <= Math.min(UPLOAD_BYTES, bytes) && bitmap.width * bitmap.height <= pixels;
  }

  async #cropped(preprocess) {
    const whole = { ...preprocess, crop_ratio: 1 }; // the server takes its share of it
    const [left, top, right, bottom] = cropBox(this.bitmap.width, this.bitmap.height, whole);
    const scale = Math.min(1, UPLOAD_SIDE / Math.max(right - left, bottom - top));
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [right - left, bottom - top].map((side) => Math.max(1, Math.round(side * scale)));
    this.draw(canvas, whole);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.95));
    if (!blob) throw new Error(`${this.name} could not be made ready to send; resize it first.`);
    return blob;
  }
}

/** A part of an image as RGBA over white, through a canvas no larger than what is asked for. */
function reader(bitmap) {
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("2d", { willReadFrequently: true });
  return (top, bottom, left, right) => {
    [canvas.width, canvas.height] = [right - left, bottom - top];
    context.fillStyle = "white";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(bitmap, -left, -top);
    return context.getImageData(0, 0, canvas.width, canvas.height).data;
  };
}
