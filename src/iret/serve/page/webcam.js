// The webcam: on, off, and one frame at a time.

const $ = (id) => document.getElementById(id);

export class Webcam {
  #stream = null; // of a camera that gives frames
  #turn = 0; // starts and stops so far: only the newest counts
  #video = document.createElement("video");

  /** `started` is called once frames come. */
  constructor(started) {
    this.started = started;
  }

  get isOn() {
    return this.#stream !== null;
  }

  /** Throws a sentence where there is none or it may not be used. Stopped or started again meanwhile, it ends without a word. */
  async start() {
    if (!navigator.mediaDevices) throw new Error("A browser opens the webcam on https or localhost alone; choose a photo instead.");
    this.stop();
    const turn = this.#turn;
    let stream = null;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 640 }, height: { ideal: 480 } } });
      if (turn !== this.#turn) return end(stream);
      this.#video.srcObject = stream;
      this.#video.muted = true;
      this.#video.playsInline = true;
      await this.#video.play();
    } catch (error) {
      end(stream);
      if (turn !== this.#turn) return;
      throw new Error(
        stream === null && error.name === "NotAllowedError"
          ? "The webcam was not allowed; allow it in the browser's settings of this page, or choose a photo."
          : "No webcam could be opened; choose a photo instead.",
      );
    }
    if (turn !== this.#turn) return end(stream);
    this.#stream = stream;
    stream.getVideoTracks()[0].addEventListener("ended", () => {
      if (this.#stream === stream) this.stop(); // unplugged, or no longer allowed
    });
    this.#mark();
    this.started();
  }

  stop() {
    this.#turn++;
    end(this.#stream);
    this.#stream = this.#video.srcObject = null;
    this.#mark();
  }

  /** What it sees now, as an ImageBitmap. */
  frame() {
    return createImageBitmap(this.#video, { colorSpaceConversion: "none" });
  }

  #mark() {
    $("webcam").classList.toggle("is-on", this.isOn);
    $("webcam").textContent = this.isOn ? "Stop the webcam" : "Webcam";
  }
}

function end(stream) {
  stream?.getTracks().forEach((track) => track.stop());
}
