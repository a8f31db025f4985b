// Holds the state of the page as one object and writes it to the address after "#", so that a link reopens it. Default values are
// left out of the address; invalid values in an address are replaced by the defaults.

export const RADII = [null, 1, 2, 5, 10, 25, 50, 100];
export const PRICES = 4;
export const MOST = 500;
export const EXPLAINED = 50; // items of a list with reasons; the server explains at most 100
const HIDDEN = 100; // a filter has at most 4,000 characters
const TABS = ["for-you", "evaluation", "operations"];

export const START = Object.freeze({
  tab: "for-you",
  user: null,
  added: [], // ids of items added to the history
  hidden: [], // ids of items that the user does not want to see
  near: null,
  categories: [],
  price: null,
  radius: null,
  open: false,
  conditions: [], // conditions in the filter language; all must hold
  seen: false,
  popularity_bias: 0,
  diversity: 0,
  k: 10,
});

const LISTS = ["added", "hidden", "categories", "conditions"];
const FLAGS = ["open", "seen"];
const TUNED = ["categories", "price", "radius", "open", "conditions", "seen", "popularity_bias", "diversity"];
const differs = (state, name) => String(state[name]) !== String(START[name]);

/** The number of filters and settings that differ from their defaults. */
export const tuned = (state) => TUNED.filter((name) => differs(state, name)).length;

/** The state with all filters and settings at their defaults. */
export const untuned = (state) => ({ ...state, ...Object.fromEntries(TUNED.map((name) => [name, START[name]])) });

/** The parts of the state that belong to one user, and change when another or none is chosen. */
export const someone = (user) => ({ user, added: [], hidden: [], k: START.k });

export function toHash(state) {
  const params = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (!differs(state, name)) continue;
    for (const part of LISTS.includes(name) ? value : [FLAGS.includes(name) ? 1 : value]) params.append(name, part);
  }
  const text = params.toString();
  return text ? `#${text}` : "";
}

export function fromHash(hash) {
  const params = new URLSearchParams(hash.replace(/^#/, ""));
  const near = (params.get("near") ?? "").split(",").map(Number);
  return {
    tab: TABS.includes(params.get("tab")) ? params.get("tab") : START.tab,
    user: params.get("user") || null,
    ...Object.fromEntries(LISTS.map((name) => [name, params.getAll(name).filter(Boolean)])),
    near: near.length === 2 && Math.abs(near[0]) <= 90 && Math.abs(near[1]) <= 180 ? near : null,
    price: between(params.get("price"), 1, PRICES, null),
    radius: RADII.includes(Number(params.get("radius"))) ? Number(params.get("radius")) : null,
    ...Object.fromEntries(FLAGS.map((name) => [name, params.get(name) === "1"])),
    popularity_bias: between(params.get("popularity_bias"), -1, 1, 0),
    diversity: between(params.get("diversity"), 0, 1, 0),
    k: Math.floor(between(params.get("k"), 1, MOST, START.k)),
  };
}

function between(text, low, high, otherwise) {
  const value = text === null || text === "" ? NaN : Number(text);
  return value >= low && value <= high ? value : otherwise;
}

const DAYS = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"];

/** The current time on the user's clock, as the filter language writes it: "Fri 19:30". */
export function now() {
  const at = new Date();
  return `${DAYS[at.getDay()]} ${String(at.getHours()).padStart(2, "0")}:${String(at.getMinutes()).padStart(2, "0")}`;
}

export const quoted = (value) => JSON.stringify(value);

/** Whether the filter of a state can be written without knowing the catalogue. */
export const unfiltered = (state) => !(state.price || state.radius || state.open);

/** The filter of the state in the API's language. */
export function filterOf(state, filters) {
  const hidden = state.hidden.slice(-HIDDEN);
  const parts = [
    ...state.conditions,
    state.categories.length && `category in [${state.categories.map(quoted).join(", ")}]`,
    state.price && filters.has_price && `price <= ${state.price}`,
    state.radius && filters.has_locations && `within(${state.radius})`,
    state.open && filters.has_hours && (filters.has_zones ? "open_now" : `open_at(${quoted(now())})`),
    hidden.length && `id not in [${hidden.map(quoted).join(", ")}]`,
  ].filter(Boolean);
  const alone = parts.length < 2;
  return parts.map((part) => (!alone && / or /.test(part) ? `(${part})` : part)).join(" and ") || undefined;
}

/** The body of POST /v1/recommend. */
export function requestOf(state, filters, extra = {}) {
  return {
    user: state.user ?? undefined,
    history: state.added.length ? state.added.map((item_id) => ({ item_id })) : undefined,
    k: state.k,
    filter: filterOf(state, filters),
    near: state.near ?? undefined,
    exclude_seen: !state.seen,
    popularity_bias: state.popularity_bias,
    diversity: state.diversity,
    explain: state.k <= EXPLAINED || undefined,
    ...extra,
  };
}
