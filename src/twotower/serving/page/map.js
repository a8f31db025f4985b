// Draws the map: history, recommendations and the pin. It moves and zooms with mouse, touch and keys. It takes items with
// coordinates, and callbacks for opening an item and setting the pin. Shapes distinguish the kinds without colour: numbered
// circles are recommendations, diamonds the history, a drop the pin, small dots other items of the catalogue.

import { calm, count, h, icon, km, s } from "./dom.js";
import { bar, core, distance, fitted, grid, middle, panned, toPixels, toPlace, zoomed } from "./geometry.js";

const MARGIN = 54; // pixels around the fitted markers
const NUMBERED = 30; // recommendations with a visible rank
const DRAG = 4; // pixels before a press is a drag
const at = (place) => [place.latitude, place.longitude];
export const placed = (place) => Number.isFinite(place.latitude) && Number.isFinite(place.longitude);

export class PlaceMap {
  /** `open(id)`: a marker was pressed; `pin(location | null)`: the user set or removed the pin. */
  constructor(root, { open, pin }) {
    Object.assign(this, {
      root,
      open,
      pin,
      view: null,
      ground: [],
      groundOf: undefined,
      lit: null,
      size: { width: 0, height: 0 },
      pointers: new Map(),
    });
    this.content = { recommended: [], history: [], visits: [], near: null, radius: null };
    this.layers = Object.fromEntries(
      ["grid", "circle", "context", "history", "recommended", "pin", "top"].map((name) => [name, s("g", { class: name })]),
    );
    this.canvas = s("svg", { class: "canvas", role: "group", "aria-label": "Map" }, ...Object.values(this.layers));
    this.tip = h("div", { class: "tip", hidden: true, "aria-hidden": "true" });
    this.scale = h("div", { class: "scale", "aria-hidden": "true" });
    this.outside = h("button", { class: "outside", type: "button", hidden: true, onclick: () => this.fit({ all: true }) });
    root.append(this.canvas, this.tip, this.scale, this.outside, this.buttons());
    this.listen();
    new ResizeObserver(() => this.resize()).observe(root);
  }

  buttons() {
    const button = (name, label, onclick) =>
      h("button", { type: "button", class: "round", "aria-label": label, title: label, onclick }, icon(name));
    this.pinButton = button("pin", "Set the pin to the map centre", () =>
      this.pin(this.content.near ? null : [this.view.lat, this.view.lon]),
    );
    return h(
      "div",
      { class: "map-buttons" },
      button("add", "Zoom in", () => this.zoom(1.6)),
      button("minus", "Zoom out", () => this.zoom(1 / 1.6)),
      button("fit", "Fit the recommendations", () => this.fit()),
      this.pinButton,
    );
  }

  /** Shows new content: `history` has one entry per item, `visits` all events, oldest first; `refit` also moves the view to it. */
  show(content, { refit = false } = {}) {
    const only = (places) => places.filter(placed);
    this.content = {
      ...content,
      recommended: only(content.recommended),
      history: only(content.history),
      visits: only(content.visits),
    };
    this.pinButton.setAttribute("aria-pressed", String(Boolean(content.near)));
    const label = content.near ? "Remove the pin" : "Set the pin to the map centre";
    for (const name of ["aria-label", "title"]) this.pinButton.setAttribute(name, label);
    this.markers();
    this.dot();
    if (refit || !this.view || this.elsewhere()) this.fit();
    else this.draw();
  }

  /** Draws many other items as small dots under the markers. */
  lay(ground, of) {
    Object.assign(this, { ground: ground.filter(placed), groundOf: of });
    this.dot();
    this.draw();
  }

  dot() {
    const marked = new Set(this.places.map((place) => place.item_id));
    this.dots = this.ground.filter((place) => !marked.has(place.item_id)).map((place) => [s("circle", { r: 2.5 }), at(place)]);
    this.layers.context.replaceChildren(...this.dots.map(([dot]) => dot));
  }

  /** Whether most of the recommendations are outside the view. */
  elsewhere() {
    const inside = this.content.recommended.filter((place) => this.holds(toPixels(this.view, this.size, at(place))));
    return inside.length < this.content.recommended.length / 2;
  }

  holds([x, y]) {
    return x >= 0 && y >= 0 && x <= this.size.width && y <= this.size.height;
  }

  /** Fits the view to the recommendations and the pin; with `all` to everything; without recommendations to the history. */
  fit({ all = false } = {}) {
    const { recommended, history, near } = this.content;
    const wanted = all ? [...recommended, ...history].map(at) : core((recommended.length ? recommended : history).map(at));
    const places = near ? [...wanted, near] : wanted;
    if (places.length && this.size.width) this.travel(fitted(places, this.size, Math.min(MARGIN, this.size.height / 5)));
  }

