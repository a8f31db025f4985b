// Compares the lists of two users side by side.

import { h } from "./dom.js";
import { countItems, noun } from "./format.js";
import { combobox } from "./search.js";

const LENGTH = 10;

export class Comparison {
  constructor(api) {
    this.api = api;
    this.users = [null, null];
    this.lists = [h("ol", { class: "side" }), h("ol", { class: "side" })];
    this.note = h("p", { class: "meta", role: "status" }, `Choose two users to see which ${noun.many} both get.`);
    this.root = h(
      "section",
      { class: "panel comparison" },
      h("h3", {}, "Two users side by side"),
      this.note,
      h(
        "div",
        { class: "sides" },
        [0, 1].map((n) => h("div", {}, this.field(n), this.lists[n])),
      ),
    );
  }

  field(n) {
    const input = h("input", {
      id: `compare-${n}`,
      type: "text",
      role: "combobox",
      autocomplete: "off",
      spellcheck: "false",
      placeholder: "Find a user by id",
      "aria-autocomplete": "list",
      "aria-expanded": "false",
      "aria-controls": `compare-list-${n}`,
    });
    const list = h("ul", { id: `compare-list-${n}`, class: "options", role: "listbox", "aria-label": "Users", hidden: true });
    combobox(input, {
      list,
      find: (text, signal) => this.api.users(text, signal),
      draw: ({ user, events }) => [h("span", { class: "mono" }, user), h("small", {}, `${events} events`)],
      pick: ({ user }) => {
        this.users[n] = user;
        input.placeholder = user;
        this.show();
      },
      nothing: (text) => `No user id contains “${text}”.`,
    });
    return h("div", { class: "combo" }, h("label", { for: `compare-${n}` }, n ? "Second user" : "First user"), input, list);
  }

  async show() {
    const chosen = this.users.filter(Boolean);
    let answers;
    try {
      answers = await this.api.several(chosen.map((user) => ({ user, k: LENGTH })));
    } catch (error) {
      this.note.textContent = error.message;
      return;
    }
    if (chosen.join() !== this.users.filter(Boolean).join()) return; // another user was chosen meanwhile
    const lists = this.users.map((user) => (user ? (answers[chosen.indexOf(user)].items ?? []) : []));
    const ids = lists.map((items) => new Set(items.map((item) => item.item_id)));
    for (const [n, items] of lists.entries())
      this.lists[n].replaceChildren(
        ...items.map((item) => {
          const both = ids[1 - n].has(item.item_id);
          return h("li", both ? { class: "both" } : {}, item.name, both && h("span", { class: "unseen" }, ", in both lists"));
        }),
      );
    const common = lists[0].filter((item) => ids[1].has(item.item_id)).length;
    if (chosen.length === 2) this.note.textContent = `${countItems(common)} of ${LENGTH} in both lists (marked).`;
  }
}
