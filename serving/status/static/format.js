// Numbers as people read them. A dash stands for what was not measured.

export const NONE = "–";

export function milliseconds(value) {
  if (value === null) return NONE;
  if (value < 10) return value.toFixed(1);
  return Math.round(value).toLocaleString("en");
}

export function rate(value) {
  return value < 10 && value > 0 ? value.toFixed(1) : Math.round(value).toLocaleString("en");
}

export function count(value) {
  if (value >= 1e9) return `${(value / 1e9).toFixed(1)}B`;
  if (value >= 1e6) return `${Math.round(value / 1e6)}M`;
  return value.toLocaleString("en");
}

export function percent(ratio) {
  if (ratio === null) return NONE;
  // 99.96% is not all of them.
  const digits = ratio < 1 && ratio > 0.99 ? 1 : 0;
  const text = (Math.floor(ratio * 100 * 10 ** digits) / 10 ** digits).toFixed(digits);
  return `${text}%`;
}

export function duration(seconds) {
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}

export function time(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString("en-GB");
}
