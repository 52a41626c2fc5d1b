"""docs/metrics.md, from the table: `python -m monitoring.documentation docs/metrics.md`."""

import sys
from pathlib import Path

from monitoring.metrics import GROUPS, Metric

_HEAD = """# Metrics

Written by `python -m monitoring.documentation docs/metrics.md` from `monitoring/metrics.py`; a test holds
the two together. Change the table there, not this page.

## Where they are

Every replica and every request router serves its own figures over HTTP: the first process of a host on port
9464, each further one on the next free port (`serving.metrics` in the configuration: `port`, `host`,
`targets_dir`). Scrape all of them. `GET /metrics` of the server shows those of the replica that happens to
answer: good for a look, useless for Prometheus, which would take the replicas' counters for one that jumps.

- Kubernetes: a PodMonitor on the container ports 9464 and up (one replica a pod has 9464; a pod with a
  proxy has routers besides). `host` must be 0.0.0.0 there.
- Bare machines: `file_sd_configs` on `targets_dir`, where each process keeps a file while it lives, or
  static targets.

Ray's own metrics agent exports Ray's figures (`ray_*`: nodes, actors, Serve's proxies) and none of these.
Its client takes one observation a call; there is no way to hand it a step's tokens at once, and a fast
engine makes tens of thousands a second. It would also give every figure a second name. Nothing here has a
':' in its name, so that the names would survive its prefix if that changes.

Tokens are not observed one by one: the engine adds up each step's gaps, the replica takes the sums in twice
a second (`peregrine bench metrics` measures what that costs). Series whose labels are known from the
configuration exist from the start, at 0. Everything is in base units.

On one machine, with `serving.metrics.targets_dir: /run/peregrine/targets`, Prometheus' configuration is:

    rule_files: [rules.yaml]  # of `peregrine alerts export rules.yaml`
    scrape_configs:
      - job_name: peregrine
        file_sd_configs: [{files: [/run/peregrine/targets/*.json], refresh_interval: 5s}]

Limits of the gap between tokens, above which the alert rules count it as missed, are those of the built-in
tiers (`monitoring/alerts/objectives.py`); a tier of one's own has its deadline watched alone, until a limit
is added there."""

_TAIL = """## For a Gateway API InferencePool

A replica is a model server in the sense of the Gateway API Inference Extension's model server protocol. Its
endpoint picker is told the names, and the metrics port of the replica (`--model-server-metrics-port=9464`).

| the protocol's | here | flag of the endpoint picker |
|---|---|---|
| TotalQueuedRequests | `peregrine_requests_waiting` | `--total-queued-requests-metric` |
| TotalRunningRequests | `peregrine_requests_running` | `--total-running-requests-metric` |
| KVCacheUtilization | `peregrine_kv_usage_ratio` | `--kv-cache-usage-percentage-metric` |
| BlockSize, NumGPUBlocks (labels) | `peregrine_kv_cache_info` | `--cache-info-metric` |
| LoRA info (only with LoRA) | none: Peregrine serves no adapters | `--lora-info-metric=""` |
"""


def page() -> str:
    """The whole page."""
    groups = [f"## {title}\n\n{_table(metrics)}" for title, metrics in GROUPS.items()]
    return "\n".join([_HEAD + "\n", *groups, _TAIL])


def _table(metrics: tuple[Metric, ...]) -> str:
    """Of one group; histograms' bounds stand below it."""
    lines = ["| name | type | unit | labels | meaning |", "|---|---|---|---|---|"]
    bounds: dict[tuple[float, ...], list[str]] = {}
    for metric in metrics:
        labels = ", ".join(_label(metric, label) for label in metric.labels) or "–"
        lines.append(f"| `{metric.name}` | {metric.kind} | {metric.unit or '–'} | {labels} | {metric.help} |")
        if metric.buckets:
            bounds.setdefault(metric.buckets, []).append(f"`{metric.name}`")
    for buckets, names in bounds.items():
        shown = ", ".join(f"{bound:g}" for bound in buckets)
        lines += ["", f"Buckets of {', '.join(names)}: {shown}."]
    return "\n".join(lines) + "\n"


def _label(metric: Metric, label: str) -> str:
    values = metric.known.get(label)
    return f"`{label}`" if values is None else f"`{label}` ({', '.join(values)})"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
