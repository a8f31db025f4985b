// Shows the history of a user: the events of the bundle and the items that were added on this page.

import { animated } from "./changes.js";
import { $, h, icon } from "./dom.js";
import { count, date } from "./format.js";

const FIRST = 8; // items before "show all"

export const skeletons = (n) =>
  Array.from({ length: n }, () =>
    h("li", { class: "card skeleton", "aria-hidden": "true" }, h("span"), h("span"), h("span"), h("span")),
  );

export const nameButton = (item, open) =>
  h("button", { type: "button", class: "name", title: item.name, onclick: () => open(item.item_id) }, item.name);

/** Groups events (oldest first) by item, latest first, and counts the events of each item. */
export function byItem(events) {
  const found = new Map();
  for (const event of [...events].reverse().sort((a, b) => (b.time_s ?? 0) - (a.time_s ?? 0))) {
    const known = found.get(event.item_id);
    if (known) known.times += 1;
    else found.set(event.item_id, { ...event, times: 1 });
  }
  return [...found.values()];
}

export class History {
  /** `open(id)` opens the details of an item; `drop(id)` removes an item that the user added. */
  constructor(root, { open, drop }) {
    Object.assign(this, { root, open, drop, all: false, cards: new Map() });
    this.more = $("#history-more");
    this.more.addEventListener("click", () => {
      this.all = !this.all;
      this.draw();
    });
  }

  loading() {
    this.cards.clear();
    this.root.replaceChildren(...skeletons(4));
    this.more.hidden = true;
  }

  show(items) {
    this.items = items;
    this.draw();
  }

  draw() {
    const visible = this.all ? this.items : this.items.slice(0, FIRST + this.items.filter((item) => item.added).length);
    animated(this.root, () => this.root.replaceChildren(...visible.map((item) => this.kept(item))));
    this.more.hidden = !this.all && visible.length === this.items.length;
    this.more.textContent = this.all ? "Show fewer" : `Show all ${this.items.length}`;
    this.more.setAttribute("aria-expanded", String(this.all));
  }

  /** Returns the existing card of an item if nothing on it has changed, so that it keeps the focus and does not move. */
  kept(item) {
    const { item_id, name, added, times, time_s, stars } = item;
    const print = JSON.stringify([item_id, name, added, times, time_s, stars]);
    if (!this.cards.has(print)) this.cards.set(print, this.card(item));
    return this.cards.get(print);
  }

  card(item) {
    const stars =
      Number.isFinite(item.stars) &&
      h("span", { class: "stars", role: "img", "aria-label": count(item.stars, "star") }, "★".repeat(Math.round(item.stars)));
    const known = item.time_s != null && h("span", {}, date(item.time_s));
    const when = item.added ? h("span", { class: "tag" }, "added by you") : known;
    const times = item.times > 1 && h("span", {}, `${item.times} times`);
    const drop =
      item.added &&
      h(
        "button",
        {
          type: "button",
          class: "round quiet",
          "aria-label": `Remove ${item.name} from the history`,
          onclick: () => this.drop(item.item_id),
        },
        icon("close"),
      );
    return h(
      "li",
      { class: `card event${item.added ? " added" : ""}`, data: { id: item.item_id } },
      h("span", { class: "sign", "aria-hidden": "true" }),
      h("div", { class: "body" }, nameButton(item, this.open), h("p", { class: "meta" }, when, times, stars)),
      drop,
    );
  }
}
