// The server's answers, and its errors in its own words.

const KEY = "mflux-key";

/** An error that the server answered with. */
export class ServerError extends Error {
  /** @param {number} status @param {{message?: string, param?: string | null}} error */
  constructor(status, error) {
    super(error.message || `the server answered ${status}`);
    this.status = status;
    this.param = error.param ?? null;
  }
}

/** The server does not answer. */
export class Offline extends Error {}

/** @param {string} key */
export function takeKey(key) {
  sessionStorage.setItem(KEY, key);
}

/**
 * @param {string} path
 * @param {RequestInit} [options]
 * @returns {Promise<Response>}
 */
export async function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("authorization", `Bearer ${key}`);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new Offline();
  }
  if (answer.ok) return answer;
  let error = {};
  try {
    error = (await answer.json()).error ?? {};
  } catch {
    // What stands between may answer in its own way.
  }
  throw new ServerError(answer.status, error);
}

/** @param {string} path @param {unknown} [body] */
export async function json(path, body) {
  const options = body === undefined ? {} : {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  };
  return (await ask(path, options)).json();
}

/**
 * A stream of server-sent events. Not EventSource, which sends no key.
 * @param {string} path
 * @returns {AsyncGenerator<{name: string, data: any}>}
 */
export async function* events(path) {
  const answer = await ask(path);
  const reader = /** @type {ReadableStream} */ (answer.body).pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      let end;
      while ((end = text.indexOf("\n\n")) >= 0) {
        const lines = text.slice(0, end).split("\n");
        text = text.slice(end + 2);
        const name = lines.find((line) => line.startsWith("event: "))?.slice(7);
        const data = lines.find((line) => line.startsWith("data: "))?.slice(6);
        if (name && data) yield { name, data: JSON.parse(data) };
      }
    }
  } catch (error) {
    if (error instanceof ServerError) throw error;
    throw new Offline();
  }
}