  travel(goal) {
    cancelAnimationFrame(this.frame);
    const from = this.view;
    if (!from || calm()) return this.look(goal);
    const began = performance.now();
    const step = () => {
      const t = Math.min(1, (performance.now() - began) / 350);
      const eased = 1 - (1 - t) ** 3;
      const mix = (a, b) => a + (b - a) * eased;
      this.look({
        lat: mix(from.lat, goal.lat),
        lon: mix(from.lon, goal.lon),
        scale: Math.exp(mix(Math.log(from.scale), Math.log(goal.scale))),
      });
      if (t < 1) this.frame = requestAnimationFrame(step);
    };
    step();
  }

  look(view) {
    this.view = view;
    this.draw();
  }

  zoom(factor, where) {
    if (this.view) this.travel(zoomed(this.view, this.size, factor, where));
  }

  resize() {
    const { width, height } = this.root.getBoundingClientRect();
    const first = !this.size.width;
    this.size = { width, height };
    this.canvas.setAttribute("viewBox", `0 0 ${width} ${height}`);
    if (!width) return;
    if (first || !this.view) this.fit();
    else this.draw();
  }

  markers() {
    const { recommended, history, near } = this.content;
    const focused = this.canvas.contains(document.activeElement);
    const marker = (place, kind, label, ...shape) =>
      s(
        "g",
        { class: `marker ${kind}`, role: "button", tabindex: "-1", "aria-label": label, data: { id: place.item_id } },
        ...shape,
      );
    const own = history.map((place) =>
      marker(
        place,
        place.added ? "history added" : "history",
        `${place.name}, history`,
        s("rect", { x: -6, y: -6, width: 12, height: 12, transform: "rotate(45)", rx: 1.5 }),
      ),
    );
    const best = recommended.map((place) => {
      const numbered = place.rank <= NUMBERED;
      const number = numbered && s("text", { "text-anchor": "middle", dy: "0.36em" }, String(place.rank));
      return marker(
        place,
        "recommended",
        `${place.rank}. ${place.name}, recommended`,
        s("circle", { r: numbered ? 11 : 6 }),
        number,
      );
    });
    this.places = [...history, ...recommended.slice().reverse()];
    this.marks = [...own, ...best.slice().reverse()]; // the first recommendation is drawn last, above all others
    this.layers.history.replaceChildren(...own);
    this.layers.recommended.replaceChildren(...best.slice().reverse());
    this.layers.pin.replaceChildren(
      ...(near ? [s("path", { d: "M0 0C-3-7-9-11-9-18a9 9 0 0118 0C9-11 3-7 0 0z" }), s("circle", { cy: -18, r: 3.2 })] : []),
    );
    this.marks.at(-1)?.setAttribute("tabindex", "0");
    if (focused) this.marks.at(-1)?.focus({ preventScroll: true });
    this.canvas.setAttribute(
      "aria-label",
      `Map with ${count(recommended.length, "recommendation")} and ${count(history.length, "item")} of the history; arrow keys move`,
    );
  }

  draw() {
    if (!this.view || !this.size.width || !this.marks) return;
    const { view, size } = this;
    const move = (mark, place) => {
      const [x, y] = toPixels(view, size, place);
      mark.setAttribute("transform", `translate(${x.toFixed(1)} ${y.toFixed(1)})`);
      return this.holds([x, y]);
    };
    const inside = this.marks.map((mark, n) => move(mark, at(this.places[n])));
    for (const [dot, place] of this.dots) move(dot, place);
    if (this.content.near) move(this.layers.pin, this.content.near);
    this.background();
    const away = this.places.filter((place, n) => !inside[n] && place.rank).length;
    this.outside.hidden = !away;
    this.outside.textContent = `${away} outside · show all`;
    this.point();
  }

  background() {
    const { view, size } = this;
    const { rows, columns } = grid(view, size);
    const digits = (step) => Math.max(0, Math.min(5, -Math.floor(Math.log10(step))));
    const label = (value, step, x, y) => s("text", { x, y }, `${value.toFixed(digits(step)).replace("-", "−")}°`);
    const lines = [
      ...rows.lines.flatMap(([lat, y]) => [
        s("line", { x1: 0, x2: size.width, y1: y, y2: y }),
        y > 24 && y < size.height - 40 && label(lat, rows.step, 6, y - 4),
      ]),
      ...columns.lines.flatMap(([lon, x]) => [
        s("line", { x1: x, x2: x, y1: 0, y2: size.height }),
        x > 30 && x < size.width - 90 && label(lon, columns.step, x + 4, 14),
      ]),
    ];
    this.layers.grid.replaceChildren(...lines.filter(Boolean));
    const centre = this.centre();
    const [cx, cy] = centre ? toPixels(view, size, centre) : [0, 0];
    this.layers.circle.replaceChildren(
      ...(centre && this.content.radius ? [s("circle", { cx, cy, r: this.content.radius * view.scale })] : []),
    );
    const length = bar(view, 96);
    this.scale.style.setProperty("--width", `${length.pixels}px`);
    this.scale.textContent = km(length.km);
  }

