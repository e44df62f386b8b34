// The page: a form, what is under way, and what is there.

import { ask, events, json, Offline, ServerError, takeKey } from "./api.js";
import { element, Form } from "./form.js";
import { Gallery } from "./gallery.js";

const OWN = "mflux-jobs";
const RETRY = 2000;

const form = new Form();
const gallery = new Gallery();
/** Cards of jobs that are under way, by their ids. @type {Map<string, Card>} */
const cards = new Map();
let isOffline = false;
/** Settings of a dropped image. @type {Record<string, any> | null} */
let offered = null;

/** @param {string} text */
function say(text) {
  element("said").textContent = text;
}

/** @param {unknown} error */
function complain(error) {
  if (error instanceof Offline) {
    wentOffline();
    return;
  }
  if (error instanceof ServerError && error.status === 401) {
    element("key-box").hidden = false;
    element("key").focus();
  }
  form.mark(error instanceof ServerError ? error.param : null);
  element("alert").textContent = error instanceof Error ? error.message : String(error);
}

function allIsWell() {
  element("alert").textContent = "";
  form.mark(null);
}

// ---- the server is away, and comes back

function wentOffline() {
  if (isOffline) return;
  isOffline = true;
  element("offline").hidden = false;
  setTimeout(tryAgain, RETRY);
}

async function tryAgain() {
  try {
    await ask("/health");
  } catch {
    setTimeout(tryAgain, RETRY);
    return;
  }
  isOffline = false;
  element("offline").hidden = true;
  say("The server answers again.");
  await connect();
}

/** Ask what there is, follow what is under way, and take in what was finished meanwhile. */
async function connect() {
  try {
    await form.load();
    const jobs = (await json("/v1/jobs")).data.reverse();
    const mine = own();
    for (const job of jobs) {
      if (!isOver(job)) follow(job);
      else if (mine.has(job.id)) await finish(job);
    }
    // What the server has forgotten is over as well.
    const known = new Set(jobs.map((/** @type {any} */ job) => job.id));
    for (const [id, card] of cards) if (!known.has(id)) card.remove();
    keepOwn(new Set([...mine].filter((id) => known.has(id))));
    element("key-box").hidden = true;
  } catch (error) {
    complain(error);
  }
}

// ---- jobs

/** @returns {Set<string>} */
function own() {
  try {
    return new Set(JSON.parse(localStorage.getItem(OWN) ?? "[]"));
  } catch {
    return new Set();
  }
}

/** @param {Set<string>} ids */
function keepOwn(ids) {
  localStorage.setItem(OWN, JSON.stringify([...ids].slice(-200)));
}

/** @param {any} job */
const isOver = (job) => ["done", "failed", "cancelled"].includes(job.status);

/** @param {number | null} seconds */
function about(seconds) {
  if (seconds === null) return "";
  if (seconds < 90) return `, about ${Math.max(1, Math.round(seconds))} s`;
  return `, about ${Math.round(seconds / 60)} min`;
}

/** @param {any} job */
function inWords(job) {
  if (job.status === "queued") return job.position > 1 ? `waiting, ${job.position} before it` : "waiting, next";
  if (job.status === "loading") return "loading the model";
  if (job.status === "drawing") return `step ${job.step} of ${job.steps}${about(job.eta_seconds)}`;
  return job.status;
}

class Card {
  /** @param {any} job */
  constructor(job) {
    this.id = job.id;
    this.item = document.createElement("li");
    this.item.className = "card job";
    const frame = document.createElement("div");
    frame.className = "frame";
    this.image = document.createElement("img");
    this.image.alt = "Preview";
    this.image.hidden = true;
    frame.append(this.image);
    const prompt = document.createElement("p");
    prompt.className = "prompt";
    prompt.textContent = job.prompt;
    this.bar = document.createElement("div");
    this.bar.className = "bar";
    this.bar.append(document.createElement("div"));
    for (const [name, value] of [["role", "progressbar"], ["aria-label", "Progress"], ["aria-valuemin", "0"],
      ["aria-valuemax", "100"]]) this.bar.setAttribute(name, value);
    this.words = document.createElement("p");
    this.words.setAttribute("role", "status");
    const cancel = document.createElement("button");
    cancel.type = "button";
    cancel.textContent = "Cancel";
    cancel.addEventListener("click", () => this.cancel());
    this.item.append(frame, prompt, this.bar, this.words, cancel);
    element("jobs").append(this.item);
    this.show(job);
  }

