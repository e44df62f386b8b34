// The form: what is asked for, and what a model lets be asked.

import { json } from "./api.js";

/** @template {HTMLElement} T @param {string} id @returns {T} */
export const element = (id) => /** @type {T} */ (document.getElementById(id));

/** @param {string} id @returns {HTMLInputElement} */
const input = (id) => element(id);

/** @param {string} id */
function number(id) {
  const text = input(id).value.trim();
  return text === "" ? undefined : Number(text);
}

/** @param {ArrayBuffer} bytes @param {string} type @returns {Promise<string>} */
function dataUrl(bytes, type) {
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(/** @type {string} */ (reader.result));
    reader.readAsDataURL(new Blob([bytes], { type: type || "image/png" }));
  });
}

export class Form {
  constructor() {
    /** @type {any[]} */
    this.models = [];
    /** @type {string[]} */
    this.loraNames = [];
    /** @type {{bytes: ArrayBuffer, type: string, name: string, url: string}[]} */
    this.sources = [];
    element("model").addEventListener("change", () => this.#modelChanged("all"));
    element("add-lora").addEventListener("click", () => this.#addLora());
  }

  get model() {
    const id = input("model").value;
    return this.#known(id);
  }

  /** @param {string} id of a model, or what is no model's: the default one */
  #known(id) {
    const find = (/** @type {(model: any) => boolean} */ is) => this.models.find(is);
    return find((model) => model.id === id) ?? find((model) => model.mflux.default) ?? this.models[0];
  }

  /** Ask what can be asked. What was typed stays. */
  async load() {
    const chosen = input("model").value;
    this.models = (await json("/v1/models")).data;
    this.loraNames = (await json("/v1/loras")).data.map((/** @type {any} */ one) => one.id);
    const options = this.models.map((model) => new Option(model.id, model.id));
    element("model").replaceChildren(...options);
    const { id } = this.#known(chosen);
    const known = id === chosen;
    input("model").value = id;
    // Somebody may have been quicker.
    this.#modelChanged(known ? "none" : "empty");
  }

  /** @param {"all" | "empty" | "none"} which of the fields get the model's own values */
  #modelChanged(which) {
    const { mflux } = this.model;
    const [width, height] = mflux.size.split("x");
    const own = { width, height, steps: mflux.steps, guidance: mflux.guidance ?? "" };
    for (const [id, value] of Object.entries(own)) {
      const field = input(id);
      const fill = () => {
        if (which === "all" || (which === "empty" && field.value === "")) field.value = value;
      };
      // Where somebody is about to type, the value would stand before what is typed.
      if (which === "empty" && field === document.activeElement) field.addEventListener("blur", fill, { once: true });
      else fill();
    }
    element("guidance-box").hidden = mflux.guidance === null;
    element("negative-box").hidden = !mflux.negative_prompt;
    element("loras-box").hidden = !mflux.lora || this.loraNames.length === 0;
    element("source-box").hidden = mflux.images[1] === 0;
    this.#sourcesChanged();
  }

