// Numbers as people read them. null and undefined, which stand for "not known", are a dash.

const DASH = "–";

export function count(value, digits = 0) {
  if (value === null || value === undefined || !Number.isFinite(value)) return DASH;
  return value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
}

/** A number and what it counts: `1 turn`, `2 turns`. */
export function some(number, what) {
  return `${count(number)} ${what}${number === 1 ? "" : "s"}`;
}

/** Milliseconds, with a unit that suits them. */
export function duration(ms) {
  if (ms === null || ms === undefined || !Number.isFinite(ms)) return DASH;
  if (ms >= 60_000) return `${count(ms / 60_000, 1)} min`;
  if (ms >= 1000) return `${count(ms / 1000, 2)} s`;
  return `${count(ms, ms < 10 ? 2 : ms < 100 ? 1 : 0)} ms`;
}

export function percent(share) {
  if (share === null || share === undefined || !Number.isFinite(share)) return DASH;
  return `${count(100 * share, share > 0 && share < 0.01 ? 2 : 0)} %`;
}

/** How long ago, or how far ahead, a time in seconds since the epoch is. */
export function span(seconds) {
  const s = Math.abs(seconds);
  if (s < 90) return `${Math.round(s)} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  return s < 172_800 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86_400)} days`;
}