  /** The origin of distances, as on the server: the pin, else the most central location of the last events. */
  centre() {
    return this.content.near ?? middle(this.content.visits.map(at));
  }

  /** Highlights the item with this id with a ring and its name; null removes the highlight. */
  light(id) {
    this.lit = id;
    this.point();
  }

  point() {
    const n = this.places?.findLastIndex((place) => place.item_id === this.lit) ?? -1;
    for (const [m, mark] of this.marks?.entries() ?? []) mark.classList.toggle("lit", m === n);
    this.layers.top.replaceChildren();
    this.tip.hidden = n < 0;
    if (n < 0 || !this.view) return;
    const place = this.places[n];
    const [x, y] = toPixels(this.view, this.size, at(place));
    this.tip.hidden = !this.holds([x, y]);
    if (this.tip.hidden) return;
    this.layers.top.append(s("circle", { class: "ring", cx: x, cy: y, r: 16 }));
    const from = this.centre();
    this.tip.replaceChildren(h("b", {}, place.name), ...(from ? [` ${km(distance(from, at(place)))}`] : []));
    this.tip.classList.toggle("below", y < 60);
    this.tip.style.setProperty("--x", `${Math.max(90, Math.min(this.size.width - 90, x))}px`);
    this.tip.style.setProperty("--y", `${y}px`);
  }

  listen() {
    const here = (event) => {
      const box = this.canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    this.canvas.addEventListener(
      "wheel",
      (event) => {
        event.preventDefault();
        if (this.view) this.look(zoomed(this.view, this.size, Math.exp(-event.deltaY * 0.0016), here(event)));
      },
      { passive: false },
    );
    this.canvas.addEventListener("dblclick", (event) => this.view && this.pin(toPlace(this.view, this.size, here(event))));
    this.canvas.addEventListener("click", (event) => {
      const mark = event.target.closest(".marker");
      if (mark && !this.dragged) this.open(mark.dataset.id);
    });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("focusin", (event) => this.reveal(event.target.closest(".marker")));
    this.canvas.addEventListener("pointerdown", (event) => {
      if (!this.pointers.size) this.dragged = false;
      this.pointers.set(event.pointerId, here(event));
    });
    this.canvas.addEventListener("pointermove", (event) => this.drag(event, here(event)));
    for (const name of ["pointerup", "pointercancel"])
      this.canvas.addEventListener(name, (event) => this.pointers.delete(event.pointerId));
  }

  /** One pointer moves the map; two pointers also zoom it. */
  drag(event, now) {
    const before = this.pointers.get(event.pointerId);
    if (!before || !this.view) return;
    const step = [now[0] - before[0], now[1] - before[1]];
    if (!this.dragged && Math.hypot(...step) < DRAG) return;
    if (!this.dragged) this.canvas.setPointerCapture(event.pointerId);
    this.dragged = true;
    const other = [...this.pointers].find(([id]) => id !== event.pointerId)?.[1];
    this.pointers.set(event.pointerId, now);
    if (!other) return this.look(panned(this.view, this.size, step));
    const length = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]);
    const middle = [(now[0] + other[0]) / 2, (now[1] + other[1]) / 2];
    this.look(
      panned(zoomed(this.view, this.size, length(now) / Math.max(1, length(before)), middle), this.size, [
        step[0] / 2,
        step[1] / 2,
      ]),
    );
  }

  key(event) {
    const n = this.marks.indexOf(event.target.closest(".marker"));
    const steps = { ArrowRight: -1, ArrowDown: -1, ArrowLeft: 1, ArrowUp: 1 };
    const acts = { "+": () => this.zoom(1.6), "=": () => this.zoom(1.6), "-": () => this.zoom(1 / 1.6), 0: () => this.fit() };
    if (event.key in steps && n >= 0) this.step((n + steps[event.key] + this.marks.length) % this.marks.length);
    else if ((event.key === "Enter" || event.key === " ") && n >= 0) this.open(this.places[n].item_id);
    else if (event.key in acts) acts[event.key]();
    else return;
    event.preventDefault();
  }

  /** Makes marker `n` the only one that the Tab key reaches; after the first recommendation comes the second. */
  step(n) {
    for (const mark of this.marks) mark.setAttribute("tabindex", "-1");
    this.marks[n].setAttribute("tabindex", "0");
    this.marks[n].focus();
  }

  /** Moves the view so that the focused marker is visible. */
  reveal(mark) {
    const place = this.places[this.marks.indexOf(mark)];
    if (!place || !this.view || !mark.matches(":focus-visible")) return;
    const [x, y] = toPixels(this.view, this.size, at(place));
    if (x < 20 || y < 20 || x > this.size.width - 20 || y > this.size.height - 20)
      this.travel({ ...this.view, lat: place.latitude, lon: place.longitude });
  }
}