  /** @param {{name: string, scale: number}} [lora] */
  #addLora(lora) {
    const item = document.createElement("li");
    item.className = "lora";
    const number = element("loras").children.length + 1;
    const name = document.createElement("select");
    name.setAttribute("aria-label", `LoRA ${number}`);
    name.append(...this.loraNames.map((one) => new Option(one, one)));
    const scale = document.createElement("input");
    Object.assign(scale, { type: "number", step: "0.05", value: String(lora?.scale ?? 1) });
    scale.setAttribute("aria-label", `Scale of LoRA ${number}`);
    if (lora) name.value = lora.name;
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "Remove";
    remove.setAttribute("aria-label", `Remove LoRA ${number}`);
    remove.addEventListener("click", () => {
      item.remove();
      element("add-lora").focus();
    });
    item.append(name, scale, remove);
    element("loras").append(item);
  }

  #loras() {
    return [...element("loras").children].map((item) => {
      const [name, scale] = /** @type {[HTMLSelectElement, HTMLInputElement]} */ ([...item.children]);
      return { name: name.value, scale: scale.value === "" ? 1 : Number(scale.value) };
    });
  }

  /** @param {ArrayBuffer} bytes @param {string} type @param {string} name */
  addSource(bytes, type, name) {
    const most = this.model.mflux.images[1];
    if (most === 0) return false;
    if (this.sources.length >= most) this.#removeSource(this.sources[0]);
    this.sources.push({ bytes, type, name, url: URL.createObjectURL(new Blob([bytes], { type })) });
    this.#sourcesChanged();
    return true;
  }

  /** @param {{url: string}} source */
  #removeSource(source) {
    URL.revokeObjectURL(source.url);
    this.sources = this.sources.filter((one) => one !== source);
    this.#sourcesChanged();
  }

  #sourcesChanged() {
    const items = this.sources.map((source) => {
      const item = document.createElement("li");
      const image = document.createElement("img");
      image.src = source.url;
      image.alt = `Source picture ${source.name}`;
      const remove = document.createElement("button");
      remove.type = "button";
      remove.textContent = "Remove";
      remove.setAttribute("aria-label", `Remove source picture ${source.name}`);
      remove.addEventListener("click", () => {
        this.#removeSource(source);
        element("source").focus();
      });
      item.append(image, remove);
      return item;
    });
    element("sources").replaceChildren(...items);
    element("strength-box").hidden = !this.model?.mflux.strength || this.sources.length === 0;
    input("source").value = "";
  }

  /** What the fields say now: the models may not be known yet, and somebody may go on typing. */
  typed() {
    return {
      prompt: input("prompt").value,
      model: input("model").value,
      width: number("width"),
      height: number("height"),
      steps: number("steps"),
      guidance: number("guidance"),
      negative_prompt: input("negative").value,
      seed: number("seed"),
      n: number("count"),
      loras: this.#loras(),
      sources: this.sources,
      image_strength: number("strength"),
    };
  }

  /**
   * What is asked for, as /v1/jobs takes it, of what the model takes.
   * @param {ReturnType<Form["typed"]>} typed
   */
  async request({ sources, ...typed }) {
    const { id, mflux } = this.#known(typed.model);
    const images = sources.slice(0, mflux.images[1]);
    return {
      ...typed,
      model: id,
      guidance: mflux.guidance === null ? undefined : typed.guidance,
      negative_prompt: (mflux.negative_prompt && typed.negative_prompt) || undefined,
      loras: mflux.lora && typed.loras.length ? typed.loras : undefined,
      images: images.length ? await Promise.all(images.map(({ bytes, type }) => dataUrl(bytes, type))) : undefined,
      image_strength: images.length && mflux.strength ? typed.image_strength : undefined,
      previews: "auto",
    };
  }

  /**
   * Put the settings of an image into the form.
   * @param {Record<string, any>} settings as an image records them, or as a job shows them
   */
  use(settings) {
    const model = this.models.find((one) => one.id === settings.model);
    if (model) input("model").value = model.id;
    this.#modelChanged("all");
    for (const [id, name] of [
      ["prompt", "prompt"], ["negative", "negative_prompt"], ["width", "width"], ["height", "height"],
      ["steps", "steps"], ["guidance", "guidance"], ["seed", "seed"], ["strength", "image_strength"],
    ]) {
      if (settings[name] !== undefined && settings[name] !== null) input(id).value = String(settings[name]);
    }
    input("negative").value = settings.negative_prompt ?? "";
    input("count").value = "1";
    element("loras").replaceChildren();
    for (const [place, name] of (settings.lora_paths ?? []).entries()) {
      if (this.loraNames.includes(name)) this.#addLora({ name, scale: settings.lora_scales?.[place] ?? 1 });
    }
    element("prompt").focus();
  }

  /** Mark the field that the server complains of. @param {string | null} param */
  mark(param) {
    const ids = { negative_prompt: "negative", n: "count", image_strength: "strength", size: "width", image: "source" };
    const wrong = param && document.getElementById(/** @type {any} */ (ids)[param] ?? param);
    for (const field of element("form").querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
    if (wrong) wrong.setAttribute("aria-invalid", "true");
  }
}
