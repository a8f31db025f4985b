// Draws the ground of the map without any other server: land and borders of Natural Earth, the area that the items of the catalogue
// cover, and the names of their cities. If the server was started with --map-tiles, images of that server lie under it instead.

import { $, h } from "./dom.js";
import { grouped, spacing } from "./geo.js";

const L = window.L;
const LABEL_GAP = 90; // pixels between two names
const CITY_ITEMS = 3; // items of a city that is named
const REACH = [0.12, 5]; // km around an item that count as covered
const SPREAD = 2.2; // times the distance of neighbours

const at = (item) => [item.latitude, item.longitude];
const middleOf = (values) => values.sort((a, b) => a - b)[Math.floor(values.length / 2)];

export class Ground {
  constructor(map) {
    this.map = map;
    this.items = L.layerGroup().addTo(map);
    this.labels = L.layerGroup().addTo(map);
    this.cities = [];
    for (const [name, level] of [
      ["land", 210],
      ["covered", 220],
      ["dots", 230],
      ["names", 240],
    ])
      map.createPane(name).style.zIndex = level;
    const tiles = $("meta[name=map-tiles]");
    if (tiles) this.tiles(tiles.content, tiles.dataset.attribution);
    else this.land();
    map.on("zoomend", () => this.names());
  }

  tiles(url, attribution) {
    L.tileLayer(url, { attribution: h("span", {}, attribution).innerHTML, maxZoom: 19, referrerPolicy: "origin" }).addTo(this.map);
  }

  async land() {
    this.map.attributionControl?.addAttribution("Natural Earth");
    try {
      const found = await (await fetch(new URL("./vendor/land.json", import.meta.url))).json();
      L.geoJSON(found, {
        pane: "land",
        interactive: false,
        style: ({ properties }) => ({ className: properties.kind, weight: 1, fill: properties.kind === "land" }),
      }).addTo(this.map);
    } catch {
      // The map is shown without land.
    }
  }

  /** Draws the items of the catalogue as dots, over the area that they cover. */
  show(items, marked) {
    this.items.clearLayers();
    const points = items.map(at);
    const reach = 1000 * Math.max(REACH[0], Math.min(REACH[1], SPREAD * spacing(points)));
    for (const point of points) {
      L.circle(point, { radius: reach, pane: "covered", className: "covered", interactive: false, stroke: false }).addTo(
        this.items,
      );
    }
    for (const item of items.filter((one) => !marked.has(one.item_id)))
      L.circleMarker(at(item), { radius: 2.5, pane: "dots", className: "dot", interactive: false, stroke: false }).addTo(
        this.items,
      );
    const cities = Map.groupBy(
      items.filter((item) => item.city),
      (item) => item.city,
    );
    this.cities = [...cities]
      .filter(([, members]) => members.length >= CITY_ITEMS)
      .sort((a, b) => b[1].length - a[1].length)
      .map(([name, members]) => ({
        name,
        at: [middleOf(members.map((one) => one.latitude)), middleOf(members.map((one) => one.longitude))],
      }));
    this.names();
  }

  /** Names the largest cities that do not lie on each other. */
  names() {
    this.labels.clearLayers();
    const points = this.cities.map((city) => ({ ...this.map.project(city.at), ...city, x: this.map.project(city.at).x }));
    for (const { members } of grouped(points, LABEL_GAP)) {
      const icon = L.divIcon({ className: "city", html: h("span", {}, members[0].name), iconSize: [0, 0] });
      L.marker(members[0].at, { icon, pane: "names", interactive: false, keyboard: false }).addTo(this.labels);
    }
  }
}
