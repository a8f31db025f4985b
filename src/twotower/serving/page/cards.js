// Shows lists of items as cards: the history, the recommendations with their changes of rank, and skeletons while loading.

import { animated, move } from "./changes.js";
import { $, count, date, h, icon, km, s, signed } from "./dom.js";
import { placed } from "./map.js";

const SHOWN = 3; // categories of a card
const FIRST = 8; // items of a history before "show all"

/** "Mexican, Bars · Tampa · 1.2 km" */
export function summary(place) {
  const far = Number.isFinite(place.distance_km) ? km(place.distance_km) : null;
  return [place.categories?.slice(0, SHOWN).join(", "), place.city, far].filter(Boolean).join(" · ");
}

export const skeletons = (n) =>
  Array.from({ length: n }, () => h("li", { class: "card skeleton", "aria-hidden": "true" }, h("span"), h("span"), h("span")));

/** Groups events (oldest first) by item, latest first, and counts the events of each item. */
export function byPlace(events) {
  const found = new Map();
  for (const event of [...events].reverse().sort((a, b) => (b.time_s ?? 0) - (a.time_s ?? 0))) {
    const known = found.get(event.item_id);
    if (known) known.times += 1;
    else found.set(event.item_id, { ...event, times: 1 });
  }
  return [...found.values()];
}

/** Shows the history. `open(id)` opens the details of an item; `drop(id)` removes an item that the user added. */
export class History {
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

  show(places) {
    this.places = places;
    this.draw();
  }

  draw() {
    const shown = this.all ? this.places : this.places.slice(0, FIRST + this.places.filter((place) => place.added).length);
    animated(this.root, () => this.root.replaceChildren(...shown.map((place) => this.kept(place))));
    this.more.hidden = !this.all && shown.length === this.places.length;
    this.more.textContent = this.all ? "Show fewer" : `Show all ${this.places.length}`;
    this.more.setAttribute("aria-expanded", String(this.all));
  }

  /** Returns the existing card of an item if nothing on it has changed, so that it keeps the focus and does not move. */
  kept(place) {
    const { item_id, name, added, times, time_s, stars } = place;
    const print = JSON.stringify([item_id, name, added, times, time_s, stars]);
    if (!this.cards.has(print)) this.cards.set(print, this.card(place));
    return this.cards.get(print);
  }

  card(place) {
    const stars =
      Number.isFinite(place.stars) &&
      h("span", { class: "stars", role: "img", "aria-label": count(place.stars, "star") }, "★".repeat(Math.round(place.stars)));
    const known = place.time_s != null && h("span", {}, date(place.time_s));
    const when = place.added ? h("span", { class: "tag" }, "added by you") : known;
    const times = place.times > 1 && h("span", {}, `${place.times} events`);
    const drop =
      place.added &&
      h(
        "button",
        {
          type: "button",
          class: "round quiet",
          "aria-label": `Remove ${place.name} from the history`,
          onclick: () => this.drop(place.item_id),
        },
        icon("close"),
      );
    return h(
      "li",
      { class: `card visit${place.added ? " added" : ""}`, data: { id: place.item_id } },
      h("span", { class: "sign", "aria-hidden": "true" }),
      h("div", { class: "body" }, name(place, this.open), h("p", { class: "meta" }, when, times, stars)),
      drop,
    );
  }
}

/** Shows the recommendations. `open(id)` opens the details, `add(place)` adds the item to the history, `why()` requests reasons. */
export class Recommended {
  constructor(root, { open, add, why }) {
    Object.assign(this, { root, open, add, why, cards: new Map(), wanted: new Set() });
  }

  loading() {
    this.cards.clear();
    this.wanted.clear();
    this.root.replaceChildren(...skeletons(6));
  }

  /** Shows the list. `moves` comes from `compare`, null for a first list; `scored`: the model made the list and has reasons. */
  show(places, { moves = null, hasMap = false, scored = true } = {}) {
    const index = [...this.root.children].findIndex((card) => card.contains(document.activeElement));
    animated(this.root, () => {
      this.cards = new Map(places.map((place) => [place.item_id, this.cards.get(place.item_id) ?? this.card(place.item_id)]));
      const most = Math.max(Number.MIN_VALUE, ...places.map((place) => place.score).filter(Number.isFinite));
      for (const place of places)
        this.update(this.cards.get(place.item_id), place, moves?.get(place.item_id), { hasMap, scored, most });
      this.root.replaceChildren(...this.cards.values());
    });
    // The card with the focus has moved to the history: focus the card that is now in its position.
    if (index >= 0 && document.activeElement === document.body)
      $(".add", this.root.children[Math.min(index, places.length - 1)])?.focus({ preventScroll: true });
  }

