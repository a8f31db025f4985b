// What came of the lists of each version, with 95 % intervals, and the two calls that change which version is served. It needs the
// key with the role admin, and asks nothing of the server before there is one.

import { apiKey } from "./api.js";
import { announce, h } from "./dom.js";

const percent = (value) => `${(100 * value).toFixed(1)} %`;
const whole = (value) => value.toLocaleString("en");
const interval = ({ value, low, high }, form) => (low === null ? form(value) : `${form(value)} (${form(low)} to ${form(high)})`);
const number = (value) => value.toFixed(2);

const HEADS = ["version", "role", "users", "lists shown", "click-through", "outcomes per list"];

export class Versions {
  #api;
  #body = h("div", {});
  #outcome = h("p", { class: "outcome", role: "status" });
  #buttons;

  constructor(api, changed) {
    this.#api = api;
    const button = (words, act) => {
      const made = h("button", { type: "button" }, words);
      made.addEventListener("click", () => this.#act(made, act, changed));
      return made;
    };
    const promote = button("Serve the second version alone", () => api.promote());
    const back = button("Go back", () => api.rollback());
    this.#buttons = h("p", { class: "row", hidden: true }, promote, back);
    this.root = h("section", { class: "panel" }, h("h3", {}, "Outcomes by version"), this.#body, this.#buttons, this.#outcome);
    this.#say("Enter the key with the role admin below to see what came of the lists.");
  }

  /** Asks for the outcomes again, if there is a key. */
  async look() {
    if (!apiKey.current) return;
    try {
      const found = await this.#api.versions();
      this.#buttons.hidden = false;
      this.#show(found);
    } catch (error) {
      this.#say(error.message);
    }
  }

  #say(text) {
    this.#body.replaceChildren(h("p", { class: "meta" }, text));
  }

  #show({ versions, difference }) {
    const rows = versions.map(({ version, role, share, outcomes }) => [
      h("code", {}, version),
      role,
      role === "shadow" ? "–" : percent(share),
      outcomes ? whole(outcomes.lists) : "0",
      outcomes ? interval(outcomes.click_through, percent) : "–",
      outcomes ? interval(outcomes.outcomes_per_list, number) : "–",
    ]);
    const table = h(
      "table",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          HEADS.map((head) => h("th", { scope: "col" }, head)),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map(([name, ...cells]) =>
          h(
            "tr",
            {},
            h("th", { scope: "row" }, name),
            cells.map((cell) => h("td", {}, cell)),
          ),
        ),
      ),
    );
    const words = difference
      ? `Click-through of the second version minus that of the first: ${interval(difference, percent)}; 95 % interval over users.`
      : "Lists count once an impression or an outcome names them.";
    this.#body.replaceChildren(table, h("p", { class: "meta" }, words));
  }

  async #act(button, act, changed) {
    button.disabled = true;
    this.#outcome.className = "outcome";
    try {
      const { version, previous_version: before } = await act();
      this.#outcome.textContent = `Version ${version} is served; before it was ${before}.`;
      await changed();
    } catch (error) {
      this.#outcome.classList.add("bad");
      this.#outcome.textContent = error.message;
    } finally {
      button.disabled = false;
      announce(this.#outcome.textContent);
    }
  }
}
