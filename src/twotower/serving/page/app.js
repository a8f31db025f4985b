// Keeps the state of the page in the address, sends requests, and shows lists and map. Each change runs `go`, request, `show`.

import { api, ApiError } from "./api.js";
import { byPlace, History, Recommended } from "./cards.js";
import { compare, inWords } from "./changes.js";
import { Controls } from "./controls.js";
import { $, announce, count, h, placeIcons } from "./dom.js";
import { showReport } from "./report.js";
import { PlaceMap, placed } from "./map.js";
import { combobox } from "./search.js";
import { Details } from "./details.js";
import { filterOf, fromHash, requestOf, START, toHash } from "./url_state.js";
import { Tabs } from "./tabs.js";
import { banner, latency, ListStatus, offer } from "./list_status.js";

const MORE = 10; // items added by "Show 10 more"
const AROUND = 500; // items drawn in the background of the map
const RETRY_S = [2, 4, 8, 15];

let state = fromHash(location.hash);
let about = null;
let own = { user: null, events: [] }; // the user's history as the bundle knows it
let answer = null; // the last response, with the state it belongs to
let asking = null; // AbortController of the current request
let tries = 0;
const known = new Map(); // item id → item, for all items received so far

const lists = new ListStatus($("#list-state"), $("#list-column"));
const history = new History($("#history"), { open, drop });
const list = new Recommended($("#list"), { open, add, why });
const map = new PlaceMap($("#map"), { open, pin: (near) => go({ near }, near ? "setting the pin" : "removing the pin") });
const tabs = new Tabs({ tab: (tab) => go({ tab }, null) });
const details = new Details($("#details"), api, {
  add,
  ask: (place) => go({ near: [place.latitude, place.longitude] }, `moving the location to ${place.name}`),
  has,
  far,
});
let controls = null;

/** Changes the state. `cause` is what the user did, in words; null changes it without a request. */
function go(part, cause, { keep = false } = {}) {
  state = { ...state, ...part };
  const address = location.pathname + location.search + toHash(state);
  if (address !== location.pathname + location.search + location.hash)
    window.history[keep ? "replaceState" : "pushState"](null, "", address);
  details.close();
  if (cause !== null) return refresh(cause);
  $("#toast").hidden = true;
  return tabs.show(state);
}

function add(place) {
  if (has(place.item_id)) return;
  known.set(place.item_id, place);
  go({ added: [...state.added, place.item_id] }, `adding ${place.name}`);
  offer(`Added ${place.name}`, "Undo", () => drop(place.item_id));
}

function drop(id) {
  go({ added: state.added.filter((one) => one !== id) }, `removing ${known.get(id)?.name ?? id}`);
}

function has(id) {
  return state.added.includes(id) || own.events.some((event) => event.item_id === id);
}

function far(id) {
  return answer?.items.find((place) => place.item_id === id)?.distance_km;
}

function open(id) {
  details.open(id);
}

/** Shows known data at once and requests the rest. A newer change aborts the older request. */
async function refresh(cause) {
  clearTimeout(refresh.again);
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  const other = answer?.asked.user !== state.user;
  const asked = state;
  tabs.show(state);
  lists.busy();
  if (other) list.loading();
  if (own.user !== state.user) history.loading();
  try {
    about ??= await start();
    await Promise.all([look(signal), asked.user === own.user ? null : remember(asked.user, signal)]);
    if (signal.aborted) return;
    showHistory();
    const sent = performance.now();
    const found = await api.recommend(requestOf(asked, about.filters, { explain: list.wanted.size > 0 || undefined }), signal);
    if (signal.aborted) return;
    found.trip_ms = performance.now() - sent;
    tries = 0;
    show(found, asked, cause, other);
    ground(asked, signal);
  } catch (error) {
    if (!signal.aborted) fail(error, cause);
  }
}

async function start() {
  const found = await api.about();
  $("#catalogue").textContent = `${found.name} · ${count(found.items, found.noun, found.nouns)} · ${count(found.users, "user")}`;
  $("#place-find").placeholder = `Add by the name of the ${found.noun}`;
  $("#where").placeholder = found.filters.example;
  controls ??= new Controls($("#controls"), { filters: found.filters, change: (part, cause) => go(part, cause, { keep: true }) });
  tabs.hasMap(found.filters.has_locations);
  showReport($("#figures"), found);
  return found;
}

