// Shows the recommendations as cards: rank, change of rank, name, price, opening hours, the reason, and what the user can do.

import { animated, move } from "./changes.js";
import { $, h } from "./dom.js";
import { hourOfWeek, km, noun, openState, price, signed, weekOf } from "./format.js";
import { skeletons } from "./history.js";
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

  /** Takes over the cards that came with the page. */
  adopt(items) {
    for (const [n, item] of items.entries()) this.cards.set(item.item_id, this.wired(this.root.children[n], item.item_id, item));
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
    const card = $("#card").content.firstElementChild.cloneNode(true);
    card.dataset.id = id;
    return this.wired(card, id);
  }

  /** Returns a card whose buttons work. */
  wired(card, id, item = null) {
    card.item = item;
    $(".name", card).addEventListener("click", () => this.open(id));
    $(".add", card).addEventListener("click", () => this.add(card.item));
    for (const kind of ["why", "not"]) $(`.${kind}`, card).addEventListener("click", () => this.toggle(id, kind));
    return card;
  }

  update(card, item, step, { most, scored }) {
    card.item = item;
    const { kind, sign, words } = move(step);
    $(".rank", card).textContent = item.rank;
    const mark = $(".move", card);
    mark.className = `move ${kind}`;
    mark.replaceChildren(h("span", { "aria-hidden": "true" }, sign), h("span", { class: "unseen" }, words));
    meter($(".match svg", card), item.score, most);
    $(".name", card).textContent = $(".name", card).title = item.name;
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

/** Sets a meter relative to the highest score of the list; without one (null), the meter is hidden. */
function meter(svg, value, most) {
  svg.toggleAttribute("hidden", most === null);
  if (most === null) return;
  svg.setAttribute("aria-label", `match ${value.toFixed(2)}`);
  $("title", svg).textContent = `Match ${value.toFixed(2)}: what this list is ordered by`;
  $(".fill", svg).setAttribute("width", 30 * Math.max(0, value / most));
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
