// Distances, the centre of a history, and groups of pins. A location is [latitude, longitude] in degrees.

const EARTH_KM = 6371;
const RECENT = 100; // last events that give the home location, as on the server
const GAP = 3; // a location this many times as far as the previous one belongs to another town
const TOWN_KM = 3;

const rad = (degrees) => (degrees * Math.PI) / 180;

/** Kilometres between two locations. */
export function distance(a, b) {
  const h = Math.sin(rad(b[0] - a[0]) / 2) ** 2 + Math.cos(rad(a[0])) * Math.cos(rad(b[0])) * Math.sin(rad(b[1] - a[1]) / 2) ** 2;
  return 2 * EARTH_KM * Math.asin(Math.sqrt(Math.min(1, h)));
}

/** The location with the smallest total distance to all others; null without locations. */
export function middle(points) {
  const recent = points.slice(-RECENT);
  const total = (point) => recent.reduce((sum, other) => sum + distance(point, other), 0);
  return recent.length ? recent.map((point) => [total(point), point]).reduce((a, b) => (b[0] < a[0] ? b : a))[1] : null;
}

/** The locations around the centre of `points`, up to the first gap, beyond which another town begins. */
export function core(points) {
  const centre = middle(points);
  if (!centre) return [];
  const far = new Map(points.map((point) => [point, distance(point, centre)]));
  const sorted = [...points].sort((a, b) => far.get(a) - far.get(b));
  const gap = sorted.findIndex((point, n) => n > 0 && far.get(point) > GAP * Math.max(TOWN_KM, far.get(sorted[n - 1])));
  return gap < 0 ? sorted : sorted.slice(0, gap);
}

/**
 * Groups points ({x, y}, pixels), the most important first, so that no two groups are nearer than `gap`: each point joins the nearest
 * group within the gap, or begins one.
 */
export function grouped(points, gap) {
  const groups = [];
  for (const point of points) {
    const far = (group) => Math.hypot(group.x - point.x, group.y - point.y);
    const near = groups.filter((group) => far(group) < gap).sort((a, b) => far(a) - far(b))[0];
    if (near) near.members.push(point);
    else groups.push({ x: point.x, y: point.y, members: [point] });
  }
  return groups;
}

/** The median distance (km) of a location to its nearest neighbour, from at most 200 of them. */
export function spacing(points) {
  const some = points.slice(0, 200);
  const nearest = some.map((point) => Math.min(...some.filter((other) => other !== point).map((other) => distance(point, other))));
  return nearest.sort((a, b) => a - b)[Math.floor(nearest.length / 2)] ?? 0;
}
