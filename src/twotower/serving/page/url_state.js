// Holds the state of the page as one object and writes it to the address after "#", so that a link reopens it. Default values are
// left out of the address; invalid values in an address are replaced by the defaults.

export const RADII = [null, 1, 2, 5, 10, 25, 50, 100];
export const PRICES = 4;
const MOST = 500;

export const START = Object.freeze({
  tab: "places",
  user: null,
  added: [],
  near: null,
  categories: [],
  price: null,
  radius: null,
  open: false,
  where: "",
  seen: false,
  popularity: 0,
  diversity: 0,
  k: 10,
});

const TUNED = ["categories", "price", "radius", "open", "where", "seen", "popularity", "diversity"];

/** The number of filters and settings that differ from their defaults. */
export const tuned = (state) => TUNED.filter((name) => String(state[name]) !== String(START[name])).length;

/** The state with all filters and settings at their defaults. */
export const untuned = (state) => ({ ...state, ...Object.fromEntries(TUNED.map((name) => [name, START[name]])) });

export function toHash(state) {
  const params = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (String(value) === String(START[name])) continue;
    const parts = name === "added" || name === "categories" ? value : [name === "open" || name === "seen" ? 1 : value];
    for (const part of parts) params.append(name, part);
  }
  const text = params.toString();
  return text ? `#${text}` : "";
}

export function fromHash(hash) {
  const params = new URLSearchParams(hash.replace(/^#/, ""));
  const near = (params.get("near") ?? "").split(",").map(Number);
  return {
    tab: params.get("tab") === "figures" ? "figures" : "places",
    user: params.get("user") || null,
    added: params.getAll("added").filter(Boolean),
    near: near.length === 2 && Math.abs(near[0]) <= 90 && Math.abs(near[1]) <= 180 ? near : null,
    categories: params.getAll("categories").filter(Boolean),
    price: between(params.get("price"), 1, PRICES, null),
    radius: RADII.includes(Number(params.get("radius"))) ? Number(params.get("radius")) : null,
    open: params.get("open") === "1",
    where: params.get("where") ?? "",
    seen: params.get("seen") === "1",
    popularity: between(params.get("popularity"), -1, 1, 0),
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

/** The filter of the state in the API's language. */
export function filterOf(state, filters) {
  const text = (value) => JSON.stringify(value);
  const parts = [
    state.categories.length && `category in [${state.categories.map(text).join(", ")}]`,
    state.price && filters.has_price && `price <= ${state.price}`,
    state.radius && filters.has_locations && `within(${state.radius})`,
    state.open && filters.has_hours && (filters.has_zones ? "open_now" : `open_at(${text(now())})`),
  ];
  const chosen = parts.filter(Boolean);
  const own = state.where.trim();
  return [own && chosen.length ? `(${own})` : own, ...chosen].filter(Boolean).join(" and ") || undefined;
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
    popularity: state.popularity,
    diversity: state.diversity,
    ...extra,
  };
}
