// Shows the filters and settings. Takes the filters of the catalogue (/v1/about) and the state, and reports changes of the state
// with a description in words. A control that the catalogue does not support is hidden.

import { Builder, conditionWords } from "./builder.js";
import { $, h, icon, settled } from "./dom.js";
import { countItems, noun } from "./format.js";
import { popover } from "./popover.js";
import { Sheets } from "./sheets.js";
import { now, RADII, tuned, untuned } from "./url_state.js";

const PAUSE_MS = 140; // wait until a slider rests before sending a request

export class Controls {
  /** `change(part of the state, words)`. */
  constructor(form, { filters, change, api }) {
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
    this.builder = new Builder($("#builder"), { filters, api, add: (text) => this.condition(text) });
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
    on("[data-filter=price]", "change", (event) =>
      this.change({ price: Number(event.target.value) || null }, "changing the price"),
    );
    on("#open", "change", (event) => this.change({ open: event.target.checked }, "changing “open now”"));
    on("#seen", "change", (event) => this.change({ seen: event.target.checked }, "changing “include known ones”"));
    this.slider("#radius", (value) => ({ radius: RADII[value] }), "changing the radius");
    this.slider("#popularity_bias", (value) => ({ popularity_bias: value }), "changing the popularity bias");
    this.slider("#diversity", (value) => ({ diversity: value }), "changing the diversity");
    popover($("#category-button"), $("#category-panel"), () => $("#category-find"));
    popover($("#builder-button"), $("#builder"), () => this.builder.opened());
    $("#reset").addEventListener("click", () => this.change(untuned({}), "resetting everything"));
  }

  slider(selector, part, words) {
    const input = $(selector, this.form);
    const send = settled(() => this.change(part(Number(input.value)), words), PAUSE_MS);
    input.addEventListener("input", () => {
      this.say(part(Number(input.value)));
      send();
    });
  }

  condition(text) {
    const { conditions } = this.state;
    if (!conditions.includes(text)) this.change({ conditions: [...conditions, text] }, "adding a filter");
  }

  /** Sets every control from the state. `measured`: whether there is a location to measure a radius from. */
  show(state, measured) {
    const { form } = this;
    this.state = state;
    for (const box of form.querySelectorAll("[name=category]")) box.checked = state.categories.includes(box.value);
    const others = state.categories.length - 1;
    $("#category-text").textContent = others < 0 ? "Any" : others ? `${state.categories[0]} +${others}` : state.categories[0];
    for (const radio of form.querySelectorAll("[name=price]")) radio.checked = Number(radio.value) === (state.price ?? 0);
    $("#open").checked = state.open;
    $("#open-now").textContent = state.open ? (this.filters.has_zones ? "local time" : now()) : "";
    $("#seen").checked = state.seen;
    const radius = $("#radius");
    radius.disabled = !measured && !state.radius;
    radius.value = RADII.indexOf(state.radius);
    $("#radius-hint").textContent = radius.disabled ? "needs a history or a pin" : "";
    $("#popularity_bias").value = state.popularity_bias;
    $("#diversity").value = state.diversity;
    this.say(state);
    this.chips(state);
    Sheets.mark("controls", tuned(state));
  }

  /** Shows the conditions and what is hidden, each with a button that removes it. */
  chips(state) {
    const drop = (words, act, edit) =>
      h(
        "li",
        { class: "chip" },
        edit ? h("button", { type: "button", class: "link", title: "Edit", onclick: edit }, words) : h("span", {}, words),
        h("button", { type: "button", class: "quiet", "aria-label": `Remove: ${words}`, onclick: act }, icon("close")),
      );
    const left = (text) => state.conditions.filter((one) => one !== text);
    const chips = state.conditions.map((text) =>
      drop(
        conditionWords(text),
        () => this.change({ conditions: left(text) }, "removing a filter"),
        () => this.builder.edit(text, () => this.change({ conditions: left(text) }, "editing a filter")),
      ),
    );
    if (state.hidden.length)
      chips.push(
        drop(`${countItems(state.hidden.length)} hidden`, () => this.change({ hidden: [] }, `showing hidden ${noun.many}`)),
      );
    if (state.near) chips.push(drop("Around the pin", () => this.change({ near: null }, "removing the pin")));
    $("#chips").replaceChildren(...chips);
    $("#chips").hidden = !chips.length;
    $("#reset").hidden = !tuned(state);
  }

  /** Shows the values of the sliders in words, also while they move. */
  say({ radius, popularity_bias: bias, diversity }) {
    const tell = (selector, short, words = short) => {
      $(`${selector}-value`).textContent = short;
      $(selector).setAttribute("aria-valuetext", words);
    };
    const percent = (value) => `${Math.round(Math.abs(value) * 100)} %`;
    if (radius !== undefined) tell("#radius", radius ? `within ${radius} km` : "anywhere");
    if (bias !== undefined) {
      const way = bias < 0 ? "rarer" : "more popular";
      if (bias) tell("#popularity_bias", `${bias < 0 ? "−" : "+"}${percent(bias)}`, `${way} ${percent(bias)}`);
      else tell("#popularity_bias", "learned", "as learned");
    }
    if (diversity !== undefined) tell("#diversity", diversity ? percent(diversity) : "off");
  }

  /** Shows how many items of the list a setting changed; null: it has its default. */
  effects(changes) {
    for (const [name, effect] of Object.entries(changes)) {
      const line = $(`#${name}-effect`);
      line.classList.toggle("changed", effect !== null);
      $("output", line).textContent = effect ? `${effect.changed} of ${effect.of} changed` : "";
    }
  }

  /** Shows why the server rejected the filter, with a mark under the character if its position is known. */
  refuse(error, text) {
    const box = $("#refusal");
    box.hidden = !error;
    if (!error) return;
    const at = /\d+/.exec(String(error.location ?? ""))?.[0];
    const marked = at && text ? h("pre", {}, `${text}\n${" ".repeat(Math.max(0, Number(at) - 1))}^`) : null;
    box.replaceChildren(h("b", {}, "The request was rejected. "), error.message, ...(marked ? [marked] : []));
  }
}
