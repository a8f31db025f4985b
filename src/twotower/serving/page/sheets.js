// On narrow windows, opens a section of the page (filters, history, map) in a sheet over the list. The section itself is moved into
// the dialog and back, so that it is one and the same on every window.

import { $, h, icon } from "./dom.js";

export class Sheets {
  /** `opened(name)`, `closed(name)`: a sheet is shown, or no longer. Buttons name their section by `data-sheet`. */
  constructor(dialog, { opened, closed }) {
    Object.assign(this, { dialog, opened, closed, section: null });
    this.title = h("h2", { id: "sheet-title" });
    this.done = h("button", { type: "button", class: "primary", onclick: () => dialog.close() }, "Show the list");
    this.body = h("div", { class: "sheet-body" });
    const close = h(
      "button",
      { type: "button", class: "round quiet", "aria-label": "Close", onclick: () => dialog.close() },
      icon("close"),
    );
    dialog.append(h("header", {}, this.title, close), this.body, h("footer", {}, this.done));
    for (const button of document.querySelectorAll("[data-sheet]"))
      button.addEventListener("click", () => this.open(button.dataset.sheet, button.dataset.title));
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
    dialog.addEventListener("close", () => dialog.open || this.restore()); // the event comes late: it may be open again
    matchMedia("(min-width: 1180px)").addEventListener("change", () => dialog.open && dialog.close());
  }

  open(name, title) {
    this.restore();
    this.section = document.getElementById(name);
    this.anchor = document.createComment(name);
    this.section.before(this.anchor);
    this.body.replaceChildren(this.section);
    this.title.textContent = title;
    this.dialog.dataset.of = name;
    this.dialog.showModal();
    this.opened(name);
  }

  restore() {
    if (!this.section) return;
    const name = this.section.id;
    this.anchor.replaceWith(this.section);
    this.section = null;
    this.closed(name);
  }

  close() {
    if (this.dialog.open) this.dialog.close();
  }

  /** Marks a button with a number, such as that of the filters in use; 0: no mark. */
  static mark(name, number) {
    $(`[data-sheet="${name}"] .badge`).textContent = number > 99 ? "99+" : number || "";
  }
}
