// Drives the page in Chromium and prints, as JSON, what a visitor would see: `node drive.mjs SCENARIO URL [OPTIONS as JSON]`.
// Judging it is left to tests/serve/test_page.py. Chromium: $CHROMIUM or /usr/bin/chromium.

import { chromium } from "playwright-core";

const PATIENCE_MS = 120_000; // a loaded machine compiles WebAssembly for a while
const [scenario, url, json = "{}"] = process.argv.slice(2);
const options = JSON.parse(json);

/** What the page says now. */
function read(page) {
  return page.evaluate(() => {
    const text = (id) => document.getElementById(id).textContent;
    const canvas = document.getElementById("outcome");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let amber = 0;
    for (let at = 0; at < data.length; at += 4) if (data[at] > 240 && Math.abs(data[at + 1] - 176) < 12 && data[at + 2] < 30) amber++;
    return {
      budget: document.getElementById("budget").value,
      shown: text("budget-out"),
      macs: text("macs"),
      macsNote: text("macs-note"),
      time: text("time"),
      joules: text("joules"),
      joulesNote: text("joules-note"),
      answers: [...document.querySelectorAll("#answers li")].map((row) => row.innerText.split("\n").filter(Boolean).join(" ")),
      stages: [...document.querySelectorAll("#stages figcaption")].map((caption) => caption.innerText),
      outcome: canvas.getAttribute("aria-label"),
      amber: amber / (canvas.width * canvas.height),
      here: Number(document.getElementById("here")?.getAttribute("cx") ?? 0),
      alert: document.getElementById("alert").hidden ? null : text("alert"),
      status: text("status"),
    };
  });
}

async function open(context, notes) {
  const page = await context.newPage();
  page.on("console", (message) => {
    if (message.type() === "error") notes.errors.push(message.text());
  });
  page.on("pageerror", (error) => notes.errors.push(error.message));
  page.on("request", (request) => notes.origins.add(new URL(request.url()).origin));
  await page.goto(url);
  await page.waitForSelector("#main[aria-busy=false]", { timeout: PATIENCE_MS });
  return page;
}

async function upload(page, file) {
  await page.setInputFiles("#file", file);
  await page.waitForSelector("#answers .bar, #alert:not([hidden])", { timeout: PATIENCE_MS });
}

/** The dial to `value` percent by keys alone, and the answer that follows or why there is none. */
async function turnTo(page, value) {
  await page.focus("#budget");
  await page.evaluate(() => (document.getElementById("status").textContent = ""));
  const start = Number(await page.inputValue("#budget"));
  const key = value > start ? "ArrowRight" : "ArrowLeft";
  for (let left = Math.abs(value - start); left; left--) await page.keyboard.press(key);
  await settle(page);
  return read(page);
}

/** Until the answer shown is that of the settings, and said aloud; or something failed. */
async function settle(page) {
  const isThere = () => {
    const dial = document.getElementById("budget");
    const exit = document.getElementById("exit-on").checked ? document.getElementById("exit").value / 100 : null;
    const wanted = JSON.stringify({ budget: dial.disabled ? null : dial.value / 100, exitConfidence: exit });
    const isSaid = document.getElementById("status").textContent !== "";
    return (isSaid && document.getElementById("main").dataset.answered === wanted) || !document.getElementById("alert").hidden;
  };
  await page.waitForFunction(isThere, null, { timeout: PATIENCE_MS });
}

