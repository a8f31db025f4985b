// Converts degrees, kilometres and pixels. A location is [latitude, longitude] in degrees; a view is {lat, lon, scale}: its centre
// and the pixels per kilometre there. The projection is flat around the centre: accurate for a town, approximate for a country.

const KM_PER_DEGREE = 111.2;
const EARTH_KM = 6371;
export const SCALES = [0.02, 600];
const RECENT = 100; // last events that give the home location, as on the server
const GAP = 3; // a location this many times as far as the previous one belongs to another town
const TOWN_KM = 3;
const LEAST_KM = 1.2;

const rad = (degrees) => (degrees * Math.PI) / 180;
const shrink = (lat) => Math.max(0.05, Math.cos(rad(lat)));

export function distance(a, b) {
  const h = Math.sin(rad(b[0] - a[0]) / 2) ** 2 + Math.cos(rad(a[0])) * Math.cos(rad(b[0])) * Math.sin(rad(b[1] - a[1]) / 2) ** 2;
  return 2 * EARTH_KM * Math.asin(Math.sqrt(Math.min(1, h)));
}

export const toPixels = (view, size, [lat, lon]) => [
  size.width / 2 + (lon - view.lon) * KM_PER_DEGREE * shrink(view.lat) * view.scale,
  size.height / 2 - (lat - view.lat) * KM_PER_DEGREE * view.scale,
];

export const toPlace = (view, size, [x, y]) => [
  Math.max(-90, Math.min(90, view.lat - (y - size.height / 2) / (KM_PER_DEGREE * view.scale))),
  Math.max(-180, Math.min(180, view.lon + (x - size.width / 2) / (KM_PER_DEGREE * shrink(view.lat) * view.scale))),
];

/** The location with the smallest total distance to all others; null without locations. */
export function middle(places) {
  const recent = places.slice(-RECENT);
  const total = (place) => recent.reduce((sum, other) => sum + distance(place, other), 0);
  return recent.length ? recent.map((place) => [total(place), place]).reduce((a, b) => (b[0] < a[0] ? b : a))[1] : null;
}

/** The locations around the centre of `places`, up to the first gap, beyond which another town begins. */
export function core(places) {
  const centre = middle(places);
  if (!centre) return [];
  const far = new Map(places.map((place) => [place, distance(place, centre)]));
  const ordered = [...places].sort((a, b) => far.get(a) - far.get(b));
  const gap = ordered.findIndex((place, n) => n > 0 && far.get(place) > GAP * Math.max(TOWN_KM, far.get(ordered[n - 1])));
  return gap < 0 ? ordered : ordered.slice(0, gap);
}

/** The view that shows all `places` with `margin` pixels around. */
export function fitted(places, size, margin) {
  const lats = places.map((place) => place[0]);
  const lons = places.map((place) => place[1]);
  const [south, north, west, east] = [Math.min(...lats), Math.max(...lats), Math.min(...lons), Math.max(...lons)];
  const lat = (south + north) / 2;
  const tall = Math.max(LEAST_KM, (north - south) * KM_PER_DEGREE);
  const wide = Math.max(LEAST_KM, (east - west) * KM_PER_DEGREE * shrink(lat));
  const room = (length) => Math.max(40, length - 2 * margin);
  return { lat, lon: (west + east) / 2, scale: within(SCALES, Math.min(room(size.width) / wide, room(size.height) / tall)) };
}

/** The view after zooming by `factor`, with the pixel `at` staying over the same location. */
export function zoomed(view, size, factor, at = [size.width / 2, size.height / 2]) {
  const scale = within(SCALES, view.scale * factor);
  const place = toPlace(view, size, at);
  const moved = toPixels({ ...view, scale }, size, place);
  return panned({ ...view, scale }, size, [at[0] - moved[0], at[1] - moved[1]]);
}

/** The view after its content moved by [dx, dy] pixels. */
export function panned(view, size, [dx, dy]) {
  const [lat, lon] = toPlace(view, size, [size.width / 2 - dx, size.height / 2 - dy]);
  return { ...view, lat, lon };
}

/** The grid lines of the view: [degrees, pixel] for each line along each axis, about 110 pixels apart. */
export function grid(view, size) {
  const [north, west] = toPlace(view, size, [0, 0]);
  const [south, east] = toPlace(view, size, [size.width, size.height]);
  const line = (low, high, length, at) => {
    const step = round(((high - low) * 110) / length);
    const first = Math.ceil(low / step);
    const lines = Array.from({ length: Math.max(0, Math.floor(high / step) - first + 1) }, (_, n) => (first + n) * step);
    return { step, lines: lines.map((degrees) => [degrees, at(degrees)]) };
  };
  return {
    rows: line(south, north, size.height, (lat) => toPixels(view, size, [lat, view.lon])[1]),
    columns: line(west, east, size.width, (lon) => toPixels(view, size, [view.lat, lon])[0]),
  };
}

/** A round number of kilometres that takes at most `most` pixels, and its width in pixels. */
export function bar(view, most) {
  const length = [5, 2, 1].map((n) => n * 10 ** Math.floor(Math.log10(most / view.scale))).find((n) => n * view.scale <= most);
  return { km: length, pixels: length * view.scale };
}

function round(step) {
  const power = 10 ** Math.floor(Math.log10(step));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= step * 0.999);
}

const within = ([low, high], value) => Math.max(low, Math.min(high, value));
