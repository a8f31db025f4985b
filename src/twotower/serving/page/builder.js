// Builds a condition from the columns and values of the catalogue, or takes one as text. Columns, values and examples come from
// /v1/columns and /v1/values when the panel is first opened.

import { $, h } from "./dom.js";
import { countItems, inWords, label } from "./format.js";
import { combobox } from "./search.js";
import { quoted } from "./url_state.js";

const SIGNS = {
  text: [
    ["is", (column, value) => `${column} == ${quoted(value)}`],
    ["is not", (column, value) => `${column} not in [${quoted(value)}]`],
  ],
  list: [
    ["contains", (column, value) => `${column} == ${quoted(value)}`],
    ["does not contain", (column, value) => `${column} not in [${quoted(value)}]`],
  ],
  number: [
    ["at most", (column, value) => `${column} <= ${Number(value)}`],
    ["at least", (column, value) => `${column} >= ${Number(value)}`],
    ["is", (column, value) => `${column} == ${Number(value)}`],
  ],
};
const FORMS = [
  [/^(\w+) == ("(?:[^"\\]|\\.)*")$/u, ""],
  [/^(\w+) not in \[("(?:[^"\\]|\\.)*")\]$/u, "not "],
  [/^(\w+) <= ([-\d.e+]+)$/u, "at most "],
  [/^(\w+) >= ([-\d.e+]+)$/u, "at least "],
  [/^(\w+) == ([-\d.e+]+)$/u, ""],
];

/** 'city == "Tampa"' → "City: Tampa"; other conditions stay as they are. */
export function conditionWords(text) {
  for (const [form, words] of FORMS) {
    const found = form.exec(text);
    if (!found) continue;
    try {
      return `${label(found[1])}: ${words}${inWords(JSON.parse(found[2]))}`;
    } catch {
      return text; // an escape that only the filter language has
    }
  }
  return text;
}

export class Builder {
  /** `add(text)` takes a condition. */
  constructor(root, { filters, api, add }) {
    Object.assign(this, { root, api, add, columns: [] });
    const field = (id, text, control) => h("p", {}, h("label", { for: id }, text), control);
    this.column = h("select", { id: "builder-column", onchange: () => this.pick() });
    this.sign = h("select", { id: "builder-sign" });
    this.value = h("input", {
      id: "builder-value",
      type: "text",
      role: "combobox",
      autocomplete: "off",
      spellcheck: "false",
      "aria-autocomplete": "list",
      "aria-expanded": "false",
      "aria-controls": "builder-values",
    });
    this.hint = h("small", { id: "builder-hint" });
    const list = h("ul", { id: "builder-values", class: "options", role: "listbox", "aria-label": "Values", hidden: true });
    this.text = h("input", { id: "condition", type: "text", autocomplete: "off", spellcheck: "false", class: "mono" });
    this.examples = h("p", { class: "chips", "aria-label": "Examples", role: "group" });
    const more = [filters.has_locations && "within(5)", filters.has_hours && "open_now", "not seen"].filter(Boolean);
    this.more = more;
    root.append(
      h(
        "div",
        { class: "built" },
        field("builder-column", "Column", this.column),
        field("builder-sign", "Condition", this.sign),
        h("div", { class: "combo" }, h("label", { for: "builder-value" }, "Value"), this.value, list, this.hint),
        h("button", { type: "button", class: "primary", onclick: () => this.take() }, "Add"),
      ),
      field("condition", "Or write it", this.text),
      this.examples,
    );
    this.text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();
      if (this.text.value.trim()) this.add(this.text.value.trim());
      this.text.value = "";
    });
    combobox(this.value, {
      find: (text, signal) => this.values(text, signal),
      draw: ({ value, items }) => [h("span", {}, inWords(value)), h("small", {}, countItems(items))],
      pick: ({ value }) => {
        this.value.value = value;
      },
      nothing: () => null,
      list,
      choosing: false,
    });
    this.value.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.defaultPrevented) {
        event.preventDefault();
        this.take();
      }
    });
  }

  /** Requests the columns, once. Returns the field that gets the focus. */
  opened() {
    if (!this.columns.length) this.load();
    return this.column;
  }

  async load() {
    const { columns, examples } = await this.api.columns();
    this.columns = columns;
    this.column.replaceChildren(...columns.map(({ name }) => h("option", { value: name }, label(name))));
    const try_ = (text) => h("button", { type: "button", class: "chip mono", onclick: () => this.write(text) }, text);
    this.examples.replaceChildren(h("small", {}, "Examples"), ...[...examples, ...this.more].map(try_));
    this.pick();
  }

  pick() {
    const column = this.chosen;
    if (!column) return;
    this.sign.replaceChildren(...SIGNS[column.kind].map(([words], n) => h("option", { value: n }, words)));
    this.value.value = "";
    this.value.inputMode = column.kind === "number" ? "decimal" : "text";
    this.hint.textContent =
      column.kind === "number" && column.min !== null
        ? `${inWords(column.min)} to ${inWords(column.max)}`
        : countItems(column.items);
  }

  get chosen() {
    return this.columns.find(({ name }) => name === this.column.value);
  }

  /** Values of the column that begin with or contain the text; of a number column those that are few. */
  async values(text, signal) {
    const column = this.chosen;
    if (!column) return [];
    if (column.kind !== "number" && (column.has_more || text)) return this.api.values(column.name, text, signal);
    return column.values.filter(({ value }) => String(value).startsWith(text));
  }

  take() {
    const value = this.value.value.trim();
    const column = this.chosen;
    const invalid = !column || !value || (column.kind === "number" && !Number.isFinite(Number(value)));
    this.value.setAttribute("aria-invalid", String(invalid));
    if (invalid) return this.value.focus();
    this.add(SIGNS[column.kind][Number(this.sign.value)][1](column.name, value));
    this.value.value = "";
  }

  write(text) {
    this.text.value = text;
    this.text.focus();
  }

  /** Puts a condition into the text field to change it. */
  edit(text, removed) {
    if (this.root.hidden) $("#builder-button").click();
    removed();
    this.write(text);
  }
}
