// Joins the parts of the page: the session, which requests, and the views, which show. What the first list does not need is loaded
// after it: filters, details, map, evaluation and operations.

import { api } from "./api.js";
import { inWords } from "./changes.js";
import { $, announce, h } from "./dom.js";
import { count, countItems, noun, setNoun } from "./format.js";
import { byItem, History, skeletons } from "./history.js";
import { banner, ListStatus, offer } from "./list_status.js";
import { Recommended } from "./recommended.js";
import { Session } from "./session.js";
import { Sheets } from "./sheets.js";
import { Tabs } from "./tabs.js";
import { MOST, quoted, START, someone } from "./url_state.js";

const MORE = 10; // items added by "Show 10 more"
const GONE = 6; // removed items that are named

const located = (item) => Number.isFinite(item.latitude) && Number.isFinite(item.longitude);
const tabs = new Tabs({ tab: (tab) => session.go({ tab }, null) });
const lists = new ListStatus($("#list-state"), $("#list-column"));
const history = new History($("#history"), { open, drop });
const list = new Recommended($("#list"), { open, add, hide, avoid, context });
const session = new Session({ busy, ready, history: showHistory, list: showList, facts, effects, gone, tab: showTab, failed });
const sheets = new Sheets($("#sheet"), { opened: (name) => name === "map-column" && drawMap(true), closed: () => map?.resize() });
let controls = null;
let details = null; // Details, once one was opened
let map = null; // ItemMap, once it is visible

function change(part, cause) {
  session.go(part, cause, { keep: true });
}

function add(item) {
  if (session.has(item.item_id)) return;
  closeDialogs();
  session.known.set(item.item_id, item);
  session.go({ added: [...session.state.added, item.item_id] }, `adding ${item.name}`);
  offer(`Added ${item.name} to the history`, "Undo", () => drop(item.item_id));
}

function drop(id) {
  const name = session.known.get(id)?.name ?? id;
  session.go({ added: session.state.added.filter((one) => one !== id) }, `removing ${name}`);
}

/** Excludes an item on this page only: the model learns from events that people chose, and this is none. */
function hide(item) {
  const { hidden } = session.state;
  session.go({ hidden: [...hidden, item.item_id] }, `hiding ${item.name}`);
  offer(`${item.name} is hidden`, "Undo", () => change({ hidden }, `showing ${item.name}`));
}

function avoid(category) {
  const { conditions } = session.state;
  const column = session.about?.filters.categories.length ? "category" : null;
  if (!column) return;
  session.go({ conditions: [...conditions, `category not in [${quoted(category)}]`] }, `leaving out ${category}`);
  offer(`No more ${category}`, "Undo", () => change({ conditions }, `allowing ${category}`));
}

/** What sentences about reasons need to know. */
function context() {
  const { added, near } = session.state;
  const rated = new Map(
    session.own.events.filter((event) => Number.isFinite(event.stars)).map((event) => [event.item_id, event.stars]),
  );
  return { stars: (id) => rated.get(id) ?? 0, added, near: Boolean(near), levels: session.about?.filters.has_price };
}

async function open(id) {
  if (!details) {
    const { Details } = await import("./details.js");
    details ??= new Details($("#details"), api, {
      add,
      ask: (item) => {
        closeDialogs();
        session.go({ near: [item.latitude, item.longitude] }, `moving the pin to ${item.name}`);
      },
      has: (one) => session.has(one),
      far: (one) => session.answer?.items.find((item) => item.item_id === one)?.distance_km,
      levels: () => session.about?.filters.has_price,
    });
  }
  details.open(id);
}

function closeDialogs() {
  details?.close();
  sheets.close();
}

function busy({ other, person }) {
  showTab();
  lists.busy();
  if (other) list.loading(session.state.k);
  if (!person) return;
  history.loading();
  $("#history-state").replaceChildren();
}

function ready(about) {
  setNoun(about.noun, about.nouns);
  $("#catalogue").textContent = `${about.name} · ${countItems(about.items)} · ${count(about.users, "user")}`;
  $("#item-find").placeholder = $("#item-find-label").textContent =
    `Add ${/^[aeiou]/.test(noun.one) ? "an" : "a"} ${noun.one} by name`;
  document.documentElement.dataset.map = about.filters.has_locations ? "yes" : "no";
  import("./controls.js").then(({ Controls }) => {
    controls ??= new Controls($("#controls"), { filters: about.filters, api, change });
    showControls();
    document.documentElement.dataset.ready = "yes";
  });
  showTab();
}

