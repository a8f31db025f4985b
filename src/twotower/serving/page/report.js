// Shows the evaluation: each system on held-out events, with 95 % intervals as bars. Takes "metrics" of /v1/about, which holds the
// report of `twotower evaluate`. Without a report, shows the validation result and how to get a report.

import { h, s } from "./dom.js";
import { count, signed } from "./format.js";

const TITLES = {
  ease: "EASE",
  ials: "iALS",
  transitions: "next after the last",
  item_knn: "item-kNN",
  content_knn: "content-kNN",
  nearby: "popular nearby",
  popular: "popular",
  recent: "recently popular",
  repeat: "repeat",
  oracle: "oracle",
};
const BEYOND = {
  coverage: ["coverage", "share of the catalogue that is recommended to at least one user"],
  gini: ["Gini", "0: every item recommended equally often; 1: only one item recommended"],
  novelty_bits: ["novelty, bits", "mean self-information −log₂ p of the recommended items"],
  popularity_lift: ["popularity lift", "popularity of the recommended items relative to the items of the user's history"],
  diversity: ["diversity", "mean dissimilarity of categories within a list"],
};
const MAIN = "two-tower";
const title = (name) => TITLES[name] ?? name;
const figure = (value, digits = 4) => (Number.isFinite(value) ? value.toFixed(digits).replace("-", "−") : "–");

/** Draws the tab into `root`. */
export function showReport(root, about) {
  const report = about.metrics?.report ?? {};
  if (!report.systems) return root.replaceChildren(bare(about.metrics?.metrics ?? {}));
  const names = [...new Set(Object.values(report.systems).flatMap(Object.keys))].sort(
    new Intl.Collator("en", { numeric: true }).compare,
  );
  const chosen = names.includes(report.protocol?.metric) ? report.protocol.metric : names[0];
  const body = h("div", { class: "panels" });
  const select = h(
    "select",
    { id: "metric", onchange: () => draw(select.value) },
    names.map((name) => h("option", { selected: name === chosen }, name)),
  );
  const draw = (metric) => body.replaceChildren(...[systems(report, metric), differences(report, metric)].filter(Boolean));
  draw(chosen);
  root.replaceChildren(
    h("header", { class: "verdict" }, h("h2", {}, sentence(report.verdict) ?? "Evaluation report"), facts(report)),
    h("p", { class: "pick" }, h("label", { for: "metric" }, "Metric"), select),
    body,
    beyond(report) ?? "",
  );
}

const sentence = (text) => (text ? text[0].toUpperCase() + text.slice(1) : null);

function facts({ protocol: p = {}, dataset: d = {} }) {
  const known = [
    p.queries && `${count(p.queries, "query", "queries")} of ${count(p.users, "user")}`,
    p.catalogue && `all ${count(p.catalogue, "item")} ranked`,
    d.train_events && `trained on ${count(d.train_events, "event")}`,
    p.split && `split by ${p.split.replaceAll("_", " ")}`,
  ];
  return h("p", { class: "meta" }, known.filter(Boolean).join(" · "));
}

/** Draws values with intervals on a common scale. */
function strips(rows, low, high, tone) {
  const x = (value) => (100 * (value - low)) / (high - low || 1);
  const rail = (row) =>
    s(
      "svg",
      { class: `rail ${tone(row)}`, viewBox: "0 0 100 16", preserveAspectRatio: "none", "aria-hidden": "true" },
      s("rect", { class: "fill", x: Math.min(x(0), x(row.value)), y: 3, width: Math.abs(x(row.value) - x(0)), height: 10 }),
      s("line", { class: "origin", x1: x(0), x2: x(0), y1: 0, y2: 16 }),
      Number.isFinite(row.low) && s("line", { class: "span", x1: x(row.low), x2: x(row.high), y1: 8, y2: 8 }),
      ...[row.low, row.high]
        .filter(Number.isFinite)
        .map((end) => s("line", { class: "span", x1: x(end), x2: x(end), y1: 4.5, y2: 11.5 })),
    );
  return rows.map((row) => [row, rail(row)]);
}