/** The least contrast of any text against what lies behind it, and whose. */
function leastContrast(page) {
  return page.evaluate(() => {
    const channels = (colour) => colour.match(/[\d.]+/g).map(Number);
    const light = (rgb) => {
      const [r, g, b] = rgb.slice(0, 3).map((each) => (each <= 10.31475 ? each / 3294.6 : ((each / 255 + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (element) => {
      for (let at = element; at; at = at.parentElement) {
        const found = channels(getComputedStyle(at).backgroundColor);
        if (found.length === 3 || found[3] === 1) return found;
      }
      return [255, 255, 255];
    };
    let least = { ratio: 21, text: "" };
    for (const element of document.querySelectorAll("body *")) {
      const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
      if (!own || !element.checkVisibility() || element.closest("noscript, .unseen, .quiet, #drop, option")) continue;
      const style = getComputedStyle(element);
      const [one, two] = [light(channels(element instanceof SVGElement ? style.fill : style.color)), light(behind(element))];
      const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
      if (ratio < least.ratio) least = { ratio, text: element.textContent.trim().slice(0, 40) };
    }
    return least;
  });
}

const scenarios = {
  /** A photo, the dial by keys, the example photos; nothing but its own site is asked. */
  async turn(browser, notes) {
    const context = await browser.newContext({ viewport: { width: 1180, height: 900 } });
    const page = await open(context, notes);
    const empty = await read(page);
    await upload(page, options.photo);
    const turns = [];
    for (const value of [100, 75, 50, 25]) turns.push(await turnTo(page, value));
    await turnTo(page, 50);
    if (options.shot) await page.screenshot({ path: options.shot, fullPage: true });
    await page.evaluate(() => (document.getElementById("status").textContent = ""));
    await page.check("#exit-on");
    await page.focus("#exit");
    await page.keyboard.press("Home");
    await settle(page);
    const early = await read(page);
    const errors = [...notes.errors];
    await context.setOffline(true);
    const offline = await turnTo(page, 45);
    notes.errors = errors; // a browser reports what it could not fetch
    return { empty, turns, early, offline };
  },

  /** Phone width, and both colour schemes. */
  async phone(browser, notes) {
    const found = {};
    for (const colorScheme of ["light", "dark"]) {
      const settings = { viewport: { width: 360, height: 780 }, colorScheme, hasTouch: true, isMobile: true, deviceScaleFactor: 2 };
      const context = await browser.newContext(settings);
      const page = await open(context, notes);
      await upload(page, options.photo);
      await settle(page);
      const paper = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
      const width = await page.evaluate(() => document.documentElement.scrollWidth);
      found[colorScheme] = { ...(await read(page)), paper, width, contrast: await leastContrast(page) };
      if (options.shot) await page.screenshot({ path: `${options.shot}-${colorScheme}.png`, fullPage: true });
      await context.close();
    }
    return found;
  },

  /** The browser's own pretended camera: on, two answers, off; and a visitor who refuses. */
  async webcam(browser, notes) {
    const context = await browser.newContext({ permissions: ["camera"] });
    const page = await open(context, notes);
    await page.click("#webcam");
    await page.waitForSelector("#answers .bar, #alert:not([hidden])", { timeout: PATIENCE_MS });
    const on = { ...(await read(page)), pressed: await page.getAttribute("#webcam", "aria-pressed") };
    const first = on.time;
    await page.waitForFunction((old) => document.getElementById("time").textContent !== old, first, { timeout: PATIENCE_MS });
    await page.click("#webcam");
    await page.waitForTimeout(500);
    const off = { ...(await read(page)), pressed: await page.getAttribute("#webcam", "aria-pressed") };
    await page.evaluate(() => {
      navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException("no", "NotFoundError"));
    });
    await page.click("#webcam");
    await page.waitForSelector("#alert:not([hidden])");
    return { on, off, none: await read(page) };
  },

  /** A file that is no image; and, with `answers`, what a server says in place of its own: { path: [status, body] }. */
  async failures(browser, notes) {
    const context = await browser.newContext();
    for (const [path, [status, body]] of Object.entries(options.answers ?? {})) {
      await context.route(`**/${path}*`, (route) => route.fulfill({ status, json: body }));
    }
    const page = await open(context, notes);
    const opened = { ...(await read(page)), key: await page.isVisible("#key-form"), disabled: await page.isDisabled("#budget") };
    await page.setInputFiles("#file", options.file);
    if (!opened.key) await settle(page);
    return { opened, given: await read(page), expected: await page.textContent("#expected") };
  },
};

const flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"];
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: flags });
const notes = { errors: [], origins: new Set() };
try {
  const found = await scenarios[scenario](browser, notes);
  process.stdout.write(JSON.stringify({ ...found, errors: notes.errors, origins: [...notes.origins], browser: browser.version() }));
} finally {
  await browser.close();
}
