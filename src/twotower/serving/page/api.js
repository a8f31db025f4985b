// Calls the HTTP API. Returns the JSON of the response, or throws an ApiError with a message for the user. Addresses are relative,
// so that the page also works behind a path prefix.

const PATIENCE_MS = 15_000;
const LOADING_MS = 120_000; // for a bundle
const QUERY = 4000; // characters of ids in one address

/** A failed request. `status` 0: the server was not reached. `wait_s`: seconds to wait before a retry. */
export class ApiError extends Error {
  constructor(status, message, { location = null, wait_s = null, request = null } = {}) {
    super(message);
    Object.assign(this, { status, location, wait_s, request });
  }

  /** Whether the same request may succeed later. */
  get passing() {
    return [0, 408, 429].includes(this.status) || this.status >= 502;
  }
}

async function call(
  path,
  { signal, body, method = body ? "POST" : "GET", patience = PATIENCE_MS, read = JSON.parse, asks = true } = {},
) {
  const limit = AbortSignal.timeout(patience);
  const options = { method, signal: signal ? AbortSignal.any([signal, limit]) : limit, headers: { accept: "*/*" } };
  if (body) options.body = JSON.stringify(body);
  if (body) options.headers["content-type"] = "application/json";
  const key = apiKey.current;
  if (key) options.headers.authorization = `Bearer ${key}`;
  let answer, content;
  try {
    answer = await fetch(path, options);
    const text = await answer.text();
    content = answer.ok ? read(text, idAsText) : JSON.parse(text);
  } catch (error) {
    if (signal?.aborted) throw error; // replaced by a newer request: no error to show
    if (answer) throw new ApiError(answer.status, "The response of the server is not valid JSON.");
    throw new ApiError(0, limit.aborted ? "The server took too long to respond." : "The server does not respond.");
  }
  if (answer.ok) return content;
  if (answer.status === 401 && asks && apiKey.replaced(key)) return call(path, { signal, body, method, patience, read });
  throw refusal(answer, content);
}

/** Ids that are numbers become texts, as in the address and in requests; their digits are those of the response. */
function idAsText(key, value, context) {
  return (key === "item_id" || key === "user") && typeof value === "number" ? (context?.source ?? String(value)) : value;
}

/** The key of this tab, asked for once when the server wants one. It is never part of an address. */
export const apiKey = {
  declined: false,
  get current() {
    try {
      return sessionStorage.getItem("twotower-key");
    } catch {
      return null; // storage is forbidden
    }
  },
  /** Keeps a key for this tab; false if storage is forbidden. */
  keep(key) {
    try {
      sessionStorage.setItem("twotower-key", key);
      return true;
    } catch {
      return false;
    }
  },
  // True if there is another key than the one that was refused.
  replaced(refused) {
    if (this.current !== refused) return true;
    if (this.declined) return false;
    const given = window.prompt("This server needs a key with the role read:")?.trim();
    this.declined = !given || !this.keep(given);
    return !this.declined;
  },
};

function refusal(answer, content) {
  const { message, location } = content?.error ?? {};
  const wait_s = Number(answer.headers.get("retry-after")) || null;
  return new ApiError(answer.status, message ?? `The server responded with status ${answer.status}.`, {
    location,
    wait_s,
    request: content?.request_id,
  });
}

const id = encodeURIComponent;
const query = (params) => new URLSearchParams(Object.entries(params).filter(([, value]) => value !== undefined && value !== ""));

/** Groups ids so that the address of each request stays short. */
function portions(ids) {
  const found = [[]];
  let length = 0;
  for (const one of ids) {
    length += id(one).length + 4;
    if (length > QUERY || found.at(-1).length === 100) {
      found.push([]);
      length = id(one).length + 4;
    }
    found.at(-1).push(one);
  }
  return found.filter((portion) => portion.length);
}

async function itemsOf(ids, signal) {
  const parts = portions(ids).map((portion) =>
    call(`v1/items?${new URLSearchParams([...portion.map((one) => ["id", one]), ["columns", "true"]])}`, { signal }),
  );
  return (await Promise.all(parts)).flatMap((part) => part.items);
}

/** The list that came with the page: the response to a request without user, history and filters. Null if there is none. */
export function listOfPage() {
  const answer = document.getElementById("answer");
  return answer && JSON.parse(answer.textContent, idAsText);
}

export const api = {
  about: (signal) => call("v1/about", { signal }),
  recommend: (body, signal) => call("v1/recommend", { body, signal }),
  several: async (requests, signal) => (await call("v1/recommend:batch", { body: { requests }, signal })).answers,
  items: async (q, signal) => (await call(`v1/items?${query({ q, limit: 12 })}`, { signal })).items,
  itemsOf,
  item: (item, signal) => call(`v1/items/${id(item)}`, { signal }),
  similar: async (item, k, signal) => (await call(`v1/items/${id(item)}/similar?${query({ k })}`, { signal })).items,
  users: async (q, signal) => (await call(`v1/users?${query({ q, limit: 12 })}`, { signal })).users,
  random: async (signal) => (await call("v1/users/random", { signal })).users[0],
  history: async (user, signal) => (await call(`v1/users/${id(user)}/history`, { signal })).events,
  columns: (signal) => call("v1/columns", { signal }),
  values: async (column, q, signal) => (await call(`v1/values?${query({ column, q, limit: 12 })}`, { signal })).values,
  ready: (signal) => call("health/ready", { signal }),
  metrics: (signal) => call("metrics", { signal, read: (text) => text }),
  reload: (bundle) => call("admin/reload", { body: bundle ? { bundle } : {}, patience: LOADING_MS }),
  refresh: () => call("admin/refresh", { method: "POST", patience: LOADING_MS }),
  versions: () => call("admin/versions", { asks: false }),
  promote: () => call("admin/promote", { method: "POST", patience: LOADING_MS }),
  rollback: () => call("admin/rollback", { method: "POST", patience: LOADING_MS }),
};