/** Requests the items named in the address. Removes those that are not in the catalogue from the address. */
async function look(signal) {
  const missing = state.added.filter((id) => !known.has(id));
  const gone = [];
  await Promise.all(
    missing.map(async (id) => {
      try {
        known.set(id, await api.item(id, signal));
      } catch (error) {
        if (error.status !== 404) throw error;
        gone.push(id);
      }
    }),
  );
  if (gone.length) {
    offer(`${count(gone.length, "item")} of this link ${gone.length === 1 ? "is" : "are"} not in the catalogue`);
    go({ added: state.added.filter((id) => !gone.includes(id)) }, "opening the link", { keep: true });
  }
}

async function remember(user, signal) {
  let events = [];
  try {
    if (user !== null) events = await api.history(user, signal);
  } catch (error) {
    if (error.status !== 404) throw error; // an unknown user has an empty history
  }
  if (!signal.aborted) own = { user, events };
}

function visits() {
  const added = state.added.map((id) => ({ ...known.get(id), item_id: id, added: true })).reverse();
  return [...added, ...byPlace(own.events)];
}

function showHistory() {
  const places = visits();
  const n = own.events.length + state.added.length;
  history.show(places);
  document.title = state.user ? `${state.user} · twotower` : "twotower";
  $("#history-note").textContent = state.user ? `of ${state.user}` : places.length ? "built by you" : "";
  tabs.counts({ history: n });
  const empty = h(
    "div",
    { class: "state small" },
    h("p", {}, h("b", {}, "No history yet.")),
    h("p", {}, `Pick a random user, or add ${about?.nouns ?? "items"} by name: the list updates with each. What you add is not stored.`),
  );
  $("#history-state").replaceChildren(...(places.length ? [] : [empty]));
  controls.show(state, Boolean(state.near) || places.some(placed));
}

function show(found, asked, cause, other) {
  const { filters } = about;
  const moved = !other ? compare(answer.items, found.items, { taken: asked.added, longer: asked.k > answer.asked.k }) : null;
  answer = { ...found, asked };
  const explained = list.wanted.size > 0;
  for (const place of found.items) {
    known.set(place.item_id, place);
    place.explained = explained;
  }
  banner(null);
  controls.refuse(null);
  list.show(found.items, { moves: moved?.moves, hasMap: filters.has_locations, scored: found.source === "model" });
  lists.done(found, { asked, filters, reset: () => $("#reset").click() });
  latency($("#latency"), found);
  told(moved, cause, found);
  $("#list-more").hidden = found.items.length < asked.k || asked.k >= AROUND;
  drawMap(other);
}

/** Shows what changed in the list, and announces it to screen readers. */
function told(moved, cause, found) {
  const box = $("#moved");
  box.hidden = !moved || !cause;
  const words = moved ? inWords(moved) : count(found.items.length, "recommendation");
  announce(moved ? `After ${cause}: ${words}` : `${words}${state.user ? ` for user ${state.user}` : ""}`);
  if (box.hidden) return;
  const gone = moved.gone
    .slice(0, 6)
    .map((place) => h("button", { type: "button", class: "chip", onclick: () => open(place.item_id) }, place.name));
  const rest = moved.gone.length - gone.length;
  box.replaceChildren(
    h("p", {}, `After ${cause}: `, h("b", {}, words)),
    ...(gone.length
      ? [h("p", { class: "chips" }, h("span", {}, "removed"), gone, rest > 0 && h("span", {}, `and ${rest} more`))]
      : []),
  );
}

function drawMap(refit) {
  const { asked, items } = answer;
  map.show(
    {
      recommended: items,
      history: visits(),
      visits: [...own.events, ...state.added.map((id) => known.get(id) ?? {})],
      near: asked.near,
      radius: about.filters.has_locations ? asked.radius : null,
    },
    { refit },
  );
  const on = items.filter(placed).length;
  $("#legend").replaceChildren(
    h("span", { class: "key best" }, `${on === items.length ? on : `${on} of ${items.length}`} recommended`),
    h("span", { class: "key visit" }, "history"),
    h("span", { class: "key other" }, "other items"),
  );
}

/** Requests, once for each user, many more items for the background of the map. Errors are ignored. */
async function ground(asked, signal) {
  if (!about.filters.has_locations || map.groundOf === asked.user) return;
  const wide = { ...START, user: asked.user, added: asked.added, near: asked.near, k: AROUND, seen: true };
  try {
    const { items } = await api.recommend(requestOf(wide, about.filters), signal);
    if (!signal.aborted) map.lay(items, asked.user);
  } catch {
    // The map is shown without a background.
  }
}

