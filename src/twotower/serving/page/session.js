// Keeps the state of the page in the address and sends the requests. What is shown is up to `view`; each change of the state runs
// `go`, then the requests, then the functions of `view`.

import { api, ApiError, listOfPage } from "./api.js";
import { changed, compare } from "./changes.js";
import { filterOf, fromHash, MOST, requestOf, START, toHash, unfiltered } from "./url_state.js";

const RETRY_S = [2, 4, 8, 15];
const SLIDERS = ["popularity_bias", "diversity"];

/** Milliseconds from the request of the page to the end of its response. */
function tripOfPage() {
  const [page] = performance.getEntriesByType("navigation");
  return page.responseEnd - page.requestStart;
}

export class Session {
  /**
   * `view`: `busy({other, person})` before a request, `ready(about)` once, `history()`, `list(moved, cause, other)`,
   * `facts(items)` with the columns of the listed items, `effects(changes)`, `gone(n)` unknown items of the address,
   * `tab()`, and `failed(error, cause, wait)`: `wait` seconds until the next try, null if there is none.
   */
  constructor(view) {
    Object.assign(this, { view, state: fromHash(location.hash), about: null, answer: null, asking: null, tries: 0 });
    this.own = { user: null, events: [] }; // the user's history as the bundle knows it
    this.known = new Map(); // item id → item, for all items received so far
    this.columns = new Map(); // item id → columns
    this.given = toHash(this.state) === "" ? listOfPage() : null; // the first list, until it is shown
    window.addEventListener("popstate", () => {
      const before = this.state;
      this.state = fromHash(location.hash);
      if (toHash({ ...before, tab: this.state.tab }) === toHash(this.state)) this.view.tab();
      else this.refresh("going back");
    });
  }

  /** Changes the state. `cause` is what the user did, in words; null changes it without a request. */
  go(part, cause, { keep = false } = {}) {
    this.state = { ...this.state, ...part };
    const address = location.pathname + location.search + toHash(this.state);
    if (address !== location.pathname + location.search + location.hash)
      window.history[keep ? "replaceState" : "pushState"](null, "", address);
    if (cause === null) return this.view.tab();
    return this.refresh(cause);
  }

  has(id) {
    return this.state.added.includes(id) || this.own.events.some((event) => event.item_id === id);
  }

  /** All events of the history, the added items last. */
  get events() {
    return [...this.own.events, ...this.state.added.map((id) => ({ ...this.known.get(id), item_id: id, added: true }))];
  }

  /** Shows known data at once and requests the rest. A newer change aborts the older request. */
  async refresh(cause) {
    clearTimeout(this.again);
    this.asking?.abort();
    this.asking = new AbortController();
    const { signal } = this.asking;
    const { state } = this;
    const other = this.answer?.state.user !== state.user;
    if (toHash(state) !== "") this.given = null;
    const { given } = this;
    if (!given) this.view.busy({ other, person: this.own.user !== state.user });
    try {
      const sent = performance.now();
      const early = !given && this.about === null && unfiltered(state) ? api.recommend(requestOf(state, {}), signal) : null;
      early?.catch(() => null); // its error is met below
      if (this.about === null) {
        this.about = await api.about(signal);
        this.view.ready(this.about);
      }
      await Promise.all([this.look(signal), state.user === this.own.user ? null : this.remember(state.user, signal)]);
      if (signal.aborted) return;
      this.view.history();
      const found = given ?? (await (early ?? api.recommend(requestOf(state, this.about.filters), signal)));
      if (signal.aborted) return;
      found.trip_ms = given ? tripOfPage() : performance.now() - sent;
      this.given = null;
      this.show(found, state, cause, other);
      this.facts(found.items, signal);
      this.effects(state, found.items, signal);
    } catch (error) {
      if (!signal.aborted) this.fail(error, cause);
    }
  }

  show(found, state, cause, other) {
    const before = this.answer;
    const kin = !other && before.items.length > 0 && before.source === found.source; // else all would be new
    const how = { taken: [...state.added, ...state.hidden], longer: other ? false : state.k > before.state.k };
    this.tries = 0;
    this.answer = { ...found, state };
    for (const item of found.items) this.known.set(item.item_id, item);
    const moved = other ? null : compare(before.items, found.items, how);
    this.view.list(moved, cause, kin);
  }

  /** Requests the items named in the address. Removes those that are not in the catalogue from the address. */
  async look(signal) {
    const missing = this.state.added.filter((id) => !this.known.has(id));
    if (!missing.length) return;
    for (const item of await api.itemsOf(missing, signal)) this.known.set(item.item_id, item);
    const gone = missing.filter((id) => !this.known.has(id));
    if (!gone.length || signal.aborted) return;
    this.view.gone(gone.length);
    this.go({ added: this.state.added.filter((id) => !gone.includes(id)) }, "opening the link", { keep: true });
  }

  async remember(user, signal) {
    let events = [];
    try {
      if (user !== null) events = await api.history(user, signal);
    } catch (error) {
      if (error.status !== 404) throw error; // an unknown user has an empty history
    }
    if (!signal.aborted) this.own = { user, events };
  }

  /** Requests prices and opening hours of the listed items, once for each. The list is complete without them. */
  async facts(items, signal) {
    const { has_price, has_amounts, has_hours } = this.about.filters;
    const wanted = items.map((item) => item.item_id).filter((id) => !this.columns.has(id));
    if (!(has_price || has_amounts || has_hours)) return;
    try {
      for (const item of wanted.length ? await api.itemsOf(wanted, signal) : []) this.columns.set(item.item_id, item.columns);
      if (!signal.aborted) this.view.facts(items);
    } catch {
      // The cards stay without price and opening hours.
    }
  }

  /** Requests the list without each of these settings that is changed, to count the items that it changed. */
  async effects(state, items, signal) {
    const moved = SLIDERS.filter((name) => state[name] !== START[name]);
    const changes = Object.fromEntries(SLIDERS.map((name) => [name, null]));
    try {
      const requests = moved.map((name) => requestOf({ ...state, [name]: START[name] }, this.about.filters, { explain: false }));
      const answers = moved.length ? await api.several(requests, signal) : [];
      for (const [n, name] of moved.entries())
        if (answers[n].items) changes[name] = { changed: changed(answers[n].items, items), of: items.length };
    } catch {
      // The page shows no numbers then.
    }
    if (!signal.aborted) this.view.effects(changes);
  }

  /** Many more items for the ground of the map: those nearest to the taste of the user. */
  around(signal) {
    const { user, added, near } = this.answer.state;
    return api.recommend(requestOf({ ...START, user, added, near, k: MOST, seen: true }, this.about.filters), signal);
  }

  get filter() {
    return filterOf(this.state, this.about?.filters ?? {});
  }

  /** A temporary error is followed by the same request; any other error is shown until the user does something. */
  fail(error, cause) {
    if (!(error instanceof ApiError)) throw error;
    let wait = null;
    if (error.passing) {
      wait = Math.max(error.wait_s ?? 0, RETRY_S[Math.min(this.tries++, RETRY_S.length - 1)]);
      this.again = setTimeout(() => this.refresh(cause), wait * 1000);
    }
    this.view.failed(error, cause, wait);
  }
}
