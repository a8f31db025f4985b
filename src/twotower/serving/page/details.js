// Shows one item in a dialog: its columns, its opening hours and the most similar items.

import { $, h, icon } from "./dom.js";
import { attribute, days, hourOfWeek, inWords, isWeek, label, noun, openState, price, weekOf } from "./format.js";
import { nameButton, skeletons } from "./history.js";
import { summary } from "./recommended.js";

const SIMILAR = 8;
const SHOWN_ELSEWHERE = ["item_id", "name", "categories", "city", "latitude", "longitude"];

export class Details {
  /** `add(item)` adds the item to the history; `ask(item)` makes its location that of the requests; `has(id)`: is the item in the
   * history; `far(id)`: its distance in kilometres, if known; `levels()`: whether prices are levels from 1 to 4. */
  constructor(dialog, api, { add, ask, has, far, levels }) {
    Object.assign(this, { dialog, api, add, ask, has, far, levels });
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
    dialog.addEventListener("close", () => dialog.open || this.newest?.abort()); // the event comes late: it may be open again
  }

  async open(id) {
    this.newest?.abort();
    this.newest = new AbortController();
    const { signal } = this.newest;
    this.dialog.replaceChildren(this.head("…"), h("ul", { class: "cards" }, skeletons(5)));
    if (!this.dialog.open) this.dialog.showModal();
    try {
      const [item, similar] = await Promise.all([this.api.item(id, signal), this.api.similar(id, SIMILAR, signal)]);
      if (!signal.aborted) this.draw(item, similar);
    } catch (error) {
      if (!signal.aborted)
        this.dialog.replaceChildren(
          this.head("Error"),
          h(
            "div",
            { class: "state" },
            h("p", {}, error.message),
            h("button", { type: "button", onclick: () => this.open(id) }, "Try again"),
          ),
        );
    }
  }

  close() {
    if (this.dialog.open) this.dialog.close();
  }

  head(title, below) {
    const close = h(
      "button",
      { type: "button", class: "round quiet", "aria-label": "Close", onclick: () => this.close() },
      icon("close"),
    );
    return h("header", {}, h("div", {}, h("h2", { id: "details-title" }, title), below && h("p", { class: "meta" }, below)), close);
  }

  draw(item, similar) {
    const known = this.has(item.item_id);
    const add = h(
      "button",
      { type: "button", class: "primary", disabled: known, onclick: () => this.add(item) },
      icon(known ? "check" : "add"),
      known ? "In the history" : "Add to the history",
    );
    const ask =
      Number.isFinite(item.latitude) &&
      Number.isFinite(item.longitude) &&
      h("button", { type: "button", onclick: () => this.ask(item) }, icon("pin"), "Use this location");
    this.dialog.replaceChildren(
      this.head(item.name, summary({ ...item, distance_km: this.far(item.item_id) })),
      h("div", { class: "row" }, add, ask),
      ...columnRows(item.columns ?? {}, this.levels()),
      h("h3", {}, `Similar ${noun.many}`),
      similar.length
        ? h(
            "ul",
            { class: "cards" },
            similar.map((one) => this.line(one)),
          )
        : h("p", { class: "meta" }, `No similar ${noun.many} in this catalogue.`),
    );
    $("button", this.dialog).focus();
    this.dialog.scrollTop = 0;
  }

  line(item) {
    const known = this.has(item.item_id);
    const words = known ? `Added to the history: ${item.name}` : `Add ${item.name} to the history`;
    const add = h(
      "button",
      { type: "button", class: "add", "aria-label": words, disabled: known, onclick: () => this.add(item) },
      icon(known ? "check" : "add"),
      known ? "Added" : "Add",
    );
    return h(
      "li",
      { class: "card" },
      h(
        "div",
        { class: "body" },
        nameButton(item, (id) => this.open(id)),
        h("p", { class: "meta" }, summary(item)),
      ),
      add,
    );
  }
}

function columnRows(columns, levels) {
  const week = weekOf(columns);
  const rows = Object.entries(columns).filter(
    ([name, value]) => !SHOWN_ELSEWHERE.includes(name) && value !== null && value !== "" && !isWeek(value) && String(value),
  );
  const today = Math.floor(hourOfWeek(columns.timezone) / 24);
  const value = (name, raw) => {
    if (Array.isArray(raw))
      return h(
        "span",
        { class: "chips" },
        [...new Set(raw.map((one) => attribute(String(one))))].map((one) => h("span", { class: "chip" }, one)),
      );
    if (/^(is|has)_/.test(name) && (raw === 0 || raw === 1)) return raw ? "yes" : "no";
    return name === "price" ? (price(Number(raw), levels) ?? inWords(raw)) : inWords(raw);
  };
  const state = week && openState(week, hourOfWeek(columns.timezone));
  return [
    rows.length > 0 &&
      h(
        "dl",
        {},
        rows.flatMap(([name, raw]) => [h("dt", {}, label(name)), h("dd", {}, value(name, raw))]),
      ),
    week && h("h3", {}, "Opening hours ", h("small", { class: state.open ? "open" : "shut" }, state.words)),
    week &&
      h(
        "dl",
        { class: "week" },
        days(week).flatMap(([day, spans], n) => [h("dt", n === today ? { class: "today" } : {}, day), h("dd", {}, spans)]),
      ),
  ].filter(Boolean);
}
