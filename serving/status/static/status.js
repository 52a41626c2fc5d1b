// Asks for the figures once a second while somebody looks, and draws them.

import { NONE, count, duration, milliseconds, percent, rate, time } from "./format.js";

const PERIOD_MS = 1000;
const RETRY_MS = 3000;
const TIMEOUT_MS = 5000;

const element = (id) => document.getElementById(id);
const say = (id, text) => {
  const node = element(id);
  if (node.textContent !== text) node.textContent = text;
};

let lastHeard = null;
let tiersShown = "";

function header(status) {
  const model = status.model;
  if (model === null) {
    say("what", "The model is loading.");
    return;
  }
  const parts = [model.name];
  if (model.parameters > 0) parts.push(`${count(model.parameters)} parameters`);
  if (model.bits_per_weight !== null) parts.push(`${model.bits_per_weight} bits a weight (${model.weight_format})`);
  const dtype = status.kv_dtype === "auto" ? "" : ` ${status.kv_dtype}`;
  parts.push(`KV cache ${count(status.kv_tokens)} tokens${dtype}`);
  say("what", parts.join(" · "));
  say("version", `Peregrine ${status.version}`);
  document.title = `${model.name} – Peregrine`;
}

function figures(status) {
  for (const name of ["ttft", "itl"]) {
    for (const share of ["p50", "p90", "p99"]) say(`${name}-${share}`, milliseconds(status[`${name}_ms`][share]));
  }
  say("tokens-per-s", rate(status.tokens_per_s));
  say("running", String(status.running));
  say("waiting", String(status.waiting));
  say("kv-share", percent(status.kv_tokens ? status.kv_used_tokens / status.kv_tokens : null));
  series(status.tokens_per_s_series);
}

function series(values) {
  const top = Math.max(...values, 1);
  const step = 120 / Math.max(1, values.length - 1);
  const points = values.map((v, i) => `${(i * step).toFixed(1)} ${(23 - (22 * v) / top).toFixed(1)}`);
  element("series").querySelector("path").setAttribute("d", `M${points.join("L")}`);
}

// Rows are kept and their cells changed, so that a selection or a screen reader's place is not lost.
function table(id, rows) {
  const body = element(id);
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((cells, i) => {
    const row = body.rows[i] ?? body.insertRow();
    cells.forEach(([text, style = "", hint = ""], j) => {
      const cell = row.cells[j] ?? row.insertCell();
      if (cell.textContent !== text) cell.textContent = text;
      if (cell.className !== style) cell.className = style;
      if (cell.title !== hint) cell.title = hint;
    });
  });
}

const STATES = { ready: "good", loading: "warn", draining: "warn", silent: "bad" };
const OUTCOMES = { finished: "good", aborted: "muted", refused: "warn", invalid: "warn", failed: "bad" };

function attainmentStyle(ratio) {
  if (ratio === null) return "";
  return ratio >= 0.99 ? "good" : ratio >= 0.9 ? "warn" : "bad";
}

function details(status) {
  table("replicas", status.replicas.map((r) => [
    [r.replica, "id", r.replica], [r.condition, STATES[r.condition] ?? ""], [String(r.running), "n"],
    [String(r.waiting), "n"], [rate(r.tokens_per_s), "n"], [milliseconds(r.ttft_ms.p50), "n wide"],
    [percent(r.kv_used_ratio), "n wide"], [duration(r.uptime_s), "n wide"],
  ]));
  table("tiers", status.tiers.map((t) => [
    [t.tier], [Math.round(t.ttft_limit_ms).toLocaleString("en"), "n"],
    [percent(t.attainment), `n ${attainmentStyle(t.attainment)}`], [String(t.kept), "n wide"],
    [String(t.late), "n"], [String(t.refused), "n"], [String(t.failed), "n wide"],
  ]));
  table("recent", status.recent.map((r) => [
    [time(r.ended_at)], [r.request_id, "id wide", r.request_id], [r.tier], [r.outcome, OUTCOMES[r.outcome] ?? ""],
    [`${r.prompt_tokens}, ${r.output_tokens}`, "n"], [milliseconds(r.ttft_ms), "n"],
    [r.tokens_per_s === null ? NONE : rate(r.tokens_per_s), "n wide"], [(r.total_ms / 1000).toFixed(2), "n wide"],
  ]));
  element("recent-empty").hidden = status.recent.length > 0;
}

function chatOptions(status) {
  element("key-row").hidden = !status.needs_api_key;
  const names = status.tiers.map((t) => t.tier);
  if (names.join() === tiersShown) return;
  tiersShown = names.join();
  const select = element("tier");
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  select.value = names.includes(chosen) ? chosen : "default";
}

function live(isLive) {
  document.body.classList.toggle("is-live", isLive);
  document.body.classList.toggle("is-lost", !isLive);
  const since = lastHeard === null ? "" : ` since ${time(lastHeard / 1000)}`;
  say("live-text", isLive ? "live" : `no answer${since}`);
}

async function turn() {
  if (document.hidden) return; // visibilitychange goes on
  let wait = PERIOD_MS;
  try {
    const response = await fetch("status.json", { signal: AbortSignal.timeout(TIMEOUT_MS) });
    if (!response.ok) throw new Error(String(response.status));
    const status = await response.json();
    lastHeard = Date.now();
    header(status);
    figures(status);
    details(status);
    chatOptions(status);
    live(true);
  } catch {
    live(false);
    wait = RETRY_MS;
  }
  clearTimeout(timer);
  timer = setTimeout(turn, wait);
}

let timer = 0;
document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  turn();
});
turn();
