// Reads the Prometheus metrics of the server.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

export class Metrics {
  constructor(text) {
    this.samples = new Map();
    for (const line of text.split("\n")) {
      const found = line.startsWith("#") ? null : LINE.exec(line);
      if (!found) continue;
      const labels = Object.fromEntries([...(found[2] ?? "").matchAll(LABEL)].map(([, name, value]) => [name, value]));
      if (!this.samples.has(found[1])) this.samples.set(found[1], []);
      this.samples.get(found[1]).push({ labels, value: Number(found[3]) });
    }
  }

  /** The value of a metric without labels; null if there is none. */
  value(name) {
    return this.samples.get(name)?.[0]?.value ?? null;
  }

  /** [label value, sum] of a metric, largest first. */
  by(name, label) {
    const sums = new Map();
    for (const { labels, value } of this.samples.get(name) ?? []) sums.set(labels[label], (sums.get(labels[label]) ?? 0) + value);
    return [...sums].sort((a, b) => b[1] - a[1]);
  }

  /** A quantile of a histogram of seconds, interpolated within its bucket; null without observations. */
  quantile(name, share, labels = {}) {
    const own = (sample) => Object.entries(labels).every(([key, value]) => sample.labels[key] === value);
    const buckets = (this.samples.get(`${name}_bucket`) ?? [])
      .filter(own)
      .map(({ labels: { le }, value }) => [Number(le.replace("+Inf", "Infinity")), value]);
    buckets.sort((a, b) => a[0] - b[0]);
    const wanted = share * (buckets.at(-1)?.[1] ?? 0);
    if (!wanted) return null;
    const n = buckets.findIndex(([, upTo]) => upTo >= wanted);
    const [low, before] = n ? buckets[n - 1] : [0, 0];
    const [high, upTo] = buckets[n];
    return Number.isFinite(high) ? low + ((high - low) * (wanted - before)) / (upTo - before) : low;
  }
}
