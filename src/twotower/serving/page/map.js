// Shows history, recommendations and the pin on a map (Leaflet). Shapes distinguish the kinds without colour: numbered circles are
// recommendations, diamonds the history, a drop the pin, small dots other items. Pins that would hide one another share one pin,
// which tells how many more there are.

import "./vendor/leaflet.js";
import { calm, h, icon, s } from "./dom.js";
import { count, km } from "./format.js";
import { core, distance, grouped, middle } from "./geo.js";
import { Ground } from "./ground.js";

const L = window.L;
const CalmMap = L.Map.extend({
  panBy(offset, options) {
    return L.Map.prototype.panBy.call(this, offset, { animate: !calm(), ...options });
  },
});
const GAP = 34; // pixels between two pins: their size with the number of further ones
const LIST_ZOOM = 17; // from here on a shared pin opens a list, because zooming does not separate its items
const at = (item) => [item.latitude, item.longitude];

const style = h("link", { rel: "stylesheet", href: new URL("./vendor/leaflet.css", import.meta.url) });
await new Promise((resolve) => {
  style.addEventListener("load", resolve);
  style.addEventListener("error", resolve);
  document.head.append(style);
});

export class ItemMap {
  /** `open(id)`: a pin was pressed; `pin(location | null)`: the user set or removed the location of the request. */
  constructor(root, { open, pin }) {
    Object.assign(this, { root, open, pin, lit: null, groundOf: undefined, others: [], pins: [], first: true });
    this.content = { recommended: [], history: [], events: [], near: null, radius: null };
    this.map = new CalmMap(root, {
      zoomControl: false,
      attributionControl: false,
      zoomSnap: 0.25,
      zoomDelta: 0.75,
      minZoom: 1.5,
      maxZoom: 19,
      worldCopyJump: true,
      zoomAnimation: !calm(),
      fadeAnimation: !calm(),
      inertia: !calm(),
    });
    this.map.attributionControl = L.control.attribution({ prefix: false, position: "bottomright" }).addTo(this.map);
    L.control.scale({ imperial: false, position: "bottomleft" }).addTo(this.map);
    this.map.setView([0, 0], 2);
    this.layer = new Ground(this.map);
    this.reach = L.layerGroup().addTo(this.map);
    this.layerOfPins = L.layerGroup().addTo(this.map);
    this.dropped = L.layerGroup().addTo(this.map);
    this.tip = L.tooltip({ direction: "auto", offset: [16, 0], className: "tip", opacity: 1 });
    this.outside = h("button", { class: "outside", type: "button", hidden: true, onclick: () => this.fit({ all: true }) });
    root.setAttribute("role", "group");
    root.append(this.buttons(), this.outside);
    this.map.on("zoomend", () => this.draw());
    this.map.on("moveend", () => this.away());
    this.map.on("contextmenu", ({ latlng }) => this.pin([latlng.lat, latlng.lng]));
    new ResizeObserver(() => this.resize()).observe(root);
  }

  buttons() {
    const button = (name, text, onclick) =>
      h("button", { type: "button", class: "round", "aria-label": text, title: text, onclick }, icon(name));
    this.pinButton = button("pin", "", () => {
      const { lat, lng } = this.map.getCenter().wrap();
      this.pin(this.content.near ? null : [lat, lng]);
    });
    const box = h(
      "div",
      { class: "map-buttons" },
      button("add", "Zoom in", () => this.map.zoomIn()),
      button("minus", "Zoom out", () => this.map.zoomOut()),
      button("fit", "Fit the recommendations", () => this.fit()),
      this.pinButton,
    );
    L.DomEvent.disableClickPropagation(box);
    return box;
  }