function showControls() {
  controls?.show(session.state, Boolean(session.state.near) || session.events.some(located));
}

async function showTab() {
  const { tab } = session.state;
  tabs.show(session.state);
  $("#toast").hidden = true;
  if (tab === "evaluation" && session.about) (await import("./report.js")).showReport($("#evaluation"), session.about);
  if (tab === "operations") (await import("./operations.js")).showOperations($("#operations"), api);
  else $("#operations").replaceChildren(); // it asks the server again and again while it is shown
}

function showHistory() {
  const { state, events } = session;
  const added = state.added.map((id) => ({ ...session.known.get(id), item_id: id, added: true })).reverse();
  const items = [...added, ...byItem(session.own.events)];
  history.show(items);
  document.title = state.user ? `${state.user} · twotower` : "twotower";
  $("#history-note").textContent = state.user ? `of ${state.user}` : items.length ? "built by you" : "\u00a0"; // keeps its line
  $("#user-find").placeholder = state.user ?? "Find a user by id";
  Sheets.mark("history-column", events.length);
  const empty = h(
    "div",
    { class: "state small" },
    h("p", {}, h("b", {}, "No history yet.")),
    h("p", {}, `Pick a random user, or add ${noun.many} by name: the list follows. What you add is not stored.`),
  );
  $("#history-state").replaceChildren(...(items.length ? [] : [empty]));
  showControls();
}

/** `kin`: the list before came from the same source for the same user, so that marks of change mean something. */
function showList(moved, cause, kin) {
  const { answer, about, state } = session;
  banner(null);
  controls?.refuse(null);
  list.show(answer.items, { moves: kin ? moved.moves : null, filters: about.filters, scored: answer.source === "model" });
  lists.done(answer, { state: answer.state, reset: () => $("#reset").click() });
  $("#list-title").textContent = state.user || state.added.length ? "For you" : "Popular";
  showChanges(moved, cause, answer);
  $("#list-more").hidden = answer.items.length < answer.state.k || answer.state.k >= MOST;
  import("./response.js").then(({ showResponse }) => showResponse($("#response"), answer, session.filter));
  const refit = moved === null;
  if (map) drawMap(refit);
  else later(() => drawMap(refit));
}

/** Runs `act` when the browser has nothing more urgent to do. */
const later = (act) => (window.requestIdleCallback ? requestIdleCallback(act, { timeout: 1000 }) : setTimeout(act, 50));

function facts(items) {
  for (const { item_id } of items) {
    list.facts.set(item_id, session.columns.get(item_id));
    list.fact(item_id);
  }
}

function effects(changes) {
  controls?.effects(changes);
  const words = Object.values(changes).filter(Boolean);
  if (words.length) announce(words.map((one) => `${one.changed} of ${countItems(one.of)} changed`).join(", "));
}

/** Shows what changed in the list, and announces it to screen readers. */
function showChanges(moved, cause, { items }) {
  const words = moved ? inWords(moved) : count(items.length, "recommendation");
  announce(moved ? `After ${cause}: ${words}` : `${words}${session.state.user ? ` for user ${session.state.user}` : ""}`);
  if (!moved) return $("#moved").replaceChildren();
  const gone = moved.gone
    .slice(0, GONE)
    .map((item) => h("button", { type: "button", class: "chip", onclick: () => open(item.item_id) }, item.name));
  const rest = moved.gone.length - gone.length;
  const removed = h("details", {}, h("summary", {}, "which"), h("p", { class: "chips" }, gone, rest > 0 && `and ${rest} more`));
  $("#moved").replaceChildren(
    h("span", { title: `After ${cause}` }, `After ${cause}: `, h("b", {}, words)),
    ...(gone.length ? [removed] : []),
  );
}

function gone(n) {
  offer(`${countItems(n)} of this link ${n === 1 ? "is" : "are"} not in the catalogue`);
}

