// The server's HTTP API, called as any other client calls it, with the key of whoever looks at the page.

const KEY = "scalellm.key";

/** A refusal of the server. `status` is HTTP's, 0 where the error came inside a stream that had begun. */
export class ApiError extends Error {
  constructor(status, error, retryAfterMs = null) {
    super(error.message || `the server answered ${status}`);
    this.status = status;
    this.param = error.param || null;
    this.code = error.code || null;
    this.type = error.type || null;
    this.retryAfterMs = retryAfterMs;
  }

  get isAboutKey() {
    return this.status === 401 || this.status === 403;
  }

  /** The same request may succeed a moment later, on this server or another one. */
  get isPassing() {
    return [429, 502, 503].includes(this.status) || this.code === "unavailable" || this.code === "aborted";
  }
}

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) || "",
  set(key) {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  },
};

/** Call the server. Throws ApiError for a refusal, TypeError where it cannot be reached. */
export async function request(path, { method = "GET", body, headers = {}, signal } = {}) {
  const all = { ...headers };
  if (apiKey.get()) all.authorization = `Bearer ${apiKey.get()}`;
  if (body !== undefined) all["content-type"] = "application/json";
  const response = await fetch(path, {
    method,
    headers: all,
    body: body === undefined ? undefined : JSON.stringify(body),
    signal,
    cache: "no-store",
  });
  if (response.ok) return response;
  const text = await response.text();
  let error = {};
  try {
    error = JSON.parse(text).error || {};
  } catch {
    error = { message: `${response.status} ${response.statusText}` }; // of a proxy in between
  }
  const wait = response.headers.get("retry-after-ms") || 1000 * Number(response.headers.get("retry-after") || "NaN");
  throw new ApiError(response.status, error, Number.isFinite(Number(wait)) ? Number(wait) : null);
}

export async function json(path, options) {
  return (await request(path, options)).json();
}

/** The events of a stream: {id, data}, as server-sent events have them. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n"); // the server ends lines with \n
      rest = parts.pop();
      for (const part of parts) {
        const event = parse(part);
        if (event !== null) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // also where the caller stops reading in the midst
  }
}

function parse(part) {
  let id = null;
  const data = [];
  for (const line of part.split("\n")) {
    if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
    else if (line.startsWith("id:")) id = line.slice(3).trim();
  }
  return data.length ? { id, data: data.join("\n") } : null;
}

/** A promise that is kept after some time, or broken when `signal` says so. */
export function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, ms);
    if (signal?.aborted) stop();
    else signal?.addEventListener("abort", stop, { once: true });
  });
}
