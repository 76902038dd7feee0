// Drives the page in Chromium and prints, as JSON, what a visitor would see: `node drive.mjs SCENARIO URL [OPTIONS as JSON]`.
// Judging it is left to tests/serve/test_page_driven.py. Chromium: $CHROMIUM or /usr/bin/chromium.

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
      webcam: text("webcam"),
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

/** A photo of the site itself, dropped or pasted. */
async function bring(page, kind) {
  await hush(page);
  await page.evaluate(async (kind) => {
    const blob = await (await fetch("page/photos/chelsea.jpg")).blob();
    const data = new DataTransfer();
    data.items.add(new File([blob], `${kind}.jpg`, { type: blob.type }));
    const options = { bubbles: true, cancelable: true };
    const isDrop = kind === "drop";
    document.body.dispatchEvent(isDrop ? new DragEvent(kind, { ...options, dataTransfer: data }) : new ClipboardEvent(kind, { ...options, clipboardData: data }));
  }, kind);
  await isShown(page, `${kind}.jpg`);
}

/** Until the photo of that name is. */
function isShown(page, name) {
  const isThere = (name) => document.getElementById("outcome").getAttribute("aria-label").startsWith(name);
  return page.waitForFunction(isThere, name, { timeout: PATIENCE_MS });
}

function hush(page) {
  return page.evaluate(() => (document.getElementById("status").textContent = ""));
}

/** The dial to `value` percent by keys alone, and the answer that follows or why there is none. */
async function turnTo(page, value) {
  await page.focus("#budget");
  await hush(page);
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

/** The least contrast of any text that is seen now against what lies behind it, faded as it is, and whose. */
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
    const faded = (colour, back, element) => {
      let opacity = 1;
      for (let at = element; at; at = at.parentElement) opacity *= getComputedStyle(at).opacity;
      return colour.slice(0, 3).map((each, place) => opacity * each + (1 - opacity) * back[place]);
    };
    let least = { ratio: 21, text: "" };
    for (const element of document.querySelectorAll("body *")) {
      const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
      if (!own || !element.checkVisibility() || element.closest("noscript, .unseen, .quiet, option")) continue;
      const style = getComputedStyle(element);
      const back = behind(element);
      const front = faded(channels(element instanceof SVGElement ? style.fill : style.color), back, element);
      const [one, two] = [light(front), light(back)];
      const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
      if (ratio < least.ratio) least = { ratio, text: element.textContent.trim().slice(0, 40) };
    }
    return least;
  });
}

