// Puts values into words: what the page calls an item, columns, attributes, prices and opening hours.

const DAYS = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];
const WEEK = /^[01]{168}$/;
const LEVELS = [1, 2, 3, 4];
const LONG = 300; // characters of a text that are shown

/** What the catalogue calls its items; "item" unless the bundle says otherwise. */
export const noun = { one: "item", many: "items" };

/** Sets the noun of the catalogue, given in the singular. */
export function setNoun(one, many) {
  Object.assign(noun, { one, many });
}

export const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

export const countItems = (n) => count(n, noun.one, noun.many);

export const km = (distance) =>
  distance < 1
    ? `${Math.round(distance * 100) * 10} m`
    : `${distance.toFixed(distance < 10 && !Number.isInteger(distance) ? 1 : 0)} km`;

export const ms = (time) => `${time < 10 ? time.toFixed(1) : Math.round(time).toLocaleString("en")} ms`;

export const signed = (value, digits) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;

const DATE = new Intl.DateTimeFormat("en", { day: "numeric", month: "short", year: "numeric", timeZone: "UTC" });

export const date = (seconds) => DATE.format(new Date(seconds * 1000));

const upper = (text) => text.replace(/^./, (letter) => letter.toUpperCase());

/** "RestaurantsTakeOut", "review_count" → "Restaurants take out", "Review count". */
export const label = (name) =>
  upper(
    name
      .replaceAll(/[._-]+/g, " ")
      .replaceAll(/([a-z0-9])([A-Z])/g, "$1 $2")
      .toLowerCase()
      .trim(),
  );

const TRUTH = { true: "yes", false: "no" };

/** One raw value in words: True → yes, 1234.5 → 1,234.5, "free_wifi" stays text. */
export function inWords(value) {
  if (typeof value === "number")
    return value.toLocaleString("en", { maximumFractionDigits: 2, useGrouping: Math.abs(value) >= 1e4 });
  const text = String(value).trim();
  return TRUTH[text.toLowerCase()] ?? (text.length > LONG ? `${text.slice(0, LONG)}…` : text);
}

/** "RestaurantsTakeOut=True" → "Restaurants take out", "NoiseLevel=quiet" → "Noise level: quiet". */
export function attribute(text) {
  const found = /^([A-Za-z][\w. -]*)=(.+)$/.exec(text);
  if (!found) return inWords(text);
  const value = inWords(found[2].replaceAll(/^u?'|'$/g, "")).replaceAll("_", " ");
  if (value === "yes") return label(found[1]);
  return value === "no" ? `No ${label(found[1]).toLowerCase()}` : `${label(found[1])}: ${value}`;
}

/** 2 of levels → "$$"; other prices as numbers. */
export function price(value, levels) {
  if (!Number.isFinite(value)) return null;
  if (levels && LEVELS.includes(value)) return "$".repeat(value);
  return value.toLocaleString("en", { minimumFractionDigits: Number.isInteger(value) ? 0 : 2, maximumFractionDigits: 2 });
}

export const isWeek = (value) => typeof value === "string" && WEEK.test(value);

/** The opening hours among the columns of an item: 168 characters of 0 and 1, from Monday 00:00. */
export const weekOf = (columns) => Object.values(columns).find(isWeek);

/** A line a day: ["Mon", "8–12, 14–19"]. */
export function days(week) {
  return DAYS.map((day, n) => {
    const spans = [...week.slice(24 * n, 24 * n + 24).matchAll(/1+/g)].map((span) =>
      span[0].length === 24 ? "all day" : `${span.index}–${span.index + span[0].length}`,
    );
    return [day, spans.join(", ") || "closed"];
  });
}

/** The hour of the week, 0 to 167 from Monday 00:00, in a time zone; without one on the user's clock. */
export function hourOfWeek(zone, at = new Date()) {
  try {
    const parts = new Intl.DateTimeFormat("en", {
      weekday: "short",
      hour: "numeric",
      hourCycle: "h23",
      timeZone: zone,
    }).formatToParts(at);
    const of = (type) => parts.find((part) => part.type === type).value;
    return 24 * DAYS.indexOf(of("weekday")) + Number(of("hour"));
  } catch {
    return hourOfWeek(undefined, at); // a zone that the browser does not know
  }
}

/** {open, words}: "Open until 19:00", "Closed, opens Tue 8:00"; null if the hours never change. */
export function openState(week, hour) {
  const open = week[hour] === "1";
  const ahead = [...Array(168).keys()].find((step) => (week[(hour + step) % 168] === "1") !== open);
  if (ahead === undefined) return open ? { open, words: "Always open" } : { open, words: "Closed" };
  const next = (hour + ahead) % 168;
  const day = Math.floor(next / 24) === Math.floor(hour / 24) && ahead < 24 ? "" : `${DAYS[Math.floor(next / 24)]} `;
  const time = `${next % 24}:00`;
  if (open) return { open, words: `Open until ${ahead < 24 ? (next % 24 ? time : "midnight") : `${day}${time}`}` };
  return { open, words: `Closed, opens ${day}${time}` };
}
