// Everything between asking and having: busy, empty and broken lists, the banner with its next try, the toast, how long it took.

import { $, h, ms, s } from "./dom.js";

const SLOW_MS = 180; // a faster answer needs no sign that it is coming
const TOAST_MS = 6000;
const LEAST_MS = 0.05; // of a stage that is worth a name
const SOURCES = {
  nearby: "Nothing is known of who asks: the places most visited lately around here.",
  recent: "Nothing is known of who asks: the places most visited lately.",
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

  /** An answer is there: where it comes from, or why it is empty. */
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
      { class: "sure", title: "How much is known of who asks: grows with the history" },
      meter,
      `confidence ${Math.round(100 * confidence)} %`,
    );
    $("#list-note").replaceChildren(unknown, SOURCES[source] ?? "From the history, by the model.", " ", sure);
    if (!items.length)
      this.root.append(
        h(
          "div",
          { class: "state" },
          h("p", {}, h("b", {}, "No place passes these filters.")),
          h("p", {}, "Widen the radius, allow more categories, or begin anew."),
          h("button", { type: "button", onclick: reset }, "Reset filters and dials"),
        ),
      );
  }

  /** No answer; with `old`, the list of the request before stays and is marked as such. */
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
        h("p", {}, h("b", {}, "This went wrong. "), error.message),
        which,
        h("button", { type: "button", onclick: retry }, "Try again"),
      ),
    );
  }
}

const REASONS = { 0: "The server cannot be reached.", 429: "Too many requests at once.", 503: "The server has too much to do." };

/** Shows why nothing comes, counts down to the next try, and offers it now; null takes the banner away. */
export function banner(error, { wait, retry } = {}) {
  const box = $("#banner");
  clearInterval(banner.timer);
  box.hidden = !error;
  if (!error) return box.replaceChildren();
  const until = performance.now() + wait * 1000;
  const clock = h("span", { "aria-hidden": "true" });
  const tick = () => {
    const left = Math.max(0, Math.ceil((until - performance.now()) / 1000));
    clock.textContent = left ? `Next try in ${left} s.` : "Trying …";
  };
  tick();
  banner.timer = setInterval(tick, 250);
  box.replaceChildren(
    h("b", {}, REASONS[error.status] ?? error.message),
    h("span", {}, "What you see is the last answer; the page goes on by itself."),
    clock,
    h("button", { type: "button", onclick: retry }, "Try now"),
  );
}

/** A sentence at the edge of the page for a while, with something to do about it. */
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

/** How long the answer took: the server's stages as one bar with their names, and the way there and back. */
export function latency(root, { took_ms, trip_ms, stages_ms }) {
  const stages = Object.entries(stages_ms ?? {}).filter(([, time]) => time >= LEAST_MS);
  const sum = stages.reduce((total, [, time]) => total + time, 0) || 1;
  root.hidden = false;
  root.replaceChildren(
    h("p", {}, h("b", {}, ms(took_ms)), " in the server, ", ms(trip_ms), " with the way"),
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
