// Compares two lists and animates the changes.

import { calm } from "./dom.js";
import { count } from "./format.js";

/**
 * Compares two lists of items, best first.
 * `moves`: item id → positions gained (positive: up), 0, or "new"; `gone`: removed items, without those in `taken` (ids).
 * With `longer` the second list is the first with more items: items after the end of the first are not new.
 */
export function compare(before, after, { taken = [], longer = false } = {}) {
  const was = new Map(before.map((item, rank) => [item.item_id, rank]));
  const moves = new Map();
  after.forEach((item, rank) => {
    const old = was.get(item.item_id);
    moves.set(item.item_id, old !== undefined ? old - rank : longer && rank >= before.length ? 0 : "new");
  });
  return { moves, gone: before.filter(({ item_id }) => !moves.has(item_id) && !taken.includes(item_id)) };
}

/** How many items of a list are not in another one. */
export const changed = (before, after) => compare(before, after).gone.length || Math.max(0, after.length - before.length);

/** "2 new, 3 up, 1 down, 2 removed", or "no change". */
export function inWords({ moves, gone }) {
  const values = [...moves.values()];
  const parts = [
    [values.filter((move) => move === "new").length, "new"],
    [values.filter((move) => move > 0).length, "up"],
    [values.filter((move) => move < 0).length, "down"],
    [gone.length, "removed"],
  ];
  return (
    parts
      .filter(([n]) => n)
      .map(([n, word]) => `${n} ${word}`)
      .join(", ") || "no change"
  );
}

/** "▲2" and how a screen reader says it. "new" means that the list before did not have the item. */
export function move(step) {
  if (step === "new") return { kind: "new", sign: "new", words: "not in the list before" };
  if (!step) return { kind: "same", sign: "", words: "" };
  const steps = count(Math.abs(step), "position");
  return step > 0
    ? { kind: "up", sign: `▲${step}`, words: `up ${steps}` }
    : { kind: "down", sign: `▼${-step}`, words: `down ${steps}` };
}

/** Runs `change` on the children of `list`, moves each child from its old position, and fades in new ones. */
export function animated(list, change) {
  const tops = new Map([...list.children].map((child) => [child, child.getBoundingClientRect().top]));
  const inside = list.contains(document.activeElement) ? document.activeElement : null;
  change();
  if (inside?.isConnected) inside.focus({ preventScroll: true }); // moving an element takes the focus from it
  if (calm() || list.querySelector(".skeleton") || ![...tops.keys()].some((child) => child.isConnected)) return; // nothing to follow
  for (const child of list.children) {
    const top = child.getBoundingClientRect().top;
    const was = tops.get(child);
    if (was === undefined)
      child.animate([{ opacity: 0, transform: "translateX(18px)" }, { opacity: 1 }], { duration: 320, easing: "ease-out" });
    else if (was !== top)
      child.animate([{ transform: `translateY(${was - top}px)` }, {}], { duration: 420, easing: "cubic-bezier(.2,.8,.2,1)" });
  }
}
