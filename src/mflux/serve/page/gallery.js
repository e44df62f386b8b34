// Images that were generated, kept in this browser: they survive a reload, and the server writes nothing.

/**
 * @typedef {{id: string, created: number, prompt: string, model: string, size: string, seed: number,
 *   settings: Record<string, any>, type: string, format: string, bytes: ArrayBuffer}} Picture
 */

const MOST = 200;
const MOST_BYTES = 500e6;
const STORE = "pictures";

/** @returns {Promise<IDBDatabase>} */
function open() {
  return new Promise((resolve, reject) => {
    const asked = indexedDB.open("mflux", 1);
    asked.onupgradeneeded = () => asked.result.createObjectStore(STORE, { keyPath: "id" });
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
}

/** @template T @param {IDBRequest<T>} request @returns {Promise<T>} */
function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

export class Gallery {
  constructor() {
    /** @type {Map<string, Picture>} */
    this.pictures = new Map();
    /** @type {IDBDatabase | null} */
    this.base = null;
  }

  /** Read what is kept. A browser that keeps nothing shows what comes. */
  async load() {
    try {
      this.base = await open();
      const kept = await done(this.base.transaction(STORE).objectStore(STORE).getAll());
      for (const picture of kept) this.pictures.set(picture.id, picture);
    } catch {
      this.base = null;
    }
  }

  /** Newest first. */
  list() {
    return [...this.pictures.values()].sort((one, other) => other.created - one.created);
  }

  /** @param {Picture} picture */
  async add(picture) {
    this.pictures.set(picture.id, picture);
    await this.#write((store) => store.put(picture));
    let bytes = 0;
    for (const [number, kept] of this.list().entries()) {
      bytes += kept.bytes.byteLength;
      if (number >= MOST || (bytes > MOST_BYTES && number > 0)) await this.remove(kept.id);
    }
  }

  /** @param {string} id */
  async remove(id) {
    this.pictures.delete(id);
    await this.#write((store) => store.delete(id));
  }

  /** @param {(store: IDBObjectStore) => IDBRequest} change */
  async #write(change) {
    if (!this.base) return;
    try {
      await done(change(this.base.transaction(STORE, "readwrite").objectStore(STORE)));
    } catch {
      // No room: the image is shown all the same.
    }
  }
}
