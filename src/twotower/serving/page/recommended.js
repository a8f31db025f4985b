// Shows the recommendations as cards: rank, change of rank, name, price, opening hours, the reason, and what the user can do.

import { animated, move } from "./changes.js";
import { $, h, icon, s } from "./dom.js";
import { hourOfWeek, km, noun, openState, price, signed, weekOf } from "./format.js";
import { nameButton, skeletons } from "./history.js";
import { direction, headline, sentence } from "./reasons.js";

const SHOWN = 3; // categories of a card
const UNWANTED = 2; // categories that "not interested" offers

/** "1.2 km · Mexican, Bars · Tampa" */
export function summary(item) {
  const far = Number.isFinite(item.distance_km) ? km(item.distance_km) : null;
  return [far, item.categories?.slice(0, SHOWN).join(", "), item.city].filter(Boolean).join(" · ");
}

/** Whether the scores fall from first to last: then they are what orders the list. */
export const ordered = (items) =>
  items.every(({ score }, n) => Number.isFinite(score) && (n === 0 || score <= items[n - 1].score)) && items.length > 0;

export class Recommended {
  /**
   * `open(id)` opens the details, `add(item)` adds the item to the history, `hide(item)` excludes it and `avoid(category)` all items
   * of a category. `context` is what sentences about reasons need.
   */
  constructor(root, { open, add, hide, avoid, context }) {
    Object.assign(this, { root, open, add, hide, avoid, context, cards: new Map(), wanted: new Set(), facts: new Map() });
  }

  loading(n) {
    this.cards.clear();
    this.wanted.clear();
    this.root.replaceChildren(...skeletons(n));
  }

  /** Shows the list. `moves` comes from `compare`, null for a first list. `filters`: what the catalogue has. */
  show(items, { moves = null, filters, scored }) {
    const index = [...this.root.children].findIndex((card) => card.contains(document.activeElement));
    this.filters = filters;
    const meter = ordered(items);
    const most = Math.max(Number.MIN_VALUE, ...items.map((item) => item.score).filter(Number.isFinite));
    animated(this.root, () => {
      this.cards = new Map(items.map((item) => [item.item_id, this.cards.get(item.item_id) ?? this.card(item.item_id)]));
      for (const item of items)
        this.update(this.cards.get(item.item_id), item, moves?.get(item.item_id), { most: meter ? most : null, scored });
      this.root.replaceChildren(...this.cards.values());
    });
    // The card with the focus has left the list: focus the card that is now in its position.
    if (index >= 0 && document.activeElement === document.body)
      $(".add", this.root.children[Math.min(index, items.length - 1)])?.focus({ preventScroll: true });
  }

  card(id) {
    const toggle = (kind, text, glyph) =>
      h(
        "button",
        { type: "button", class: kind, "aria-expanded": "false", onclick: () => this.toggle(id, kind.split(" ")[0]) },
        glyph,
        text,
      );
    const add = h(
      "button",
      { type: "button", class: "add", onclick: () => this.add(card.item) },
      icon("add"),
      h("span", {}, "Add"),
    );
    const card = h(
      "li",
      { class: "card best", data: { id } },
      h("div", { class: "position" }, h("span", { class: "rank" }), h("span", { class: "move" }), h("span", { class: "match" })),
      h(
        "div",
        { class: "body" },
        h("h3"),
        h("p", { class: "meta" }),
        h("p", { class: "facts" }),
        h("p", { class: "because" }, h("span", { class: "words" }), toggle("why link", "Why?")),
      ),
      h("div", { class: "acts" }, add, toggle("not round quiet", "", icon("no"))),
      h("div", { class: "reasons", hidden: true }),
      h("div", { class: "unwanted row", hidden: true }),
    );
    return card;
  }

