// Shows, behind a detail, where a list comes from and how long it took: for people who run the server.

import { $, h, s } from "./dom.js";
import { count, date, ms, noun } from "./format.js";

const LEAST_MS = 0.05; // shorter stages are not shown
const SOURCES = { model: "model", nearby: "most chosen lately, nearby", recent: "most chosen lately" };

/** Fills the details of a response; `filter`: the filter that was sent. */
export function showResponse(root, answer, filter) {
  const stages = Object.entries(answer.stages_ms ?? {}).filter(([, time]) => time >= LEAST_MS);
  const sum = stages.reduce((total, [, time]) => total + time, 0) || 1;
  const unknown = answer.unknown_items?.length ? `${count(answer.unknown_items.length, noun.one, noun.many)} of the history` : null;
  const rows = [
    ["source", SOURCES[answer.source] ?? answer.source],
    ["confidence", confidence(answer.confidence)],
    ["filter", filter && h("code", {}, filter)],
    ["passed over", unknown],
    ["version", h("code", {}, answer.version)],
    ["events until", answer.as_of ? date(answer.as_of) : null],
    ["request", h("code", {}, answer.request_id)],
    ["time", `${ms(answer.took_ms)} in the server, ${ms(answer.trip_ms)} round trip`],
  ];
  $(".facts-of", root).replaceChildren(
    h(
      "dl",
      {},
      rows.filter(([, value]) => value).flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
    ),
    h(
      "div",
      { class: "stages", "aria-hidden": "true" },
      stages.map(([name, time], n) =>
        h("span", { data: { n: n % 6 }, title: `${name} ${ms(time)}`, vars: { "--share": time / sum } }),
      ),
    ),
    h(
      "ul",
      { class: "stage-names" },
      stages.map(([name, time], n) => h("li", { data: { n: n % 6 } }, `${name} ${ms(time)}`)),
    ),
  );
  root.hidden = false;
}

/** Grows with the length of the history: n / (n + 3) for n events. */
function confidence(value) {
  const meter = s(
    "svg",
    { class: "meter", viewBox: "0 0 60 6", "aria-hidden": "true" },
    s("rect", { width: 60, height: 6, rx: 3 }),
    s("rect", { class: "fill", width: 60 * value, height: 6, rx: 3 }),
  );
  return h("span", { title: "n / (n + 3) for a history of n events" }, meter, `${Math.round(100 * value)} %`);
}
