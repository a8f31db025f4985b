// Creates elements and icons, and announces text to screen readers. Independent of the API.

const SVG = "http://www.w3.org/2000/svg";

/**
 * Creates an element. `on…` props are listeners, `vars` custom properties (a policy without inline styles allows them from
 * scripts), `data` data attributes. All other props are attributes; true sets an empty attribute, false leaves it out.
 */
export function h(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** The same for SVG. */
export function s(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "vars") for (const [key, part] of Object.entries(value)) element.style.setProperty(key, part);
    else if (name === "data") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Returns a line icon; the page has the drawings. It is hidden from screen readers, because the button around it has a name. */
export function icon(name) {
  return s("svg", { class: "icon", viewBox: "0 0 24 24", "aria-hidden": "true" }, s("use", { href: `#icon-${name}` }));
}

export const $ = (selector, root = document) => root.querySelector(selector);

export const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Announces a sentence to screen readers (politely), even if it was announced just before. */
export function announce(sentence) {
  const region = $("#live");
  region.textContent = "";
  requestAnimationFrame(() => (region.textContent = sentence));
}

/** Calls `act` once the calls have paused for `wait` ms. */
export function settled(act, wait) {
  let timer;
  const later = (...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => act(...args), wait);
  };
  later.stop = () => clearTimeout(timer);
  return later;
}
