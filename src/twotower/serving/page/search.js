// A search field with results below, for users and items. Arrow keys move, Enter selects, Esc closes the list or clears the field.

import { h, settled } from "./dom.js";

const listOf = (input) => document.getElementById(input.getAttribute("aria-controls"));

/**
 * @param input the field; its aria-controls names the list
 * @param find (text, signal) → options
 * @param draw option → children of its line
 * @param pick called with the option chosen
 * @param nothing text → the sentence for no result; null: the list closes
 * @param list where the options are shown; by default the element that aria-controls names
 * @param choosing false: Enter takes an option only if one is marked, so that the field can have its own text
 */
export function combobox(input, { find, draw, pick, nothing, choosing = true, list = listOf(input) }) {
  let options = [];
  let active = -1;
  let newest = null;
  let pending = false; // a search for the typed text is under way
  let entered = false; // Enter was pressed: select the first result when it arrives

  const lines = () => [...list.querySelectorAll("[role=option]")];
  const mark = (n) => {
    active = n;
    for (const [m, line] of lines().entries()) line.setAttribute("aria-selected", String(m === n));
    input.setAttribute("aria-activedescendant", n < 0 ? "" : lines()[n].id);
    lines()[n]?.scrollIntoView({ block: "nearest" });
  };
  const open = (...children) => {
    list.replaceChildren(...children);
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
  };
  const close = () => {
    later.stop();
    newest?.abort();
    pending = entered = false;
    list.hidden = true;
    input.setAttribute("aria-expanded", "false");
    mark(-1);
  };
  const say = (sentence) => {
    options = [];
    open(h("li", { class: "note", role: "option", "aria-disabled": "true", id: `${list.id}-note` }, sentence));
  };
  const choose = (n) => {
    const option = options[n];
    if (!option) return;
    close();
    input.value = "";
    pick(option);
  };
  const line = (option, n) =>
    h(
      "li",
      {
        role: "option",
        id: `${list.id}-${n}`,
        "aria-selected": "false",
        onpointerdown: (event) => event.preventDefault(),
        onclick: () => choose(n),
      },
      draw(option),
    );

  async function look() {
    if (document.activeElement !== input) return;
    newest?.abort();
    newest = new AbortController();
    const { signal } = newest;
    const slow = setTimeout(() => say("Searching …"), 250);
    try {
      const found = await find(input.value.trim(), signal);
      clearTimeout(slow);
      if (signal.aborted) return;
      if (!found.length) return nothing(input.value.trim()) === null ? close() : say(nothing(input.value.trim()));
      options = found;
      open(...found.map(line));
      mark(choosing && input.value.trim() ? 0 : -1);
      if (entered) choose(0);
    } catch (error) {
      if (!signal.aborted) say(error.message);
    } finally {
      clearTimeout(slow);
      if (!signal.aborted) pending = entered = false;
    }
  }

  const later = settled(look, 120);
  const keys = {
    ArrowDown: () => (list.hidden ? look() : mark((active + 1) % options.length)),
    ArrowUp: () => mark((active - 1 + options.length) % options.length),
    Enter: () => choose(Math.max(0, active)),
    Escape: () => {
      if (list.hidden) input.value = "";
      else close();
    },
  };
  input.addEventListener("keydown", (event) => {
    const act = keys[event.key];
    if (event.key === "Escape" && list.hidden && !input.value) return; // a sheet around the field may close
    if (event.key === "Enter" && !choosing && active < 0) return close();
    if (event.key === "Enter" && pending) {
      event.preventDefault();
      entered = true;
      return;
    }
    if (!act || (!options.length && event.key !== "Escape" && event.key !== "ArrowDown")) return;
    if (list.hidden && event.key !== "ArrowDown" && event.key !== "Escape") return;
    event.preventDefault();
    if (options.length || list.hidden || event.key === "Escape") act();
  });
  input.addEventListener("input", () => {
    newest?.abort(); // results of the previous text are outdated
    options = [];
    pending = true;
    entered = false;
    mark(-1);
    later();
  });
  input.addEventListener("click", () => list.hidden && look());
  input.addEventListener("blur", close);
}
