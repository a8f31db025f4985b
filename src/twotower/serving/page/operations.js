// The tab of those who run the server: what is served, as of when, load and errors, and with the admin key refreshes and reloads.
// It reads /health/ready and /metrics, which are open, and reads them again while it is shown.

import { apiKey } from "./api.js";
import { Comparison } from "./comparison.js";
import { $, announce, h } from "./dom.js";
import { count, ms, noun } from "./format.js";
import { Metrics } from "./metrics.js";
import { Versions } from "./versions.js";

const AGAIN_MS = 5000;
const MIB = 2 ** 20;
const TIME = new Intl.DateTimeFormat("en", { dateStyle: "medium", timeStyle: "short", timeZone: "UTC" });
const whole = (value) => (value === null ? "–" : Math.round(value).toLocaleString("en"));
const seconds = (value) => (value === null ? "–" : ms(1000 * value));
const moment = (value) => (value ? `${TIME.format(new Date(1000 * value))} UTC` : "–");

/** Fills the tab, unless it is filled already. */
export function showOperations(root, api) {
  if (root.children.length) return;
  const figures = h("div", { class: "panels" });
  const state = h("p", { class: "meta", role: "status" }, "Asking the server …");
  const again = () => Promise.all([look(root, figures, state, api), versions.look()]);
  const versions = new Versions(api, again);
  root.append(
    h("header", { class: "row" }, h("h2", {}, "This server"), state),
    figures,
    versions.root,
    actions(api, again),
    new Comparison(api).root,
  );
  watch(figures, again);
}

async function watch(figures, again) {
  while (figures.isConnected) {
    if (!document.hidden && $("#operations").contains(figures)) await again();
    await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
  }
}

async function look(root, figures, state, api) {
  const [health, text] = await Promise.allSettled([api.ready(), api.metrics()]);
  if (!root.contains(figures)) return;
  const ready = health.status === "fulfilled";
  state.replaceChildren(
    h("span", { class: ready ? "open" : "shut" }, ready ? "Ready" : health.reason.message),
    ` · updated ${new Date().toLocaleTimeString("en")}`,
  );
  if (text.status !== "fulfilled") return;
  const metrics = new Metrics(text.value);
  figures.replaceChildren(
    served(metrics, ready ? health.value : {}),
    traffic(metrics),
    table("Errors", "code", metrics.by("twotower_errors_total", "code"), "No request was refused or failed."),
    table("Events", "outcome", metrics.by("twotower_events_total", "outcome"), "No events yet."),
    outcomes(metrics),
  );
}

const panel = (title, ...children) => h("section", { class: "panel" }, h("h3", {}, title), ...children);

const list = (rows) =>
  h(
    "dl",
    {},
    rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
  );

function served(metrics, { version, as_of, events }) {
  const refreshed = metrics.value("twotower_refreshed_seconds");
  return panel(
    "Served",
    list([
      ["version", h("code", {}, version ?? "–")],
      ["events count until", moment(as_of)],
      [`${noun.many} refreshed`, moment(refreshed)],
      ["event store", events ?? "–"],
      ["running since", moment(metrics.value("process_start_time_seconds"))],
      ["memory", `${whole((metrics.value("process_resident_memory_bytes") ?? 0) / MIB)} MiB`],
    ]),
  );
}

function traffic(metrics) {
  const of = { route: "/v1/recommend" };
  const answers = metrics.by("twotower_answers_total", "source");
  const all = answers.reduce((sum, [, n]) => sum + n, 0);
  const unknown = all - (answers.find(([source]) => source === "model")?.[1] ?? 0);
  return panel(
    "Recommendations",
    list([
      ["lists", whole(all)],
      ["without a known user or history", all ? `${whole((100 * unknown) / all)} %` : "–"],
      ["median", seconds(metrics.quantile("twotower_request_seconds", 0.5, of))],
      ["99th percentile", seconds(metrics.quantile("twotower_request_seconds", 0.99, of))],
      ["waiting", whole(metrics.value("twotower_waiting"))],
      ["connections", whole(metrics.value("twotower_connections"))],
    ]),
  );
}

function table(title, head, rows, none) {
  const some = rows.filter(([, n]) => n > 0);
  if (!some.length) return panel(title, h("p", { class: "meta" }, none));
  return panel(
    title,
    rowsOf(
      [head, "number"],
      some.map(([name, n]) => [name, whole(n)]),
    ),
  );
}

function outcomes(metrics) {
  const rows = ["reloads", "refreshes"].flatMap((kind) =>
    metrics.by(`twotower_${kind}_total`, "outcome").map(([outcome, n]) => [kind, outcome, whole(n)]),
  );
  return panel(
    "Reloads and refreshes",
    rowsOf(
      ["", "outcome", "number"],
      rows.filter(([, , n]) => n !== "0"),
    ),
  );
}

const rowsOf = (heads, rows) =>
  h(
    "table",
    {},
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        heads.map((head) => (head ? h("th", { scope: "col" }, head) : h("td"))),
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

/** Refresh and reload. The key is that of this tab: requests of the page use it, too. */
function actions(api, look) {
  const outcome = h("p", { class: "outcome", role: "status" });
  const key = h("input", { id: "admin-key", type: "password", autocomplete: "off", value: apiKey.current ?? "" });
  const folder = h("input", {
    id: "folder",
    type: "text",
    autocomplete: "off",
    spellcheck: "false",
    placeholder: "the same folder again",
  });
  const act = async (button, words, request) => {
    if (key.value.trim()) apiKey.keep(key.value.trim());
    button.disabled = true;
    outcome.className = "outcome";
    outcome.textContent = `${words} …`;
    try {
      outcome.textContent = await request();
      await look();
    } catch (error) {
      outcome.classList.add("bad");
      outcome.textContent = error.message;
    } finally {
      button.disabled = false;
      announce(outcome.textContent);
    }
  };
  const refresh = h("button", { type: "button" }, `Refresh the ${noun.many} now`);
  refresh.addEventListener("click", () =>
    act(refresh, "Refreshing", async () => {
      const { as_of, events } = await api.refresh();
      return `Refreshed: ${count(events.counted, "accepted event")} counted${as_of ? `, until ${moment(as_of)}` : ""}.`;
    }),
  );
  const reload = h("button", { type: "submit", class: "primary" }, "Reload");
  const form = h(
    "form",
    {
      class: "fields",
      onsubmit: (event) => {
        event.preventDefault();
        act(reload, "Loading and testing the bundle", async () => {
          const { version, previous_version: before } = await api.reload(folder.value.trim());
          return version === before
            ? `Version ${version} was read again.`
            : `Version ${version} is served; before it was ${before}.`;
        });
      },
    },
    h("p", {}, h("label", { for: "admin-key" }, "Key with the role admin"), key),
    h("p", {}, h("label", { for: "folder" }, "Folder of the bundle, on the server"), folder),
    h("p", { class: "row" }, reload, refresh),
  );
  return panel(
    "Refresh and reload",
    h("p", { class: "meta" }, "A new bundle is loaded and tested first; if it fails, the current one stays."),
    form,
    outcome,
  );
}
