// The page: photos in, the dial, and what the model says. Where it runs is behind `models`.

import { drawCurve } from "./curve.js";
import { BrowserModel, ServerModel } from "./models.js";
import { Newest } from "./newest.js";
import { openPhoto, Photo } from "./photo.js";
import { Report } from "./report.js";
import { Webcam } from "./webcam.js";

const $ = (id) => document.getElementById(id);
const BUSY_MS = 1000; // a full server costs the webcam so much, and not its life
const isLocal = document.documentElement.dataset.mode === "browser";

const model = isLocal ? new BrowserModel() : new ServerModel();
const report = new Report();
const newest = new Newest(predict);
const webcam = new Webcam(() => ask());
let info = null;
let photo = null;
let answer = null;
let takes = 0; // photos and webcams asked for so far: only the newest counts

$("where").textContent = isLocal
  ? "Computed in this browser: no photo leaves your device."
  : "Computed by the server that sent this page.";
$("unstarted").hidden = true;
$("hint").hidden = false;
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
  dial();
  if (photo) present(); // it waited
  else ask();
  await listExamples();
}

function listen() {
  $("file").addEventListener("change", ({ target }) => {
    takeFirst(target.files);
    target.value = ""; // so that the same file can be chosen again
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      const isOver = name === "dragover" || (name === "dragleave" && event.relatedTarget !== null); // from child to child
      $("drop").classList.toggle("is-over", isOver);
    });
  }
  document.addEventListener("drop", ({ dataTransfer }) => {
    if (!takeFirst(dataTransfer.files)) report.fail("That was not a file; save the picture first, then drop its file here.");
  });
  document.addEventListener("paste", ({ clipboardData }) => takeFirst(clipboardData.files));
  $("webcam").addEventListener("click", toggleWebcam);
  for (const id of ["budget", "exit", "exit-on"]) $(id).addEventListener("input", turn);
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    $("key-form").hidden = true;
    $("file").focus(); // which the form had
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
  await Promise.all(listed.map(addExample));
}

/** Fetched once, so that it is there without a network, too; a server without it shows none. */
async function addExample({ file, name }) {
  const button = document.createElement("button");
  const picture = document.createElement("img");
  button.type = "button";
  button.hidden = true;
  picture.alt = `Example: ${name}`;
  button.append(picture);
  $("examples").append(button);
  const response = await fetch(`page/photos/${encodeURIComponent(file)}`).catch(() => null);
  const blob = response?.ok ? await response.blob().catch(() => null) : null;
  if (!blob) {
    button.remove();
    return;
  }
  picture.src = URL.createObjectURL(blob);
  button.addEventListener("click", () => take(blob, name));
  button.hidden = false;
}

function takeFirst([file]) {
  if (file) take(file, file.name);
  return Boolean(file);
}

/** What was asked for last is shown, whichever is decoded first. */
async function take(blob, name) {
  const turn = ++takes;
  webcam.stop();
  try {
    const next = await openPhoto(blob, name);
    if (turn === takes) show(next);
    else next.close();
  } catch (error) {
    if (turn === takes) report.fail(error.message);
  }
}

function show(next) {
  photo?.close();
  photo = next;
  answer = null;
  if (info) present(); // else it waits for the model
}

/** The photo, before there is an answer to it. */
function present() {
  report.clearFailure();
  report.photo(info, photo);
  showCurve();
  ask();
}

async function toggleWebcam() {
  takes++;
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
  dial();
  ask();
}

/** What stands at the dial. */
function dial() {
  $("exit").disabled = !$("exit-on").checked;
  $("exit-out").textContent = `${$("exit").value} %`;
  if (!info) return;
  report.dial(info, settings());
  showCurve();
}

function showCurve() {
  if (info?.points) drawCurve($("curve"), info.points, settings().budget, answer && answer.macs_share);
}

// ---- answers

function ask() {
  if (info && (photo || webcam.isOn)) newest.ask();
}

async function predict() {
  const isLive = webcam.isOn;
  let asked = photo;
  try {
    if (isLive) {
      const frame = new Photo(await webcam.frame(), "the webcam");
      if (!webcam.isOn) return frame.close(); // stopped meanwhile
      photo?.close();
      asked = photo = frame;
    }
    const wanted = settings();
    const found = await model.predict(asked, wanted);
    if (asked !== photo) return; // another photo was chosen meanwhile, and waits
    answer = found;
    $("main").dataset.answered = JSON.stringify(wanted);
    report.clearFailure();
    report.answer(info, photo, answer, isLocal);
    showCurve();
  } catch (error) {
    if (asked !== photo || isLive !== webcam.isOn) return; // nobody waits for it any more
    const isBusy = error.status === 429 || error.status === 503;
    if (isLive && isBusy) {
      report.fail(error.message, { isNews: false });
      setTimeout(ask, BUSY_MS);
      return;
    }
    webcam.stop();
    fail(error);
  }
  if (webcam.isOn) requestAnimationFrame(ask);
}
