// Shows the status of the list: what orders it, loading, empty and failed lists, the banner with the next retry, and the toast.

import { $, h } from "./dom.js";
import { noun } from "./format.js";

const SLOW_MS = 180; // no loading state for faster responses
const TOAST_MS = 6000;

/** What orders a list, as a sentence without a full stop. */
export function ordering({ source, user_known }, { user, popularity_bias: bias, diversity, seen }) {
  if (source !== "model") {
    const area = source === "nearby" ? " near the pin" : "";
    return user && !user_known
      ? `This user is unknown: what most people chose lately${area}`
      : `No history yet: what most people chose lately${area}`;
  }
  const parts = ["Best match first"];
  if (bias) parts.push(bias > 0 ? `popular ${noun.many} raised` : `rare ${noun.many} raised`);
  if (diversity) parts.push("similar ones apart");
  if (seen) parts.push("known ones included");
  return parts.join(", ");
}

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

  /** Shows what orders the list, or why it is empty. */
  done(answer, { state, reset }) {
    this.rest();
    $("#list-note").textContent = ordering(answer, state);
    if (!answer.items.length)
      this.root.append(
        h(
          "div",
          { class: "state" },
          h("p", {}, h("b", {}, `No ${noun.one} matches these filters.`)),
          h("p", {}, "Remove a condition, or reset the filters."),
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