  /** Shows new content: `history` has one entry per item, `events` all events, oldest first; `refit` also moves the view to it. */
  show(content, { refit = false } = {}) {
    this.content = content;
    const { recommended, history, near } = content;
    this.pinButton.setAttribute("aria-pressed", String(Boolean(near)));
    for (const name of ["aria-label", "title"])
      this.pinButton.setAttribute(name, near ? "Remove the pin" : "Set the pin to the map centre");
    this.root.setAttribute(
      "aria-label",
      `Map with ${count(recommended.length, "recommendation")} and ${count(history.length, "item")} of the history; arrow keys move, plus and minus zoom`,
    );
    this.dropped.clearLayers();
    if (near) this.drop(near);
    this.circle();
    this.dots();
    if (refit || this.first || this.elsewhere()) this.fit();
    this.draw();
  }

  drop(near) {
    const shape = s(
      "svg",
      { viewBox: "0 0 24 32", "aria-hidden": "true" },
      s("path", { d: "M12 31C9 24 3 19 3 12a9 9 0 0118 0c0 7-6 12-9 19z" }),
      s("circle", { cx: 12, cy: 12, r: 3.4 }),
    );
    const drop = L.divIcon({ className: "drop", html: shape, iconSize: [24, 32], iconAnchor: [12, 31] });
    const marker = L.marker(near, { icon: drop, draggable: true, keyboard: false, zIndexOffset: 900 }).addTo(this.dropped);
    marker.on("dragend", () => {
      const { lat, lng } = marker.getLatLng().wrap();
      this.pin([lat, lng]);
    });
  }

  circle() {
    const centre = this.centre();
    this.reach.clearLayers();
    if (centre && this.content.radius)
      L.circle(centre, { radius: 1000 * this.content.radius, className: "reach", interactive: false }).addTo(this.reach);
  }

  /** The origin of distances, as on the server: the pin, else the most central location of the last events. */
  centre() {
    return this.content.near ?? middle(this.content.events.map(at));
  }

  /** Requests, once for each user, many more items for the ground. Errors are ignored. */
  async ground(user, request) {
    if (this.groundOf === user) return;
    this.groundOf = user;
    try {
      const { items } = await request();
      if (this.groundOf !== user) return;
      this.others = items.filter((item) => Number.isFinite(item.latitude) && Number.isFinite(item.longitude));
      this.dots();
    } catch {
      this.groundOf = undefined; // the map is shown without ground
    }
  }

  dots() {
    const { recommended, history } = this.content;
    const marked = [...history, ...recommended].map((item) => item.item_id);
    this.layer.show(this.others, new Set(marked));
  }

  /** Whether most of the recommendations are outside the view. */
  elsewhere() {
    const { recommended } = this.content;
    const bounds = this.map.getBounds();
    return recommended.filter((item) => bounds.contains(at(item))).length < recommended.length / 2;
  }

  away() {
    const bounds = this.map.getBounds();
    const n = this.content.recommended.filter((item) => !bounds.contains(at(item))).length;
    this.outside.hidden = !n;
    this.outside.textContent = `${n} outside · show all`;
  }

  /** Fits the view to the recommendations and the pin; with `all` to everything; without recommendations to the history. */
  fit({ all = false } = {}) {
    const { recommended, history, near } = this.content;
    const wanted = all ? [...recommended, ...history].map(at) : core((recommended.length ? recommended : history).map(at));
    const points = near ? [...wanted, near] : wanted;
    if (!points.length || !this.root.clientWidth) return;
    this.map.fitBounds(L.latLngBounds(points), { padding: [44, 44], maxZoom: 15, animate: !this.first && !calm() });
    this.first = false;
  }

  resize() {
    this.map.invalidateSize({ animate: false });
    if (this.first) this.fit();
  }

  /** Groups the pins for this zoom. */
  draw() {
    const { recommended, history } = this.content;
    const focused = this.layerOfPins.getLayers().some((marker) => marker.getElement() === document.activeElement);
    const points = [...recommended, ...history.filter((item) => !recommended.some((one) => one.item_id === item.item_id))].map(
      (item) => {
        const { x, y } = this.map.project(at(item));
        return { x, y, item };
      },
    );
    this.layerOfPins.clearLayers();
    this.pins = grouped(points, GAP).map((group) => this.marker(group.members.map((member) => member.item)));
    this.stop(0);
    if (focused) this.pins[0]?.marker.getElement().focus({ preventScroll: true });
    this.away();
    this.point();
  }

