// What moved between two lists, and the motion that shows it.

import { calm, count } from "./dom.js";

/**
 * Two lists of places, best first → what became of each.
 * `moves`: item id → places gained (positive: up), 0, or "new"; `gone`: those that left, without those in `taken` (ids).
 * With `longer` the second list was only asked to go on further: what follows the end of the first is not new.
 */
export function compare(before, after, { taken = [], longer = false } = {}) {
  const was = new Map(before.map((place, rank) => [place.item_id, rank]));
  const moves = new Map();
  after.forEach((place, rank) => {
    const old = was.get(place.item_id);
    moves.set(place.item_id, old !== undefined ? old - rank : longer && rank >= before.length ? 0 : "new");
  });
  return { moves, gone: before.filter(({ item_id }) => !moves.has(item_id) && !taken.includes(item_id)) };
}

/** "2 new, 3 up, 1 down", or "nothing moved". */
export function inWords({ moves, gone }) {
  const values = [...moves.values()];
  const parts = [
    [values.filter((move) => move === "new").length, "new"],
    [values.filter((move) => move > 0).length, "up"],
    [values.filter((move) => move < 0).length, "down"],
    [gone.length, "gone"],
  ];
  return (
    parts
      .filter(([n]) => n)
      .map(([n, word]) => `${n} ${word}`)
      .join(", ") || "nothing moved"
  );
}

/** "▲ 2" and how a screen reader says it. */
export function move(step) {
  if (step === "new") return { kind: "new", sign: "new", words: "new in the list" };
  if (!step) return { kind: "same", sign: "", words: "" };
  const steps = count(Math.abs(step), "place");
  return step > 0
    ? { kind: "up", sign: `▲${step}`, words: `up ${steps}` }
    : { kind: "down", sign: `▼${-step}`, words: `down ${steps}` };
}

/** Runs `change` on the children of `list` and lets each child travel from where it was; new ones fade in. */
export function animated(list, change) {
  const tops = new Map([...list.children].map((child) => [child, child.getBoundingClientRect().top]));
  const inside = list.contains(document.activeElement) ? document.activeElement : null;
  change();
  if (inside?.isConnected) inside.focus({ preventScroll: true }); // moving an element takes the focus from it
  if (calm()) return;
  for (const child of list.children) {
    const top = child.getBoundingClientRect().top;
    const was = tops.get(child);
    if (was === undefined)
      child.animate([{ opacity: 0, transform: "translateX(18px)" }, { opacity: 1 }], { duration: 320, easing: "ease-out" });
    else if (was !== top)
      child.animate([{ transform: `translateY(${was - top}px)` }, {}], { duration: 420, easing: "cubic-bezier(.2,.8,.2,1)" });
  }
}
