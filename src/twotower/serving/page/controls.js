// Shows the filters and settings. Takes the filters of the catalogue (/v1/about) and the state, and reports changes of the state
// with a description in words. A control that the catalogue does not support is hidden.

import { $, h, settled } from "./dom.js";
import { now, RADII, tuned, untuned } from "./url_state.js";

const PAUSE_MS = 140; // wait until a slider rests before sending a request

export class Controls {
  /** `change(part of the state, words)`. */
  constructor(form, { filters, change }) {
    Object.assign(this, { form, filters, change });
    this.categories = (filters.categories ?? []).map((one) => one.name ?? one);
    for (const [name, there] of Object.entries({
      categories: this.categories.length,
      price: filters.has_price,
      radius: filters.has_locations,
      open: filters.has_hours,
    }))
      $(`[data-filter=${name}]`, form).hidden = !there;
    $("#category-list").append(
      ...this.categories.map((name) =>
        h("label", { class: "check" }, h("input", { type: "checkbox", name: "category", value: name }), h("span", {}, name)),
      ),
    );
    this.listen();
  }

  listen() {
    const { form } = this;
    const on = (selector, event, act) => $(selector, form).addEventListener(event, act);
    form.addEventListener("submit", (event) => event.preventDefault());
    on("#category-list", "change", () => {
      const chosen = [...form.querySelectorAll("[name=category]:checked")].map((box) => box.value);
      this.change({ categories: chosen }, "changing the categories");
    });
    on("#category-find", "input", (event) => {
      const text = event.target.value.trim().toLowerCase();
      for (const label of $("#category-list").children) label.hidden = !label.textContent.toLowerCase().includes(text);
    });
    on("[data-filter=price]", "change", (event) => this.change({ price: Number(event.target.value) || null }, "changing price"));
    on("#open", "change", (event) => this.change({ open: event.target.checked }, "changing “open now”"));
    on("#seen", "change", (event) => this.change({ seen: event.target.checked }, "changing “include seen items”"));
    on("#where", "change", (event) => this.change({ where: event.target.value.trim() }, "changing the filter"));
    on("#where", "keydown", (event) => event.key === "Enter" && event.target.blur());
    this.slider("#radius", (value) => ({ radius: RADII[value] }), "changing the radius");
    this.slider("#popularity", (value) => ({ popularity: value }), "changing the popularity");
    this.slider("#diversity", (value) => ({ diversity: value }), "changing the diversity");
    on("#reset", "click", () => this.change(untuned({}), "resetting everything"));
    popover($("#category-button"), $("#category-panel"), $("#category-find"));
  }

  slider(selector, part, words) {
    const input = $(selector, this.form);
    const send = settled(() => this.change(part(Number(input.value)), words), PAUSE_MS);
    input.addEventListener("input", () => {
      this.say(part(Number(input.value)));
      send();
    });
  }

  /** Sets every control from the state. `measured`: whether there is a location to measure a radius from. */
  show(state, measured) {
    const { form } = this;
    for (const box of form.querySelectorAll("[name=category]")) box.checked = state.categories.includes(box.value);
    const others = state.categories.length - 1;
    $("#category-button .value").textContent =
      others < 0 ? "Any category" : others ? `${state.categories[0]} +${others}` : state.categories[0];
    for (const radio of form.querySelectorAll("[name=price]")) radio.checked = Number(radio.value) === (state.price ?? 0);
    $("#open").checked = state.open;
    $("#open-now").textContent = state.open ? (this.filters.has_zones ? "local time" : now()) : "";
    $("#seen").checked = state.seen;
    if (document.activeElement !== $("#where")) $("#where").value = state.where;
    const radius = $("#radius");
    radius.disabled = !measured && !state.radius;
    radius.value = RADII.indexOf(state.radius);
    $("#radius-hint").hidden = !radius.disabled;
    $("#popularity").value = state.popularity;
    $("#diversity").value = state.diversity;
    this.say(state);
    const away = tuned(state);
    $("#reset").hidden = !away;
    $("#tuned").textContent = away ? String(away) : "";
  }

  /** Shows the values of the sliders in words, also while they move. */
  say({ radius, popularity, diversity }) {
    const tell = (selector, words) => {
      $(`${selector}-value`).textContent = words;
      $(selector).setAttribute("aria-valuetext", words);
    };
    if (radius !== undefined) tell("#radius", radius ? `within ${radius} km` : "anywhere");
    if (popularity !== undefined)
      tell(
        "#popularity",
        popularity ? `${popularity < 0 ? "rarer" : "more popular"} ${Math.round(Math.abs(popularity) * 100)} %` : "as trained",
      );
    if (diversity !== undefined) tell("#diversity", diversity ? `${Math.round(diversity * 100)} %` : "best first");
  }

  /** Shows why the server rejected the filter, with a mark under the character if its position is known. */
  refuse(error, text) {
    const box = $("#refusal");
    box.hidden = !error;
    if (!error) return;
    const place = /\d+/.exec(String(error.location ?? ""))?.[0];
    const marked = place && text ? h("pre", {}, `${text}\n${" ".repeat(Math.max(0, Number(place) - 1))}^`) : null;
    box.replaceChildren(h("b", {}, "The request was rejected. "), error.message, ...(marked ? [marked] : []));
  }
}

/** A panel that a button opens. Esc closes it and returns the focus; a click or focus elsewhere closes it too. */
export function popover(button, panel, first) {
  const set = (open) => {
    panel.hidden = !open;
    button.setAttribute("aria-expanded", String(open));
    if (open) first.focus();
  };
  button.addEventListener("click", () => set(panel.hidden));
  panel.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    set(false);
    button.focus();
  });
  for (const name of ["pointerdown", "focusin"])
    document.addEventListener(name, (event) => {
      if (!panel.hidden && !panel.contains(event.target) && !button.contains(event.target)) set(false);
    });
}
