// The page: state in the address, requests out, lists and map in. Every change goes one way: `go`, address, request, `show`.

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

const MORE = 10; // places of one "more"
const AROUND = 500; // places of the catalogue that give the map its ground
const RETRY_S = [2, 4, 8, 15];

let state = fromHash(location.hash);
let about = null;
let own = { user: null, events: [] }; // the user's history as the bundle knows it
let answer = null; // the last list, with the state it answers
let asking = null; // what aborts the request under way
let tries = 0;
const known = new Map(); // item id → place, of whatever came by

const lists = new ListStatus($("#list-state"), $("#list-column"));
const history = new History($("#history"), { open, drop });
const list = new Recommended($("#list"), { open, add, why });
const map = new PlaceMap($("#map"), { open, pin: (near) => go({ near }, near ? "the pin was put" : "the pin was taken away") });
const tabs = new Tabs({ tab: (tab) => go({ tab }, null) });
const details = new Details($("#details"), api, {
  add,
  ask: (place) => go({ near: [place.latitude, place.longitude] }, `asking from ${place.name}`),
  has,
  far,
});
let controls = null;

/** The one way a state changes. `cause`: what the reader did, in words; null asks nobody. */
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
  go({ added: state.added.filter((one) => one !== id) }, `taking out ${known.get(id)?.name ?? id}`);
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

/** Shows what is known at once, asks for the rest. A newer change gives up the older request. */
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
  $("#catalogue").textContent = `${found.name} · ${count(found.items, "place")} · ${count(found.users, "user")}`;
  controls ??= new Controls($("#controls"), { filters: found.filters, change: (part, cause) => go(part, cause, { keep: true }) });
  tabs.hasMap(found.filters.has_locations);
  showReport($("#figures"), found);
  return found;
}

/** Learns the names of places that came with the address; those that this catalogue does not have leave it again. */
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
    offer(`${count(gone.length, "place")} of this link ${gone.length === 1 ? "is" : "are"} not in the catalogue`);
    go({ added: state.added.filter((id) => !gone.includes(id)) }, "opening the link", { keep: true });
  }
}

async function remember(user, signal) {
  let events = [];
  try {
    if (user !== null) events = await api.history(user, signal);
  } catch (error) {
    if (error.status !== 404) throw error; // nobody the bundle knows: an empty history
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
  $("#history-note").textContent = state.user ? `of ${state.user}` : places.length ? "made by you" : "";
  tabs.counts({ history: n });
  const empty = h(
    "div",
    { class: "state small" },
    h("p", {}, h("b", {}, "Nobody has been anywhere yet.")),
    h("p", {}, "Draw a user, or search a place you like: the list answers to every place you add. Nothing you add is stored."),
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

/** Says what moved, on the page and to screen readers. */
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
      ? [h("p", { class: "chips" }, h("span", {}, "gone"), gone, rest > 0 && h("span", {}, `and ${rest} more`))]
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
    h("span", { class: "key other" }, "other places"),
  );
}

/** Asks once for each asker for many more places: they are the ground of the map. Nothing is said when it fails. */
async function ground(asked, signal) {
  if (!about.filters.has_locations || map.groundOf === asked.user) return;
  const wide = { ...START, user: asked.user, added: asked.added, near: asked.near, k: AROUND, seen: true };
  try {
    const { items } = await api.recommend(requestOf(wide, about.filters), signal);
    if (!signal.aborted) map.lay(items, asked.user);
  } catch {
    // The map goes without.
  }
}

/** Asks the same again with reasons, for the cards that want them. */
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
    if (!signal.aborted) fail(error, "asking why");
  }
}

/** Each error has its place: a refused request at the filters, a passing one in the banner with its next try, the rest in the list. */
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
      if (drawn) go({ user: drawn.user, added: [], k: START.k }, "drawing a user");
      else offer("This catalogue has no users");
    } catch (error) {
      fail(error, "drawing a user");
    } finally {
      button.disabled = false;
      button.focus({ preventScroll: true });
    }
  });
  $("#empty").addEventListener("click", () => {
    go({ user: null, added: [], k: START.k }, "starting empty");
    if (matchMedia("(min-width: 821px)").matches) $("#place-find").focus();
  });
  $("#list-more").addEventListener("click", () => go({ k: Math.min(AROUND, state.k + MORE) }, "showing more", { keep: true }));
  combobox($("#user-find"), {
    find: (text, signal) => api.users(text, signal),
    draw: ({ user, events }) => [h("span", { class: "mono" }, user), h("small", {}, count(events, "visit"))],
    pick: ({ user }) => go({ user, added: [], k: START.k }, "choosing a user"),
    nothing: (text) => (text ? `No user has “${text}” in the id.` : "This catalogue has no users."),
  });
  combobox($("#place-find"), {
    find: (text, signal) => api.items(text, signal),
    draw: (place) => [
      h("span", {}, place.name),
      h("small", {}, [place.categories?.slice(0, 2).join(", "), place.city].filter(Boolean).join(" · ")),
    ],
    pick: add,
    nothing: (text) => `No place has “${text}” in its name.`,
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

/** A place pointed at, or with the focus, is lit wherever it is shown: its card, its marker, the visit among the reasons. */
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