  card(id) {
    const why = h(
      "button",
      { type: "button", class: "link why", "aria-expanded": "false", onclick: () => this.toggle(id) },
      "Why this item",
    );
    const add = h("button", { type: "button", class: "add", onclick: () => this.add(card.place) }, icon("add"), "Add");
    const card = h(
      "li",
      { class: "card best", data: { id } },
      h("div", { class: "place" }, h("span", { class: "rank" }), h("span", { class: "move" })),
      h("div", { class: "body" }, h("h3"), h("p", { class: "meta" }), h("p", { class: "row" }, why, h("span", { class: "score" }))),
      add,
      h("div", { class: "reasons", hidden: true }),
    );
    return card;
  }

  update(card, place, step, { hasMap, scored, most }) {
    card.place = place;
    const { kind, sign, words } = move(step);
    $(".rank", card).textContent = place.rank;
    const sign_ = $(".move", card);
    sign_.className = `move ${kind}`;
    sign_.replaceChildren(h("span", { "aria-hidden": "true" }, sign), h("span", { class: "unseen" }, words));
    $("h3", card).replaceWith(h("h3", {}, name(place, this.open)));
    $(".meta", card).textContent = [summary(place), hasMap && !placed(place) ? "not on the map" : ""].filter(Boolean).join(" · ");
    $(".row", card).hidden = !scored;
    $(".score", card).replaceChildren(...score(place.score, most));
    $(".add", card).setAttribute("aria-label", `Add ${place.name} to the history`);
    $(".why", card).setAttribute("aria-label", `Why this item: ${place.name}`);
    this.reasons(card);
  }

  toggle(id) {
    if (!this.wanted.delete(id)) this.wanted.add(id);
    this.reasons(this.cards.get(id));
    if (this.wanted.has(id) && !this.cards.get(id).place.reasons?.length) this.why();
  }

  reasons(card) {
    const open = this.wanted.has(card.place.item_id) && !$(".row", card).hidden;
    $(".why", card).setAttribute("aria-expanded", String(open));
    const box = $(".reasons", card);
    box.hidden = !open;
    if (!open) return;
    const { reasons } = card.place;
    if (reasons?.length) box.replaceChildren(...bars(reasons));
    else box.replaceChildren(h("p", { class: "meta" }, card.place.explained ? "No large contributions." : "Loading reasons …"));
  }
}

const name = (place, open) => h("button", { type: "button", class: "name", onclick: () => open(place.item_id) }, place.name);

/** A meter relative to the highest score of the list, and the score as a number. */
function score(value, most) {
  if (!Number.isFinite(value)) return [];
  const share = Math.max(0, value / most);
  const meter = s(
    "svg",
    { viewBox: "0 0 40 4", "aria-hidden": "true" },
    s("rect", { width: 40, height: 4, rx: 2 }),
    s("rect", { class: "fill", width: 40 * share, height: 4, rx: 2 }),
  );
  return [
    meter,
    h(
      "span",
      { title: "Inner product of user and item vector, plus the popularity term" },
      h("span", { class: "unseen" }, "score "),
      value.toFixed(2),
    ),
  ];
}

const KINDS = { visit: "history", user: "user", item: "item" };

/** Shows reasons as bars from a middle line: positive contributions to the right, negative ones to the left. */
function bars(reasons) {
  const most = Math.max(...reasons.map((reason) => Math.abs(reason.share))) || 1;
  const line = (reason) =>
    h(
      "li",
      reason.kind === "visit" ? { data: { id: reason.name } } : {},
      h("span", { class: "label" }, reason.label, " ", h("small", {}, KINDS[reason.kind] ?? reason.kind)),
      h("span", {
        class: `bar ${reason.share < 0 ? "minus" : "plus"}`,
        vars: { "--share": Math.abs(reason.share) / most },
        "aria-hidden": "true",
      }),
      h("span", { class: "figure" }, signed(reason.share, 3)),
    );
  return [h("p", { class: "meta" }, "Contributions to the score (gradient × input):"), h("ul", {}, reasons.map(line))];
}
