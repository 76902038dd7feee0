// The webcam: on, off, and one frame at a time.

const $ = (id) => document.getElementById(id);

export class Webcam {
  #stream = null;
  #video = document.createElement("video");

  /** `started` is called once frames come. */
  constructor(started) {
    this.started = started;
  }

  get isOn() {
    return this.#stream !== null;
  }

  /** Throws a sentence where there is none or it may not be used. */
  async start() {
    if (!navigator.mediaDevices) throw new Error("A browser opens the webcam on https or localhost alone; choose a photo instead.");
    try {
      const wanted = { video: { width: { ideal: 640 }, height: { ideal: 480 } } };
      this.#stream = await navigator.mediaDevices.getUserMedia(wanted);
    } catch (error) {
      throw new Error(
        error.name === "NotAllowedError"
          ? "The webcam was not allowed; allow it in the browser's settings of this page, or choose a photo."
          : "No webcam could be opened; choose a photo instead.",
      );
    }
    this.#video.srcObject = this.#stream;
    this.#video.muted = true;
    this.#video.playsInline = true;
    await this.#video.play();
    this.#mark();
    this.started();
  }

  stop() {
    this.#stream?.getTracks().forEach((track) => track.stop());
    this.#stream = null;
    this.#mark();
  }

  /** What it sees now, as an ImageBitmap. */
  frame() {
    return createImageBitmap(this.#video, { colorSpaceConversion: "none" });
  }

  #mark() {
    $("webcam").setAttribute("aria-pressed", String(this.isOn));
    $("webcam").textContent = this.isOn ? "Stop the webcam" : "Webcam";
  }
}