  marker(items) {
    const [first] = items;
    const best = Boolean(first.rank);
    const shape = h("span", { class: "shape" }, best ? String(first.rank) : "");
    const more = items.length > 1 && h("span", { class: "more", data: { more: `+${items.length - 1}` } });
    const html = h(
      "span",
      { "aria-hidden": "true", class: `pin ${best ? "best" : first.added ? "event added" : "event"}` },
      shape,
      more,
    );
    const marker = L.marker(at(first), {
      icon: L.divIcon({ className: "marker", html, iconSize: [GAP - 4, GAP - 4] }),
      zIndexOffset: best ? 1000 - first.rank : 0,
    }).addTo(this.layerOfPins);
    const element = marker.getElement();
    element.dataset.id = first.item_id;
    element.setAttribute("aria-label", items.map(title).join("; "));
    marker.on("click", () => this.press(items, marker));
    marker.on("keydown", ({ originalEvent }) => this.key(originalEvent, marker, items));
    return { marker, items };
  }

  /** Opens the item of a pin; several items are separated by zooming in, or listed. */
  press(items, marker) {
    if (items.length === 1) return this.open(items[0].item_id);
    const bounds = L.latLngBounds(items.map(at));
    const close = this.map.getBoundsZoom(bounds, false, [40, 40]);
    if (this.map.getZoom() < LIST_ZOOM && close > this.map.getZoom() + 0.5)
      return this.map.fitBounds(bounds, { padding: [60, 60], maxZoom: LIST_ZOOM, animate: !calm() });
    const line = (item) =>
      h("li", {}, h("button", { type: "button", class: "link", onclick: () => this.open(item.item_id) }, title(item)));
    return L.popup({ className: "several", offset: [0, -10] })
      .setLatLng(marker.getLatLng())
      .setContent(h("ul", {}, items.map(line)))
      .openOn(this.map);
  }

  /** Arrow keys go from pin to pin: after the first recommendation comes the second. */
  key(event, marker, items) {
    const n = this.pins.findIndex((one) => one.marker === marker);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Enter" || event.key === " ") this.press(items, marker);
    else if (step) {
      const next = (n + step + this.pins.length) % this.pins.length;
      this.stop(next);
      this.pins[next].marker.getElement().focus({ preventScroll: true });
      if (!this.map.getBounds().contains(this.pins[next].marker.getLatLng())) this.map.panTo(this.pins[next].marker.getLatLng());
    } else return;
    L.DomEvent.stop(event);
  }

  /** Makes pin `n` the only one that the Tab key reaches. */
  stop(n) {
    for (const [m, { marker }] of this.pins.entries()) marker.getElement().tabIndex = m === n ? 0 : -1;
  }

  /** Highlights the item with this id: its pin, and its name; null removes the highlight. */
  light(id) {
    this.lit = id;
    this.point();
  }

  point() {
    const found = this.lit && this.pins.find(({ items }) => items.some((item) => item.item_id === this.lit));
    for (const pin of this.pins) pin.marker.getElement()?.classList.toggle("lit", pin === found);
    if (!found) return this.map.closeTooltip(this.tip);
    const item = found.items.find((one) => one.item_id === this.lit);
    const from = this.centre();
    const far = from ? ` ${km(distance(from, at(item)))}` : "";
    return this.tip
      .setLatLng(found.marker.getLatLng())
      .setContent(h("span", {}, h("b", {}, item.name), far))
      .addTo(this.map);
  }
}

const title = (item) => (item.rank ? `${item.rank}. ${item.name}, recommended` : `${item.name}, history`);
