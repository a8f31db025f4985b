// Puts the reasons of a recommendation into words. The one that says most about the item is on its card, all others behind it.

import { attribute, label, noun, price } from "./format.js";

const LIKED = 4; // stars
const CHARS = 60;
const MIN_EVENT = 0.2; // an event of the history is named if its contribution is at least this part of the largest

/** [what speaks for the item, the same as a mere subject]. */
const USER = {
  id: ["Fits your taste so far", "Your taste so far"],
  state: ["Fits how often and how you rate", "How often and how you rate"],
  home: ["Near where you usually go", "Where you usually go"],
  request_location: ["Near the location of this request", "The location of this request"],
  hour: ["Fits this time of day", "The time of day"],
  weekday: ["Fits this day of the week", "The day of the week"],
  month: ["Fits this time of the year", "The time of the year"],
};
const ITEM = {
  id: ["Liked by people with a similar history", "Who likes it"],
  popularity: ["Popular lately", "How popular it is"],
  new: ["New in the catalogue", "It is new"],
  state: ["Often chosen and well rated lately", "How it was rated lately"],
  location: ["In an area where you go", "Where it is"],
  hours: ["Its opening hours fit you", "Its opening hours"],
  text: ["Its description fits your history", "Its description"],
  co_visited: ["Often chosen together with your history", "What it is chosen together with"],
};

const short = (text) => (text.length > CHARS ? `${text.slice(0, CHARS - 1)}…` : text);

/** The value in the label of a column: "Restaurants, Greek" of "categories: Restaurants, Greek"; null without one. */
function valueIn(name, text) {
  const column = `${name.replaceAll("_", " ")}: `;
  return text.startsWith(column) ? text.slice(column.length) : null;
}

/**
 * One reason as a sentence without a full stop.
 * `context`: `stars(id)` of an item of the history, `added` ids, `near` whether the request has a location, `levels` of the price.
 */
export function sentence({ kind, name, label: text, contribution }, { stars, added, near, levels }) {
  const good = contribution > 0;
  const words = (pair) => pair[good ? 0 : 1];
  if (kind === "event") {
    if (!good) return `${short(text)} in your history`;
    if (added.includes(name)) return `Because you added ${short(text)}`;
    return stars(name) >= LIKED ? `Because you liked ${short(text)}` : `Because of ${short(text)}`;
  }
  if (kind === "user") return words(USER[name] ?? [`Fits your ${label(name).toLowerCase()}`, `Your ${label(name).toLowerCase()}`]);
  if (name === "distance") return words(near ? USER.request_location : USER.home);
  const value = valueIn(name, text);
  if (value === null) return words(ITEM[name] ?? [`Fits you: ${label(name).toLowerCase()}`, `Its ${label(name).toLowerCase()}`]);
  if (name === "price") return `Its price: ${price(Number(value), levels) ?? value}`;
  const values = [...new Set(value.split(", ").map(attribute))].join(", ");
  return short(good ? `Fits your taste: ${values}` : `${label(name)}: ${values}`);
}

/** The reason for the card: the event of the history with the largest contribution if it matters, else the largest about the item. */
export function headline(reasons, context) {
  const good = (reasons ?? []).filter((reason) => reason.contribution > 0);
  if (!good.length) return null;
  const event = good.find((reason) => reason.kind === "event");
  const best = event && event.contribution >= MIN_EVENT * good[0].contribution ? event : (good.find(specific) ?? good[0]);
  return { ...best, words: sentence(best, context) };
}

/** A reason that says something about this item, unlike "your taste so far". */
const specific = ({ kind, name }) => kind !== "user" || name === "home" || name === "request_location";

/** "speaks for this item", "speaks against it", for screen readers. */
export const direction = (contribution) => (contribution < 0 ? `speaks against this ${noun.one}` : `speaks for this ${noun.one}`);