  /** @param {any} job */
  show(job) {
    this.job = job;
    const percent = Math.round(job.progress * 100);
    const words = inWords(job);
    this.bar.setAttribute("aria-valuenow", String(percent));
    this.bar.setAttribute("aria-valuetext", words);
    /** @type {HTMLElement} */ (this.bar.firstChild).style.width = `${percent}%`;
    this.words.textContent = words;
  }

  /** @param {any} preview */
  preview(preview) {
    this.image.src = `data:image/${preview.output_format};base64,${preview.b64_json}`;
    this.image.hidden = false;
  }

  async cancel() {
    try {
      await ask(`/v1/jobs/${this.id}`, { method: "DELETE" });
    } catch (error) {
      if (!(error instanceof ServerError && error.status === 404)) complain(error);
    }
  }

  remove() {
    const hadFocus = this.item.contains(document.activeElement);
    this.item.remove();
    cards.delete(this.id);
    if (hadFocus) element("generate").focus();
  }
}

/** @param {any} job */
async function follow(job) {
  if (cards.has(job.id)) return;
  const card = new Card(job);
  cards.set(job.id, card);
  try {
    for await (const { name, data } of events(`/v1/jobs/${job.id}/events`)) {
      if (name === "preview") card.preview(data);
      else card.show(data);
      if (name === "end") {
        await finish(data);
        card.remove();
        return;
      }
    }
    throw new Offline();
  } catch (error) {
    card.remove();
    complain(error);
  }
}

/** A time after that of all images here. */
function newest() {
  return Math.max(Date.now(), (gallery.list()[0]?.created ?? 0) + 1);
}

/** Take in what a job has made. @param {any} job */
async function finish(job) {
  const ids = own();
  if (job.status === "failed") {
    element("alert").textContent = job.error.message;
  } else if (job.status === "cancelled") {
    say("Cancelled.");
  }
  for (const [number, image] of job.images.entries()) {
    const id = `${job.id}/${number}`;
    if (gallery.pictures.has(id)) continue;
    const answer = await ask(image.url);
    const [width, height] = image.size.split("x").map(Number);
    await gallery.add({
      id,
      created: newest(),
      prompt: job.prompt,
      model: job.model,
      size: image.size,
      seed: image.seed,
      settings: { ...job.settings, prompt: job.prompt, model: job.model, width, height, seed: image.seed },
      type: answer.headers.get("content-type") ?? "image/png",
      format: image.output_format,
      bytes: await answer.arrayBuffer(),
    });
  }
  if (job.status === "done") say(job.images.length === 1 ? "The image is ready." : `${job.images.length} images are ready.`);
  // Deleted ones are not to come back.
  ids.delete(job.id);
  keepOwn(ids);
  showGallery();
}

// ---- the gallery

/** Object URLs by the ids of images. @type {Map<string, string>} */
const urls = new Map();

function showGallery() {
  const list = gallery.list();
  const items = new Map([...element("gallery").children].map((item) => [/** @type {HTMLElement} */ (item).dataset.id, item]));
  element("empty").hidden = list.length > 0;
  element("gallery").replaceChildren(...list.map((picture) => items.get(picture.id) ?? galleryItem(picture)));
  for (const [id, url] of urls) {
    if (!gallery.pictures.has(id)) {
      URL.revokeObjectURL(url);
      urls.delete(id);
    }
  }
}