  update(card, item, step, { most, scored }) {
    card.item = item;
    const { kind, sign, words } = move(step);
    $(".rank", card).textContent = item.rank;
    const mark = $(".move", card);
    mark.className = `move ${kind}`;
    mark.replaceChildren(h("span", { "aria-hidden": "true" }, sign), h("span", { class: "unseen" }, words));
    $(".match", card).replaceChildren(...(most ? [meter(item.score, most)] : []));
    if ($("h3", card).textContent !== item.name) $("h3", card).replaceChildren(nameButton(item, this.open));
    $(".meta", card).textContent = summary(item);
    $(".meta", card).hidden = !summary(item);
    $(".facts", card).hidden = !(this.filters.has_price || this.filters.has_amounts || this.filters.has_hours);
    this.fact(item.item_id);
    const reason = scored ? headline(item.reasons, this.context()) : null;
    $(".because", card).hidden = !scored;
    $(".words", card).textContent = reason?.words ?? "";
    $(".words", card).title = reason?.words ?? "";
    $(".add", card).setAttribute("aria-label", `Add ${item.name} to the history`);
    $(".why", card).setAttribute("aria-label", `Why this ${noun.one}: ${item.name}`);
    $(".why", card).hidden = !item.reasons?.length;
    $(".not", card).setAttribute("aria-label", `Not interested: ${item.name}`);
    $(".not", card).title = "Not interested";
    this.reasons(card);
  }

  /** Shows price and opening hours of an item once they are known. */
  fact(id) {
    const card = this.cards.get(id);
    const columns = this.facts.get(id);
    if (!card || !columns) return;
    const cost = this.filters.has_price || this.filters.has_amounts ? price(columns.price, this.filters.has_price) : null;
    const week = this.filters.has_hours ? weekOf(columns) : null;
    const state = week ? openState(week, hourOfWeek(columns.timezone)) : null;
    $(".facts", card).replaceChildren(
      ...[
        cost && h("span", { class: "cost" }, ...this.cost(columns.price, cost)),
        state && h("span", { class: state.open ? "open" : "shut" }, state.words),
      ].filter(Boolean),
    );
  }

  /** "$$" with words for screen readers, or "Price 12". */
  cost(value, words) {
    if (!this.filters.has_price) return [`Price ${words}`];
    return [h("span", { "aria-hidden": "true" }, words), h("span", { class: "unseen" }, `price ${value} of 4`)];
  }

  toggle(id, kind) {
    const card = this.cards.get(id);
    if (kind === "why") {
      if (!this.wanted.delete(id)) this.wanted.add(id);
      this.reasons(card);
      return;
    }
    const box = $(".unwanted", card);
    box.hidden = !box.hidden;
    $(".not", card).setAttribute("aria-expanded", String(!box.hidden));
    if (box.hidden) return;
    const button = (text, act) => h("button", { type: "button", onclick: act }, text);
    box.replaceChildren(
      button(`Hide this ${noun.one}`, () => this.hide(card.item)),
      ...card.item.categories.slice(0, UNWANTED).map((name) => button(`No more ${name}`, () => this.avoid(name))),
    );
    $("button", box).focus({ preventScroll: true });
  }

  reasons(card) {
    const { reasons } = card.item;
    const open = this.wanted.has(card.item.item_id) && reasons?.length > 0;
    $(".why", card).setAttribute("aria-expanded", String(open));
    const box = $(".reasons", card);
    box.hidden = !open;
    if (open) box.replaceChildren(...bars(card.item, this.context()));
  }
}

/** A meter relative to the highest score of the list. */
function meter(value, most) {
  return s(
    "svg",
    { viewBox: "0 0 30 4", role: "img", "aria-label": `match ${value.toFixed(2)}` },
    s("title", {}, `Match ${value.toFixed(2)}: what this list is ordered by`),
    s("rect", { width: 30, height: 4, rx: 2 }),
    s("rect", { class: "fill", width: 30 * Math.max(0, value / most), height: 4, rx: 2 }),
  );
}

/** Shows reasons as bars from a middle line: what speaks for the item to the right, what speaks against it to the left. */
function bars({ reasons, score }, context) {
  const most = Math.max(...reasons.map((reason) => Math.abs(reason.contribution))) || 1;
  const line = (reason) =>
    h(
      "li",
      reason.kind === "event" ? { data: { id: reason.name } } : {},
      h(
        "span",
        { class: "label" },
        sentence(reason, context),
        h("span", { class: "unseen" }, `, ${direction(reason.contribution)}`),
      ),
      h("span", {
        class: `bar ${reason.contribution < 0 ? "minus" : "plus"}`,
        vars: { "--share": Math.abs(reason.contribution) / most },
        "aria-hidden": "true",
      }),
      h("span", { class: "figure" }, signed(reason.contribution, 3)),
    );
  const note = `Match ${score.toFixed(2)}. Bars to the right speak for this ${noun.one}, bars to the left against it (gradient × input).`;
  return [h("ul", {}, reasons.map(line)), h("p", { class: "meta" }, note)];
}
