// What the page says: numbers, answers, pictures, failures. It reads `info` and answers in the form of the server's API.

import { accuracyAt, percent } from "./curve.js";
import { drawOutcome, drawStage, outcomeOf } from "./view.js";

const $ = (id) => document.getElementById(id);
const STATUS_DELAY_MS = 600; // a dial that turns says nothing until it rests
const LIVE_DELAY_MS = 3000; // between two changes of what a webcam sees

export class Report {
  #timer = 0; // of what is said next
  #next = { label: "", sentence: "" };
  #said = ""; // label

  introduce(info) {
    document.title = `iret: ${info.name}`;
    $("engine").textContent = [info.name, `${millions(info.full_macs)} MACs in full`, info.engine].filter(Boolean).join(", ");
    if (info.labels && info.labels.length <= 20) $("knows").textContent = `This model knows ${info.labels.join(", ")}, and nothing else.`;
    else $("knows").textContent = info.labels ? `This model knows ${info.labels.length} classes.` : "This model has no names for its classes.";
    const { points } = info;
    $("curve-card").hidden = !points;
    if (!points) {
      $("expected").textContent = "This model has no operating points, so it runs at its full budget; iret calibrate measures them.";
      $("budget").value = 100;
      return;
    }
    const least = Math.ceil(100 * Math.min(...points.map((point) => point.share)) - 1e-9);
    $("budget").min = least;
    $("budget-low").textContent = `${least} %`;
    $("budget").disabled = false;
    const where = info.data ? `${info.data.images.toLocaleString("en")} held-out images of ${info.data.name}` : "held-out images";
    $("curve-note").textContent = `The mean over ${where}. Amber: the dial. Dashed: what this photo took.`;
  }

  dial(info, { budget }) {
    const shown = Math.round(100 * (budget ?? 1));
    $("budget-out").textContent = `${shown} %`;
    $("budget").setAttribute("aria-valuetext", `${shown} percent of the full model's work`);
    if (info.points) {
      const right = (100 * accuracyAt(info.points, budget)).toFixed(0);
      $("expected").textContent = `In the mean over photos, ${right} % are answered right; one photo may take more work or less.`;
    }
  }

  /** A photo that has no answer yet. */
  photo(info, photo) {
    $("hint").hidden = true;
    $("main").classList.add("is-stale"); // what stands there is of the photo before
    this.#hush();
    $("outcome").setAttribute("aria-label", `${photo.name}, not looked at yet`);
    drawOutcome($("outcome"), photo, info, null);
  }

  answer(info, photo, answer, isLocal) {
    $("hint").hidden = true;
    $("main").classList.remove("is-stale");
    drawOutcome($("outcome"), photo, info, answer.trace);
    $("outcome").setAttribute("aria-label", `${photo.name}: ${describeOutcome(answer.trace)}`);
    this.#answers(answer.top);
    this.#cost(answer, isLocal);
    this.#stages(info, photo, answer);
    const [first] = answer.top;
    const sentence = `${named(first)}, ${percent(first.probability)}, with ${percent(answer.macs_share)} of the full model's work.`;
    this.#say({ label: named(first), sentence }, photo.blob === null);
  }

  /** `isNews` false: a sentence that stands there already is not said again. */
  fail(sentence, { isNews = true } = {}) {
    const { hidden: isHidden, textContent: shown } = $("alert");
    const isThere = !isHidden && shown.trimEnd() === sentence;
    this.#hush();
    $("main").classList.add("is-stale");
    if (isThere && !isNews) return;
    // a screen reader says what changes
    $("alert").textContent = isThere && shown === sentence ? `${sentence}\u00a0` : sentence;
    $("alert").hidden = false;
  }

  /** A field for the key that a server wants. */
  askKey(sentence) {
    $("key-form").hidden = false;
    $("key-wrong").textContent = sentence;
    $("key").focus();
  }

  clearFailure() {
    $("alert").hidden = true;
    $("main").classList.remove("is-stale");
  }

  /** Aloud: of a photo the newest answer when the dial rests, of a webcam another label, seconds apart. */
  #say(next, isLive) {
    this.#next = next;
    if (isLive && (this.#timer || next.label === this.#said)) return;
    this.#hush();
    this.#timer = setTimeout(() => {
      this.#timer = 0;
      this.#said = this.#next.label;
      $("status").textContent = this.#next.sentence;
    }, isLive ? LIVE_DELAY_MS : STATUS_DELAY_MS);
  }

  #hush() {
    clearTimeout(this.#timer);
    this.#timer = 0;
  }

  #answers(top) {
    const rows = top.map((each) => {
      const row = element("li", "");
      const bar = element("span", "bar");
      bar.style.setProperty("--share", each.probability);
      row.append(element("span", "label", named(each)), bar, element("span", "share", percent(each.probability)));
      return row;
    });
    $("answers").replaceChildren(...rows);
  }

  #cost({ macs, macs_share: share, time_ms: time, joules }, isLocal) {
    $("macs").textContent = millions(macs);
    $("macs-note").textContent = `${percent(share)} of the full model`;
    $("time").textContent = milliseconds(time.total);
    $("time-note").textContent = isLocal ? "on this device" : `on the server, ${milliseconds(time.queue)} of it waiting`;
    $("joules").textContent = milli(joules.value, "J");
  }

  #stages(info, photo, { trace, exit_stage: exit }) {
    const box = $("stages");
    if (box.querySelectorAll("figure").length !== info.stages) {
      box.replaceChildren(...Array.from({ length: info.stages }, () => {
        const figure = element("figure", "");
        const canvas = element("canvas", "");
        canvas.setAttribute("role", "img");
        figure.append(canvas, element("figcaption", ""));
        return figure;
      }));
    }
    box.querySelectorAll("figure").forEach((figure, stage) => {
      const [canvas, caption] = figure.children;
      const isRun = stage <= exit;
      figure.classList.toggle("is-skipped", !isRun);
      drawStage(canvas, photo, info, trace, stage);
      const said = isRun ? describeStage(trace, stage) : "not needed: it was sure before";
      canvas.setAttribute("aria-label", `Stage ${stage + 1}: ${said}`);
      const guess = trace.stage_probabilities?.[stage];
      const line = isRun && guess ? `${named(guess)}, ${percent(guess.probability)}` : "";
      caption.replaceChildren(element("strong", "", `Stage ${stage + 1}`), element("span", "", said), element("span", "guess", line));
    });
  }
}

function describeStage({ kept, refined }, stage) {
  const [all, stay, detail] = [kept[stage].length, count(kept[stage]), count(refined[stage])];
  if (stage === 0) return `all ${all} patches, coarse`;
  const how = detail === stay ? "all in detail" : `${detail} in detail`;
  return `${stay} of ${all} patches, ${how}`;
}

function describeOutcome(trace) {
  const { kept, detailed } = outcomeOf(trace);
  const [stay, detail] = [count(kept), count(detailed)];
  return `${detail} patches looked at in detail, ${stay - detail} kept coarse, ${kept.length - stay} dropped`;
}

function element(tag, name, text = "") {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.textContent = text;
  return made;
}

const count = (grid) => grid.reduce((sum, each) => sum + Number(each), 0);
const named = ({ index, label }) => label ?? `class ${index}`;
const millions = (number) => (number >= 1e9 ? `${(number / 1e9).toFixed(2)} G` : `${(number / 1e6).toFixed(1)} M`);
const milliseconds = (ms) => `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
const milli = (value, unit) => (value < 1 ? `${(1000 * value).toPrecision(3)} m${unit}` : `${value.toPrecision(3)} ${unit}`);