function systems(report, metric) {
  const rows = Object.entries(report.systems)
    .map(([name, values]) => ({ name, ...values[metric] }))
    .filter((row) => Number.isFinite(row.value))
    .sort((a, b) => b.value - a.value);
  const most = Math.max(...rows.map((row) => row.high ?? row.value));
  const kind = (row) => (row.name === MAIN ? "own" : row.name === "oracle" ? "oracle" : "other");
  const line = ([row, rail]) =>
    h(
      "tr",
      { class: kind(row) },
      h("th", { scope: "row" }, title(row.name)),
      h("td", { class: "wide" }, rail),
      h("td", {}, figure(row.value), " ", h("small", {}, `${figure(row.low)} – ${figure(row.high)}`)),
    );
  const note = report.systems.oracle ? " The oracle knows the true preferences: an upper bound, not a baseline." : "";
  return h(
    "section",
    { class: "panel" },
    h("h3", {}, `${metric} of every system`),
    h("p", { class: "meta" }, `Mean over the queries; whiskers are 95 % intervals.${note}`),
    table(["system", "", "value, 95 % interval"], strips(rows, 0, most, kind).map(line)),
  );
}

function differences(report, metric) {
  const rows = Object.entries(report.differences ?? {})
    .map(([name, values]) => ({ name, ...values[metric] }))
    .filter((row) => Number.isFinite(row.value) && row.name !== "oracle")
    .sort((a, b) => a.value - b.value);
  if (!rows.length) return null;
  const tone = (row) => (row.low > 0 ? "good" : row.high < 0 ? "bad" : "other");
  const ends = [0, ...rows.flatMap((row) => [row.low, row.high])].filter(Number.isFinite);
  const line = ([row, rail]) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, title(row.name)),
      h("td", { class: "wide" }, rail),
      h("td", {}, signed(row.value, 4), " ", h("small", {}, `${signed(row.low, 4)} – ${signed(row.high, 4)}`)),
    );
  return h(
    "section",
    { class: "panel" },
    h("h3", {}, `${MAIN} minus the others`),
    h("p", { class: "meta" }, "Paired over the same users. Right of the line, the model is better."),
    table(["against", "", "difference, 95 % interval"], strips(rows, Math.min(...ends), Math.max(...ends), tone).map(line)),
  );
}

function beyond({ beyond: values }) {
  if (!values || !Object.keys(values).length) return null;
  const columns = Object.keys(Object.values(values)[0]);
  const named = columns.map((column) => BEYOND[column.split("@")[0]] ?? [column, ""]);
  const line = ([name, row]) =>
    h(
      "tr",
      { class: name === MAIN ? "own" : "" },
      h("th", { scope: "row" }, title(name)),
      columns.map((column) => h("td", {}, figure(row[column], 3))),
    );
  return h(
    "section",
    { class: "panel" },
    h("h3", {}, "Beyond accuracy"),
    h("p", { class: "meta" }, "Which way is better depends on the product."),
    table(["system", ...named.map(([name]) => name)], Object.entries(values).map(line)),
    h(
      "dl",
      {},
      named.filter(([, help]) => help).flatMap(([name, help]) => [h("dt", {}, name), h("dd", {}, help)]),
    ),
  );
}

const table = (heads, lines) =>
  h(
    "div",
    { class: "scroll", tabindex: "0", role: "group", "aria-label": "Table" },
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
      h("tbody", {}, lines),
    ),
  );

function bare({ metric, value }) {
  const kept =
    Number.isFinite(value) &&
    h("p", {}, `In training, the model reached ${metric} `, h("b", {}, figure(value)), " on the validation part.");
  return h(
    "div",
    { class: "state" },
    h("h2", {}, "No report in this bundle"),
    kept,
    h("p", {}, "Evaluate the run and export it again to include the report in the bundle:"),
    h("pre", {}, "twotower evaluate RUN\ntwotower export RUN --out BUNDLE"),
  );
}
