// Shows the status of the list: loading, empty and failed lists, the banner with the next retry, the toast, and the latency.

import { $, h, ms, s } from "./dom.js";

const SLOW_MS = 180; // no loading state for faster responses
const TOAST_MS = 6000;
const LEAST_MS = 0.05; // shorter stages are not shown
const SOURCES = {
  nearby: "Unknown user: the most popular recent items nearby.",
  recent: "Unknown user: the most popular recent items.",
};

export class ListStatus {
  constructor(root, column) {
    Object.assign(this, { root, column });
  }

  busy() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.column.classList.add("busy"), SLOW_MS);
    this.column.setAttribute("aria-busy", "true");
  }

  rest() {
    clearTimeout(this.timer);
    this.column.classList.remove("busy", "stale");
    this.column.setAttribute("aria-busy", "false");
    this.root.replaceChildren();
  }

  /** Shows where a list comes from, or why it is empty. */
  done({ items, source, confidence, user_known }, { asked, reset }) {
    this.rest();
    const meter = s(
      "svg",
      { class: "meter", viewBox: "0 0 60 6", "aria-hidden": "true" },
      s("rect", { width: 60, height: 6, rx: 3 }),
      s("rect", { class: "fill", width: 60 * confidence, height: 6, rx: 3 }),
    );
    const unknown = asked.user && !user_known ? "The bundle does not know this user. " : "";
    const sure = h(
      "span",
      { class: "sure", title: "Grows with the length of the history: n / (n + 3) for n events" },
      meter,
      `confidence ${Math.round(100 * confidence)} %`,
    );
    $("#list-note").replaceChildren(unknown, SOURCES[source] ?? "From the model.", " ", sure);
    if (!items.length)
      this.root.append(
        h(
          "div",
          { class: "state" },
          h("p", {}, h("b", {}, "No item matches these filters.")),
          h("p", {}, "Increase the radius, allow more categories, or reset the filters."),
          h("button", { type: "button", onclick: reset }, "Reset filters and settings"),
        ),
      );
  }

  /** Marks a failed request; with `old`, the list of the previous request stays and is marked as outdated. */
  failed(old) {
    this.rest();
    this.column.classList.toggle("stale", old);
  }

  broken(error, retry) {
    const which = error.request && h("p", { class: "meta mono" }, `request ${error.request}`);
    this.root.replaceChildren(
      h(
        "div",
        { class: "state bad", role: "alert" },
        h("p", {}, h("b", {}, "The request failed. "), error.message),
        which,
        h("button", { type: "button", onclick: retry }, "Try again"),
      ),
    );
  }
}

const REASONS = { 0: "The server cannot be reached.", 429: "Too many requests at once.", 503: "The server is overloaded." };

/** Shows the error, counts down to the next retry and offers to retry now; null hides the banner. */
export function banner(error, { wait, retry } = {}) {
  const box = $("#banner");
  clearInterval(banner.timer);
  box.hidden = !error;
  if (!error) return box.replaceChildren();
  const until = performance.now() + wait * 1000;
  const clock = h("span", { "aria-hidden": "true" });
  const tick = () => {
    const left = Math.max(0, Math.ceil((until - performance.now()) / 1000));
    clock.textContent = left ? `Next retry in ${left} s.` : "Retrying …";
  };
  tick();
  banner.timer = setInterval(tick, 250);
  box.replaceChildren(
    h("b", {}, REASONS[error.status] ?? error.message),
    h("span", {}, "The page shows the last response and retries automatically."),
    clock,
    h("button", { type: "button", onclick: retry }, "Retry now"),
  );
}

/** Shows a notice for a few seconds, with an optional action. */
export function offer(sentence, label, act) {
  const box = $("#toast");
  clearTimeout(offer.timer);
  const hide = () => (box.hidden = true);
  const take = () => {
    hide();
    act();
  };
  const button = act && h("button", { type: "button", onclick: take }, label);
  box.replaceChildren(h("span", {}, sentence), button ?? "");
  box.hidden = false;
  offer.timer = setTimeout(hide, TOAST_MS);
  box.onpointerenter = box.onfocusin = () => clearTimeout(offer.timer);
  box.onpointerleave = () => (offer.timer = setTimeout(hide, TOAST_MS / 2));
}

/** Shows the latency: the server's stages as one bar with their names, and the round trip. */
export function latency(root, { took_ms, trip_ms, stages_ms }) {
  const stages = Object.entries(stages_ms ?? {}).filter(([, time]) => time >= LEAST_MS);
  const sum = stages.reduce((total, [, time]) => total + time, 0) || 1;
  root.hidden = false;
  root.replaceChildren(
    h("p", {}, h("b", {}, ms(took_ms)), " in the server, ", ms(trip_ms), " round trip"),
    h(
      "div",
      { class: "stages", "aria-hidden": "true" },
      stages.map(([name, time], n) =>
        h("span", { data: { n: n % 6 }, title: `${name} ${ms(time)}`, vars: { "--share": time / sum } }),
      ),
    ),
    h(
      "ul",
      {},
      stages.map(([name, time], n) => h("li", { data: { n: n % 6 } }, `${name} ${time.toFixed(time < 10 ? 1 : 0)}`)),
    ),
  );
}
