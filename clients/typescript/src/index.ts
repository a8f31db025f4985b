/** A typed client of a Two-Tower Rec server, with timeouts and retries. */

import createFetchClient, { type Client as FetchClient } from "openapi-fetch";
import type { components, paths } from "./schema.js";

/** The objects of requests and answers, by name: `Schemas["RecommendIn"]`. */
export type Schemas = components["schemas"];
/** One method for each HTTP method; paths, parameters, bodies and answers are typed. */
export type Client = FetchClient<paths>;

export interface Options {
  /** Address of the server. */
  baseUrl?: string;
  /** API key, or a function that returns the present one. */
  key?: string | (() => string | Promise<string>) | undefined;
  /** Time for each attempt, its whole answer included. Default: 5000. */
  timeoutMs?: number;
  /** Attempts after the first. Default: 4. */
  retries?: number;
  /** Longest wait between two attempts. Default: 10000. */
  maxWaitMs?: number;
  /** Sends one request. Default: the `fetch` of the platform. */
  fetch?: (request: Request) => Promise<Response>;
}

const RETRIED = new Set([429, 502, 503, 504]); // statuses after which the same request may succeed
const TRIED_ONCE = /\/(admin\/(reload|promote|rollback)|health\/(live|ready))$/;
const BACKOFF_MS = 100;
const JITTER_MS = 100; // random part of every wait, so that refused clients do not come back together
const WITHOUT_BODY = new Set([204, 205, 304]);

/** Returns a client. Calls return `{ data }` or `{ error }`; they reject only if no attempt got an answer. */
export function createClient(options: Options = {}): Client {
  return createFetchClient<paths>({
    baseUrl: options.baseUrl ?? "http://127.0.0.1:8000",
    fetch: (request) => withRetries(request, options),
  });
}

async function withRetries(request: Request, options: Options): Promise<Response> {
  const { key, retries = 4, maxWaitMs = 10_000 } = options;
  if (key !== undefined) {
    request.headers.set("authorization", `Bearer ${typeof key === "string" ? key : await key()}`);
  }
  const last = TRIED_ONCE.test(new URL(request.url).pathname) ? 0 : retries;
  for (let attempt = 0; ; attempt += 1) {
    let waitHeader: string | null = null;
    try {
      const response = await attemptOnce(request, options);
      if (attempt >= last || !RETRIED.has(response.status)) return response;
      waitHeader = response.headers.get("retry-after");
    } catch (error) {
      if (attempt >= last || request.signal.aborted) throw error;
    }
    const wait = waitHeader === null || Number.isNaN(Number(waitHeader)) ? BACKOFF_MS * 2 ** attempt : 1000 * Number(waitHeader);
    await sleep(Math.min(wait, maxWaitMs) + JITTER_MS * Math.random(), request.signal);
  }
}

/** Sends a request and reads the whole answer, so that a connection lost in its middle is tried again too. */
async function attemptOnce(request: Request, { timeoutMs = 5_000, fetch: send = fetch }: Options): Promise<Response> {
  const signal = AbortSignal.any([request.signal, AbortSignal.timeout(timeoutMs)]);
  const response = await send(new Request(request.clone(), { signal, redirect: "manual" }));
  const body = await response.arrayBuffer();
  const { status, statusText, headers } = response;
  if (response.type === "opaqueredirect") throw new TypeError("The server redirects; redirects are not followed.");
  return new Response(WITHOUT_BODY.has(status) ? null : body, { status, statusText, headers });
}

function sleep(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const end = setTimeout(done, ms);
    signal.addEventListener("abort", done, { once: true });
    function done() {
      clearTimeout(end);
      signal.removeEventListener("abort", done);
      if (signal.aborted) reject(signal.reason);
      else resolve();
    }
  });
}
