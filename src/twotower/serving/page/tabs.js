// Selects what the page shows: the tab and the theme.

import { $, icon } from "./dom.js";

const THEMES = { system: "system", light: "sun", dark: "moon" };
const KEY = "twotower.theme";

export class Tabs {
  /** `tab(name)`: the user chose a tab. */
  constructor({ tab }) {
    this.tabs = [...document.querySelectorAll("[role=tab]")];
    for (const one of this.tabs) one.addEventListener("click", () => tab(one.getAttribute("aria-controls")));
    $("[role=tablist]").addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = this.tabs[(this.tabs.indexOf(document.activeElement) + step + this.tabs.length) % this.tabs.length];
      next.focus();
      next.click();
    });
    $("#theme").addEventListener("click", () => this.theme(this.nextTheme()));
    this.theme(document.documentElement.dataset.theme ?? "system");
  }

  show({ tab }) {
    for (const one of this.tabs) {
      const chosen = one.getAttribute("aria-controls") === tab;
      one.setAttribute("aria-selected", String(chosen));
      one.tabIndex = chosen ? 0 : -1;
      $(`#${one.getAttribute("aria-controls")}`).hidden = !chosen;
    }
  }

  nextTheme() {
    const names = Object.keys(THEMES);
    return names[(names.indexOf(this.chosen) + 1) % names.length];
  }

  theme(name) {
    this.chosen = name;
    if (name === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    try {
      localStorage.setItem(KEY, name);
    } catch {
      // Storage may be blocked; then the choice is lost when the page closes.
    }
    const label = `Theme: ${name}. Switch to ${this.nextTheme()}`;
    $("#theme").replaceChildren(icon(THEMES[name]));
    for (const attribute of ["aria-label", "title"]) $("#theme").setAttribute(attribute, label);
  }
}
