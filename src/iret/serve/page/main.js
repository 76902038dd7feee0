// The page: photos in, the dial, and what the model says. Where it runs is behind `models`.

import { drawCurve } from "./curve.js";
import { BrowserModel, ServerModel } from "./models.js";
import { Newest } from "./newest.js";
import { openPhoto, Photo } from "./photo.js";
import { Report } from "./report.js";
import { Webcam } from "./webcam.js";

const $ = (id) => document.getElementById(id);
const DIAL_DELAY_MS = 30;
const isLocal = document.documentElement.dataset.mode === "browser";

const model = isLocal ? new BrowserModel() : new ServerModel();
const report = new Report();
const newest = new Newest(predict);
const webcam = new Webcam(() => ask());
let info = null;
let photo = null;
let answer = null;

$("where").textContent = isLocal
  ? "Computed in this browser: no photo leaves your device."
  : "Computed by the server that sent this page.";
listen();
start();

async function start() {
  $("loading").hidden = false;
  try {
    info = await model.open((share) => ($("progress").value = Math.min(1, share)));
  } catch (error) {
    fail(error);
    return;
  } finally {
    $("loading").hidden = true;
    $("main").setAttribute("aria-busy", "false");
  }
  report.introduce(info);
  turn();
  await listExamples();
  if (photo) ask();
}

function listen() {
  $("file").addEventListener("change", ({ target }) => {
    if (target.files[0]) take(target.files[0], target.files[0].name);
    target.value = ""; // so that the same file can be chosen again
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("is-over", name === "dragover");
    });
  }
  document.addEventListener("drop", ({ dataTransfer }) => {
    if (dataTransfer.files[0]) take(dataTransfer.files[0], dataTransfer.files[0].name);
  });
  document.addEventListener("paste", ({ clipboardData }) => {
    if (clipboardData.files[0]) take(clipboardData.files[0], clipboardData.files[0].name);
  });
  $("webcam").addEventListener("click", toggleWebcam);
  for (const id of ["budget", "exit", "exit-on"]) $(id).addEventListener("input", turn);
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    $("key-form").hidden = true;
    model.key = $("key").value;
    if (info) ask();
    else start();
  });
  new ResizeObserver(showCurve).observe($("curve"));
}

function fail(error) {
  if (error.status === 401) report.askKey(model.key === null ? "" : error.message);
  else report.fail(error.message);
}

async function listExamples() {
  const listed = await fetch("page/photos.json").then((response) => response.json()).catch(() => []);
  for (const { file, name } of listed) {
    const button = document.createElement("button");
    const picture = document.createElement("img");
    picture.alt = `Example: ${name}`;
    picture.addEventListener("error", () => button.remove()); // a server without examples
    picture.src = `page/photos/${file}`;
    button.type = "button";
    button.append(picture);
    button.addEventListener("click", async () => {
      const response = await fetch(picture.src).catch(() => null);
      if (response?.ok) take(await response.blob(), name);
      else report.fail(`The example ${name} could not be fetched; choose a photo of your own.`);
    });
    $("examples").append(button);
  }
}

async function take(blob, name) {
  webcam.stop();
  try {
    show(await openPhoto(blob, name));
  } catch (error) {
    report.fail(error.message);
  }
}

function show(next) {
  photo = next;
  answer = null;
  if (!info) return; // it waits for the model
  report.clearFailure();
  report.photo(info, photo);
  ask();
}

async function toggleWebcam() {
  if (webcam.isOn) {
    webcam.stop();
    return;
  }
  try {
    await webcam.start();
  } catch (error) {
    report.fail(error.message);
  }
}

// ---- the dial

function settings() {
  const exitConfidence = $("exit-on").checked ? $("exit").value / 100 : null;
  return { budget: info.points ? $("budget").value / 100 : null, exitConfidence };
}

function turn() {
  $("exit").disabled = !$("exit-on").checked;
  $("exit-out").textContent = `${$("exit").value} %`;
  if (!info) return;
  report.dial(info, settings());
  showCurve();
  ask(DIAL_DELAY_MS);
}

function showCurve() {
  if (info?.points) drawCurve($("curve"), info.points, settings().budget, answer && answer.macs_share);
}

// ---- answers

function ask(delay = 0) {
  if (info && (photo || webcam.isOn)) newest.ask(delay);
}

async function predict() {
  try {
    if (webcam.isOn) {
      const frame = new Photo(await webcam.frame(), "the webcam");
      if (photo?.blob === null) photo.close(); // the frame before
      photo = frame;
    }
    const [asked, wanted] = [photo, settings()];
    const found = await model.predict(asked, wanted);
    if (asked !== photo) return; // another photo was chosen meanwhile, and waits
    answer = found;
    $("main").dataset.answered = JSON.stringify(wanted);
    report.clearFailure();
    report.answer(info, photo, answer, isLocal);
    showCurve();
  } catch (error) {
    webcam.stop();
    fail(error);
  }
  if (webcam.isOn) requestAnimationFrame(() => ask());
}