/** Draws the map if it is visible. Its library is loaded the first time. */
async function drawMap(refit) {
  const { answer, about } = session;
  if (!answer || !about?.filters.has_locations || !$("#map").checkVisibility()) return;
  const { ItemMap } = await import("./map.js");
  map ??= new ItemMap($("#map"), { open, pin: (near) => session.go({ near }, near ? "setting the pin" : "removing the pin") });
  const { state, items } = session.answer;
  const events = session.events.filter(located);
  map.show(
    { recommended: items.filter(located), history: byItem(events), events, near: state.near, radius: state.radius },
    { refit },
  );
  map.ground(state.user, () => session.around());
  const on = items.filter(located).length;
  $("#legend").replaceChildren(
    h(
      "span",
      { class: "key best" },
      on === items.length ? `${on} recommended` : `${on} of ${items.length} recommended have a location`,
    ),
    h("span", { class: "key event" }, "history"),
    h("span", { class: "key other" }, `other ${noun.many}`),
  );
}

/** Shows an error: a rejected request at the filters, a temporary error in the banner with a retry, any other error in the list. */
function failed(error, cause, wait) {
  const again = () => session.refresh(cause);
  lists.failed(session.answer !== null);
  if (!session.answer && !session.given) list.root.replaceChildren();
  banner(wait === null ? null : error, { wait, retry: again });
  if (wait !== null) return;
  if (error.status === 422 && controls && session.filter) controls.refuse(error, session.filter);
  else lists.broken(error, again);
  announce(error.message);
  showControls();
}

async function listen() {
  $(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // the part after "#" is the state
    $("#list").focus();
  });
  $("#draw").addEventListener("click", async (event) => {
    const button = event.currentTarget;
    button.disabled = true;
    try {
      const drawn = await api.random();
      if (drawn) session.go(someone(drawn.user), "picking a random user");
      else offer("This bundle has no users");
    } catch (error) {
      session.fail(error, "picking a random user");
    } finally {
      button.disabled = false;
      button.focus({ preventScroll: true });
    }
  });
  $("#empty").addEventListener("click", () => session.go(someone(null), "starting as a new user"));
  $("#list-more").addEventListener("click", () =>
    session.go({ k: Math.min(MOST, session.state.k + MORE) }, "showing more", { keep: true }),
  );
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.closest("input, dialog, select") || session.state.tab !== START.tab) return;
    event.preventDefault();
    if ($("#item-find").checkVisibility()) $("#item-find").focus();
  });
  linked();
  const { combobox } = await import("./search.js");
  combobox($("#user-find"), {
    find: (text, signal) => api.users(text, signal),
    draw: ({ user, events }) => [h("span", { class: "mono" }, user), h("small", {}, count(events, "event"))],
    pick: ({ user }) => session.go(someone(user), "choosing a user"),
    nothing: (text) => (text ? `No user id contains “${text}”.` : "This bundle has no users."),
  });
  combobox($("#item-find"), {
    find: (text, signal) => api.items(text, signal),
    draw: (item) => [
      h("span", {}, item.name),
      h("small", {}, [item.categories?.slice(0, 2).join(", "), item.city].filter(Boolean).join(" · ")),
    ],
    pick: add,
    nothing: (text) => `No ${noun.one} has “${text}” in its name.`,
  });
}

/** Highlights the item under the pointer or with the focus everywhere: its card, its marker, its event among the reasons. */
function linked() {
  let last = null;
  const light = (event) => {
    const id = event.target.closest?.("[data-id]")?.dataset.id ?? null;
    if (id === last) return;
    last = id;
    for (const element of document.querySelectorAll(".card.lit, .reasons .lit")) element.classList.remove("lit");
    const same = id ? `[data-id="${CSS.escape(id)}"]` : null;
    for (const element of same ? document.querySelectorAll(`.card${same}, .reasons ${same}`) : []) element.classList.add("lit");
    map?.light(id);
  };
  document.addEventListener("pointerover", light);
  document.addEventListener("focusin", light);
}

/** Takes over the list that came with the page, or makes room for the one of the address. */
function begin() {
  delete document.documentElement.dataset.linked;
  if (session.given) return list.adopt(session.given.items);
  list.root.replaceChildren(...skeletons(START.k));
  $("#list-title").textContent = "For you";
  $("#list-note").textContent = "\u00a0";
}

begin();
listen();
session.refresh("opening the page");