const scenarios = {
  /** A photo, the dial by keys, an early exit; the network taken away, the dial once more, an example. */
  async turn(browser, notes) {
    const context = await browser.newContext({ viewport: { width: 1180, height: 900 } });
    const page = await open(context, notes);
    const empty = await read(page);
    await upload(page, options.photo);
    const turns = [];
    for (const value of [100, 75, 50, 25]) turns.push(await turnTo(page, value));
    await turnTo(page, 50);
    if (options.shot) await page.screenshot({ path: options.shot, fullPage: true });
    await hush(page);
    await page.check("#exit-on");
    await page.focus("#exit");
    await page.keyboard.press("Home");
    await settle(page);
    const early = await read(page);
    const errors = [...notes.errors];
    await context.setOffline(true);
    const offline = await turnTo(page, 45);
    await hush(page);
    await page.click("#examples button:nth-child(2)");
    await isShown(page, "Rocket");
    await settle(page);
    const example = await read(page);
    notes.errors = errors; // a browser reports what it could not fetch
    return { empty, turns, early, offline, example };
  },

  /** A photo dropped, another pasted, and a text dropped. */
  async ways(browser, notes) {
    const page = await open(await browser.newContext(), notes);
    const found = {};
    for (const kind of ["drop", "paste"]) {
      await bring(page, kind);
      await settle(page);
      found[kind] = await read(page);
    }
    await page.evaluate(() => document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: new DataTransfer(), bubbles: true, cancelable: true })));
    return { ...found, text: await read(page) };
  },

  /** A server that wants the key "right": a wrong one first. */
  async key(browser, notes) {
    const context = await browser.newContext();
    const heard = [];
    await context.route("**/v1/*", (route) => {
      const key = route.request().headers()["x-api-key"] ?? null;
      heard.push([new URL(route.request().url()).pathname, key]);
      return key === "right" ? route.continue() : route.fulfill({ status: 401, json: { error: "the key is wrong." } });
    });
    const page = await open(context, notes);
    const enter = async (key) => {
      await page.fill("#key", key);
      await page.press("#key", "Enter");
    };
    await enter("wrong");
    await page.waitForFunction(() => document.getElementById("key-wrong").textContent !== "", null, { timeout: PATIENCE_MS });
    const wrong = { form: await page.isVisible("#key-form"), said: await page.textContent("#key-wrong") };
    await enter("right");
    await page.waitForSelector("#budget:enabled", { timeout: PATIENCE_MS });
    const focus = await page.evaluate(() => document.activeElement.id);
    await upload(page, options.photo);
    await settle(page);
    return { wrong, focus, heard, form: await page.isVisible("#key-form"), right: await read(page) };
  },

  /** Phone width, and both colour schemes. */
  async phone(browser, notes) {
    const found = {};
    for (const colorScheme of ["light", "dark"]) {
      const settings = { viewport: { width: 360, height: 780 }, colorScheme, hasTouch: true, isMobile: true, deviceScaleFactor: 2 };
      const context = await browser.newContext(settings);
      const page = await open(context, notes);
      const contrasts = { empty: await leastContrast(page) };
      await upload(page, options.photo);
      await settle(page);
      contrasts.answered = await leastContrast(page);
      const paper = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
      const width = await page.evaluate(() => document.documentElement.scrollWidth);
      if (options.shot) await page.screenshot({ path: `${options.shot}-${colorScheme}.png`, fullPage: true });
      const seen = await read(page);
      await page.setInputFiles("#file", { name: "notes.png", mimeType: "image/png", buffer: Buffer.from("no image") });
      await page.waitForSelector("#alert:not([hidden])", { timeout: PATIENCE_MS });
      await page.evaluate(() => {
        document.getElementById("key-form").hidden = false;
        document.getElementById("key-wrong").textContent = "the key is wrong.";
      });
      contrasts.failed = await leastContrast(page);
      found[colorScheme] = { ...seen, paper, width, contrasts };
      await context.close();
    }
    return found;
  },

  /**
   * The browser's own pretended camera: on, two answers, off; a photo dropped while the browser asks; a visitor who refuses; none.
   * `live`: cameras that run.
   */
  async webcam(browser, notes) {
    const context = await browser.newContext({ permissions: ["camera"] });
    await context.addInitScript(() => {
      const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
      window.cameras = [];
      navigator.mediaDevices.getUserMedia = async (wanted) => {
        const stream = await ask(wanted);
        window.cameras.push(...stream.getTracks());
        if (window.isSlow) await new Promise((grant) => (window.grant = grant));
        return stream;
      };
    });
    const page = await open(context, notes);
    const live = () => page.evaluate(() => window.cameras.filter((track) => track.readyState === "live").length);
    await page.click("#webcam");
    await page.waitForSelector("#answers .bar, #alert:not([hidden])", { timeout: PATIENCE_MS });
    const on = { ...(await read(page)), live: await live() };
    await page.waitForFunction((old) => document.getElementById("time").textContent !== old, on.time, { timeout: PATIENCE_MS });
    await page.click("#webcam");
    const off = { ...(await read(page)), live: await live() };
    await page.evaluate(() => (window.isSlow = true));
    await page.click("#webcam");
    await page.waitForFunction(() => window.grant, null, { timeout: PATIENCE_MS });
    await bring(page, "drop");
    await page.evaluate(() => window.grant());
    await settle(page);
    const dropped = { ...(await read(page)), live: await live() };
    const refuse = async (name) => {
      await page.evaluate((name) => {
        navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException("no", name));
      }, name);
      await page.click("#webcam");
      const isSaid = (start) => document.getElementById("alert").textContent.startsWith(start);
      await page.waitForFunction(isSaid, name === "NotAllowedError" ? "The webcam" : "No webcam", { timeout: PATIENCE_MS });
      return read(page);
    };
    return { on, off, dropped, refused: await refuse("NotAllowedError"), none: await refuse("NotFoundError") };
  },

  /** A file that is no image; and, with `answers`, what a server says in place of its own: { path: [status, body] }, then its own. */
  async failures(browser, notes) {
    const context = await browser.newContext();
    for (const [path, [status, body]] of Object.entries(options.answers ?? {})) {
      await context.route(`**/${path}*`, (route) => route.fulfill({ status, json: body }));
    }
    const page = await open(context, notes);
    const opened = { ...(await read(page)), key: await page.isVisible("#key-form"), disabled: await page.isDisabled("#budget") };
    await page.setInputFiles("#file", options.file);
    if (!opened.key) await settle(page);
    const found = { opened, given: await read(page), expected: await page.textContent("#expected") };
    if (!options.then) return found;
    await context.unrouteAll();
    await hush(page);
    await page.focus("#budget");
    await page.keyboard.press("ArrowLeft");
    await page.waitForSelector("#alert", { state: "hidden", timeout: PATIENCE_MS });
    await settle(page);
    return { ...found, after: await read(page) };
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
