// Shows one item in a dialog: its columns, its opening hours and the most similar items.

import { skeletons, summary } from "./cards.js";
import { $, h, icon } from "./dom.js";
import { placed } from "./map.js";

const SIMILAR = 8;
const DAYS = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];
const WEEK = /^[01]{168}$/;
const TOLD = ["item_id", "name", "categories", "city", "latitude", "longitude"]; // shown elsewhere in the dialog
const LEVELS = [1, 2, 3, 4]; // price levels; other prices are shown as numbers

export class Details {
  /** `add(place)` adds the item to the history; `ask(place)` makes its location that of the requests; `has(id)`: is the item in the
   * history; `far(id)`: its distance in kilometres, if known. */
  constructor(dialog, api, { add, ask, has, far }) {
    Object.assign(this, { dialog, api, add, ask, has, far });
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
    dialog.addEventListener("close", () => this.newest?.abort());
  }

  async open(id) {
    this.newest?.abort();
    this.newest = new AbortController();
    const { signal } = this.newest;
    this.dialog.replaceChildren(this.head("…"), h("ul", { class: "cards" }, skeletons(5)));
    if (!this.dialog.open) this.dialog.showModal();
    try {
      const [place, similar] = await Promise.all([this.api.item(id, signal), this.api.similar(id, SIMILAR, signal)]);
      if (!signal.aborted) this.draw(place, similar);
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
    this.dialog.close();
  }

  head(title, below) {
    const close = h(
      "button",
      { type: "button", class: "round quiet", "aria-label": "Close", onclick: () => this.close() },
      icon("close"),
    );
    return h("header", {}, h("div", {}, h("h2", { id: "details-title" }, title), below && h("p", { class: "meta" }, below)), close);
  }

  draw(place, similar) {
    const known = this.has(place.item_id);
    const add = h(
      "button",
      { type: "button", class: "primary", disabled: known, onclick: () => this.add(place) },
      icon(known ? "check" : "add"),
      known ? "In the history" : "Add to the history",
    );
    const ask = placed(place) && h("button", { type: "button", onclick: () => this.ask(place) }, icon("pin"), "Use this location");
    this.dialog.replaceChildren(
      this.head(place.name, summary({ ...place, distance_km: this.far(place.item_id) })),
      h("div", { class: "row" }, add, ask),
      ...columnRows(place.columns ?? {}),
      h("h3", {}, "Similar items"),
      similar.length
        ? h(
            "ul",
            { class: "cards" },
            similar.map((one) => this.line(one)),
          )
        : h("p", { class: "meta" }, "No similar items in this catalogue."),
    );
    $("button", this.dialog).focus();
    this.dialog.scrollTop = 0;
  }

  line(place) {
    const name = h("button", { type: "button", class: "name", onclick: () => this.open(place.item_id) }, place.name);
    const known = this.has(place.item_id);
    const label = known ? `Added to the history: ${place.name}` : `Add ${place.name} to the history`;
    const add = h(
      "button",
      { type: "button", class: "add", "aria-label": label, disabled: known, onclick: () => this.add(place) },
      icon(known ? "check" : "add"),
      known ? "Added" : "Add",
    );
    return h("li", { class: "card" }, h("div", { class: "body" }, name, h("p", { class: "meta" }, summary(place))), add);
  }
}

function columnRows(columns) {
  const rows = Object.entries(columns).filter(
    ([name, value]) => !TOLD.includes(name) && value !== null && value !== "" && !WEEK.test(value) && String(value),
  );
  const week = Object.values(columns).find((value) => typeof value === "string" && WEEK.test(value));
  const chips = (list) =>
    h(
      "span",
      { class: "chips" },
      list.map((one) => h("span", { class: "chip" }, inWords(String(one)))),
    );
  const shown = ([name, value]) => [
    h("dt", {}, name.replaceAll("_", " ")),
    h(
      "dd",
      {},
      Array.isArray(value) ? chips(value) : name === "price" && LEVELS.includes(value) ? "$".repeat(value) : String(value),
    ),
  ];
  return [rows.length > 0 && h("dl", {}, rows.flatMap(shown)), week && h("dl", { class: "week" }, hours(week))].filter(Boolean);
}

/** "RestaurantsTakeOut=True" → "Restaurants take out", "NoiseLevel=quiet" → "Noise level: quiet". */
function inWords(attribute) {
  const [name, value] = attribute.split("=");
  const words = name
    .replaceAll(/[._]/g, " ")
    .replaceAll(/([a-z])([A-Z])/g, "$1 $2")
    .toLowerCase();
  const said = { True: "", False: ": no" }[value] ?? (value === undefined ? "" : `: ${value.replaceAll("_", " ")}`);
  return words.replace(/^./, (letter) => letter.toUpperCase()) + said;
}

/** 168 characters of 0 and 1 from Monday 00:00 → a line a day: "Mon", "8–12, 14–19". */
function hours(week) {
  const today = (new Date().getDay() + 6) % 7;
  return DAYS.flatMap((day, n) => {
    const spans = [...week.slice(24 * n, 24 * n + 24).matchAll(/1+/g)].map((span) =>
      span[0].length === 24 ? "all day" : `${span.index}–${span.index + span[0].length}`,
    );
    return [h("dt", n === today ? { class: "today" } : {}, day), h("dd", {}, spans.join(", ") || "closed")];
  });
}
