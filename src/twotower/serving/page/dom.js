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

const PATHS = {
  add: "M12 5v14M5 12h14",
  back: "M15 6l-6 6 6 6",
  check: "M5 12.5l4.5 4.5L19 7.5",
  close: "M6 6l12 12M18 6L6 18",
  dice: "M5 5h14v14H5zM9 9h.01M15 15h.01M15 9h.01M9 15h.01M12 12h.01",
  down: "M7 10l5 5 5-5",
  empty: "M12 4a8 8 0 100 16 8 8 0 000-16zM8.5 12h7",
  clock: "M12 3.5a8.5 8.5 0 100 17 8.5 8.5 0 000-17zM12 7.5V12l3 2",
  fit: "M4 9V4h5M20 9V4h-5M4 15v5h5M20 15v5h-5",
  minus: "M5 12h14",
  moon: "M19.5 14.5A8 8 0 019.5 4.5a8 8 0 1010 10z",
  map: "M3.5 6.5l5.5-2 6 2 5.5-2v13l-5.5 2-6-2-5.5 2zM9 4.5v13M15 6.5v13",
  no: "M12 4a8 8 0 100 16 8 8 0 000-16zM6.4 6.4l11.200 11.200",
  pin: "M12 21s-6.5-5.7-6.5-11a6.5 6.5 0 0113 0c0 5.3-6.5 11-6.5 11zM12 12a2 2 0 100-4 2 2 0 000 4z",
  search: "M11 4a7 7 0 100 14 7 7 0 000-14zM16.2 16.2L20 20",
  sun: "M12 8a4 4 0 100 8 4 4 0 000-8zM12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2M5.3 5.3l1.4 1.4m10.6 10.6l1.4 1.4M5.3 18.7l1.4-1.4M17.3 6.7l1.4-1.4",
  system: "M4 5h16v11H4zM9 20h6M12 16v4",
  person: "M12 4a4 4 0 100 8 4 4 0 000-8zM4.5 20c.6-4 3.6-6 7.5-6s6.900 2 7.500 6",
  tune: "M4 7h9M17 7h3M15 5v4M4 17h3M11 17h9M9 15v4",
};

/** Returns a line icon. It is hidden from screen readers, because the button around it has a name. */
export function icon(name) {
  return s("svg", { class: "icon", viewBox: "0 0 24 24", "aria-hidden": "true" }, s("path", { d: PATHS[name] }));
}

/** Adds the icon to every element with a data-icon attribute. */
export function placeIcons(root) {
  for (const element of root.querySelectorAll("[data-icon]")) element.prepend(icon(element.dataset.icon));
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