/** @param {import("./gallery.js").Picture} picture */
function galleryItem(picture) {
  const item = document.createElement("li");
  item.className = "card";
  item.dataset.id = picture.id;
  const url = URL.createObjectURL(new Blob([picture.bytes], { type: picture.type }));
  urls.set(picture.id, url);
  const image = document.createElement("img");
  image.src = url;
  image.alt = picture.prompt;
  image.loading = "lazy";
  [image.width, image.height] = picture.size.split("x").map(Number);
  const prompt = document.createElement("p");
  prompt.className = "prompt";
  prompt.textContent = picture.prompt;
  const facts = document.createElement("p");
  facts.className = "help";
  facts.textContent = `${picture.model}, ${picture.size.replace("x", " × ")}, seed ${picture.seed}`;
  const row = document.createElement("div");
  row.className = "row";
  const name = `mflux-${picture.seed}.${picture.format}`;
  for (const [text, action] of /** @type {[string, () => void][]} */ ([
    ["Use settings", () => {
      form.use(picture.settings);
      say("The settings are in the form.");
    }],
    ["Use as source", () => useAsSource(picture.bytes, picture.type, name, false)],
    ["Download", () => {
      const link = document.createElement("a");
      link.href = url;
      link.download = name;
      link.click();
    }],
    ["Delete", async () => {
      await gallery.remove(picture.id);
      showGallery();
      say("Deleted.");
      element("gallery-title").scrollIntoView({ block: "nearest" });
      element("prompt").focus();
    }],
  ])) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", action);
    row.append(button);
  }
  item.append(image, prompt, facts, row);
  return item;
}

// ---- source pictures

/** @param {ArrayBuffer} bytes @param {string} type @param {string} name @param {boolean} ask_settings */
async function useAsSource(bytes, type, name, ask_settings) {
  allIsWell();
  const taken = form.addSource(bytes, type, name);
  say(taken ? `${name} is the source picture.` : `${form.model.id} takes no source picture.`);
  element("take-settings").hidden = true;
  if (!ask_settings) return;
  try {
    const answer = await ask("/v1/settings", { method: "POST", headers: { "content-type": type }, body: bytes });
    offered = (await answer.json()).settings;
    element("take-settings").hidden = false;
    say(`${name} was made with mflux, and carries its settings.`);
  } catch (error) {
    // Most images carry none; one that is none at all is told when it is sent.
    if (!(error instanceof ServerError)) complain(error);
  }
}

/** @param {Iterable<File> | null | undefined} files */
async function takeFiles(files) {
  for (const file of files ?? []) {
    if (file.type.startsWith("image/")) await useAsSource(await file.arrayBuffer(), file.type, file.name, true);
  }
}

// ---- what is done on the page

async function generate() {
  allIsWell();
  const typed = form.typed();
  await started;
  if (!element("key-box").hidden) await takeTyped();
  if (!form.model) return;
  try {
    const job = await json("/v1/jobs", await form.request(typed));
    keepOwn(own().add(job.id));
    say(job.position > 0 ? `In the queue, ${job.position} before it.` : "It begins.");
    follow(job);
    // On a phone it is below the form.
    cards.get(job.id)?.item.scrollIntoView({ block: "nearest" });
  } catch (error) {
    complain(error);
  }
}

async function takeTyped() {
  const key = /** @type {HTMLInputElement} */ (element("key"));
  if (!key.value) return;
  takeKey(key.value);
  key.value = "";
  allIsWell();
  await connect();
}

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
element("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  } else if (event.key === "Escape") {
    const running = [...cards.values()].find((card) => card.job.status !== "queued") ?? [...cards.values()][0];
    running?.cancel();
  } else if (event.key === "Enter" && event.target === element("key")) {
    event.preventDefault();
    takeTyped();
  }
});
element("source").addEventListener("change", (event) => takeFiles(/** @type {HTMLInputElement} */ (event.target).files));
element("take-settings").addEventListener("click", () => {
  if (offered) form.use(offered);
  element("take-settings").hidden = true;
  say("The settings are in the form.");
});
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length) {
    event.preventDefault();
    takeFiles(files);
  }
});
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    element("form").classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) element("form").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  element("form").classList.remove("over");
  takeFiles(event.dataTransfer?.files);
});

async function start() {
  await gallery.load();
  showGallery();
  await connect();
}

const started = start();