/** Sends the same request again with reasons, for the cards that show them. */
async function why() {
  const { asked } = answer;
  const { signal } = asking;
  try {
    const found = await api.recommend(requestOf(asked, about.filters, { explain: true }), signal);
    if (signal.aborted) return;
    const reasons = new Map(found.items.map((place) => [place.item_id, place.reasons]));
    for (const place of answer.items) Object.assign(place, { reasons: reasons.get(place.item_id), explained: true });
    for (const card of list.cards.values()) list.reasons(card);
  } catch (error) {
    if (!signal.aborted) fail(error, "requesting the reasons");
  }
}

/** Shows an error: a rejected request at the filters, a temporary error in the banner with a retry, any other error in the list. */
function fail(error, cause) {
  if (!(error instanceof ApiError)) throw error;
  lists.failed(answer !== null);
  if (!answer) list.root.replaceChildren();
  if (error.passing) {
    const wait = Math.max(error.wait_s ?? 0, RETRY_S[Math.min(tries++, RETRY_S.length - 1)]);
    refresh.again = setTimeout(() => refresh(cause), wait * 1000);
    return banner(error, { wait, retry: () => refresh(cause) });
  }
  banner(null);
  if (error.status === 422 && controls) controls.refuse(error, filterOf(state, about.filters));
  else lists.broken(error, () => refresh(cause));
  announce(error.message);
  if (controls) controls.show(state, true);
}

function listen() {
  placeIcons(document);
  $(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // the part after "#" is the state
    $("#list").focus();
  });
  $("#draw").addEventListener("click", async (event) => {
    const button = event.currentTarget;
    button.disabled = true;
    try {
      const drawn = await api.random();
      if (drawn) go({ user: drawn.user, added: [], k: START.k }, "picking a random user");
      else offer("This bundle has no users");
    } catch (error) {
      fail(error, "picking a random user");
    } finally {
      button.disabled = false;
      button.focus({ preventScroll: true });
    }
  });
  $("#empty").addEventListener("click", () => {
    go({ user: null, added: [], k: START.k }, "starting as a new user");
    if (matchMedia("(min-width: 821px)").matches) $("#place-find").focus();
  });
  $("#list-more").addEventListener("click", () => go({ k: Math.min(AROUND, state.k + MORE) }, "showing more", { keep: true }));
  combobox($("#user-find"), {
    find: (text, signal) => api.users(text, signal),
    draw: ({ user, events }) => [h("span", { class: "mono" }, user), h("small", {}, count(events, "event"))],
    pick: ({ user }) => go({ user, added: [], k: START.k }, "choosing a user"),
    nothing: (text) => (text ? `No user id contains “${text}”.` : "This bundle has no users."),
  });
  combobox($("#place-find"), {
    find: (text, signal) => api.items(text, signal),
    draw: (place) => [
      h("span", {}, place.name),
      h("small", {}, [place.categories?.slice(0, 2).join(", "), place.city].filter(Boolean).join(" · ")),
    ],
    pick: add,
    nothing: (text) => `No item name contains “${text}”.`,
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.closest("input, dialog, select") || state.tab !== "places") return;
    event.preventDefault();
    tabs.side("history");
    $("#place-find").focus();
  });
  window.addEventListener("popstate", () => {
    const before = state;
    state = fromHash(location.hash);
    if (toHash({ ...before, tab: state.tab }) === toHash(state)) tabs.show(state);
    else refresh("going back");
  });
  linked();
}

/** Highlights the item under the pointer or with the focus everywhere: its card, its marker, its event among the reasons. */
function linked() {
  const light = (event) => {
    const id = event.target.closest?.("[data-id]")?.dataset.id ?? null;
    if (id === linked.id) return;
    linked.id = id;
    for (const element of document.querySelectorAll(".card.lit, .reasons .lit")) element.classList.remove("lit");
    if (id)
      for (const element of document.querySelectorAll(`.card[data-id="${CSS.escape(id)}"], .reasons [data-id="${CSS.escape(id)}"]`))
        element.classList.add("lit");
    map.light(id);
  };
  document.addEventListener("pointerover", light);
  document.addEventListener("focusin", light);
}

listen();
refresh("opening the page");
