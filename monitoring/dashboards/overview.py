"""Is it well: traffic, latency, attainment, goodput, errors."""

from monitoring.dashboards.spec import QUERY as q
from monitoring.dashboards.spec import Dashboard, Panel, Row, Target

_TTFT, _ITL = "peregrine_ttft_seconds", "peregrine_itl_seconds"
_DEADLINES, _HTTP = "peregrine_ttft_deadlines_total", "peregrine_http_requests_total"
_KEPT = 'kept="yes"'
_ERRORS = 'status=~"5.."'

OVERVIEW = Dashboard(
    "peregrine-overview",
    "Peregrine / Overview",
    "Traffic, time to first token, inter-token latency, deadlines kept, goodput, errors.",
    (
        Row(
            "Now",
            (
                Panel(
                    "Requests",
                    "HTTP responses a second.",
                    "reqps",
                    (Target(q.sum_rate(_HTTP), "requests"),),
                    "number",
                    4,
                ),
                Panel(
                    "Output tokens",
                    "Tokens generated a second, over all replicas.",
                    "short",
                    (Target(q.sum_rate("peregrine_output_tokens_total"), "tokens/s"),),
                    "number",
                    4,
                ),
                Panel(
                    "TTFT p99",
                    "Time to first token, all tiers.",
                    "s",
                    (Target(q.quantile(0.99, _TTFT), "p99"),),
                    "number",
                    4,
                ),
                Panel(
                    "ITL p99",
                    "Time between neighbouring tokens, all tiers.",
                    "s",
                    (Target(q.quantile(0.99, _ITL), "p99"),),
                    "number",
                    4,
                ),
                Panel(
                    "Deadlines kept",
                    "Share of first tokens that came within their tier's time.",
                    "percentunit",
                    (Target(f"{q.sum_rate(_DEADLINES, _KEPT)} / {q.sum_rate(_DEADLINES)}", "kept"),),
                    "number",
                    4,
                    limits=(0.99, 0.95),
                    maximum=1,
                ),
                Panel(
                    "Replicas",
                    "Replicas that are loaded, warm and not leaving.",
                    "short",
                    (Target(q.total("peregrine_replica_ready"), "ready"),),
                    "number",
                    4,
                ),
            ),
        ),
        Row(
            "Traffic",
            (
                Panel(
                    "Requests by route",
                    "HTTP responses a second.",
                    "reqps",
                    (Target(q.sum_rate(_HTTP, by=("route",)), "{{route}}"),),
                ),
                Panel(
                    "Tokens",
                    "A second: prompts', those of them found in the prefix cache, and generated ones.",
                    "short",
                    (
                        Target(q.sum_rate("peregrine_prompt_tokens_total"), "prompt"),
                        Target(q.sum_rate("peregrine_cached_tokens_total"), "cached"),
                        Target(q.sum_rate("peregrine_output_tokens_total"), "output"),
                    ),
                ),
                Panel(
                    "In flight",
                    "Requests admitted, sequences in the batch, sequences queued in the engines.",
                    "short",
                    (
                        Target(q.total("peregrine_requests_inflight"), "in flight"),
                        Target(q.total("peregrine_requests_running"), "running"),
                        Target(q.total("peregrine_requests_waiting"), "waiting"),
                    ),
                ),
            ),
        ),
        Row(
            "Latency",
            (
                Panel(
                    "TTFT",
                    "Arrival to first token, all tiers.",
                    "s",
                    tuple(Target(q.quantile(p, _TTFT), f"p{p * 100:g}") for p in (0.5, 0.95, 0.99)),
                    width=6,
                ),
                Panel(
                    "TTFT p99 by tier",
                    "Arrival to first token.",
                    "s",
                    (Target(q.quantile(0.99, _TTFT, by=("tier",)), "{{tier}}"),),
                    width=6,
                ),
                Panel(
                    "ITL",
                    "Between neighbouring tokens of a sequence, all tiers.",
                    "s",
                    tuple(Target(q.quantile(p, _ITL), f"p{p * 100:g}") for p in (0.5, 0.95, 0.99)),
                    width=6,
                ),
                Panel(
                    "ITL p99 by tier",
                    "Between neighbouring tokens of a sequence.",
                    "s",
                    (Target(q.quantile(0.99, _ITL, by=("tier",)), "{{tier}}"),),
                    width=6,
                ),
                Panel(
                    "End to end p99 by tier",
                    "Arrival to last token.",
                    "s",
                    (Target(q.quantile(0.99, "peregrine_e2e_seconds", by=("tier",)), "{{tier}}"),),
                    width=12,
                ),
                Panel(
                    "Whole HTTP exchanges p99",
                    "From the first byte of the request to the last of the response, by route.",
                    "s",
                    (Target(q.quantile(0.99, "peregrine_http_request_seconds", by=("route",)), "{{route}}"),),
                    width=12,
                ),
            ),
        ),
        Row(
            "Promises",
            (
                Panel(
                    "Deadlines kept by tier",
                    "Share of first tokens within the tier's time.",
                    "percentunit",
                    (
                        Target(
                            f"{q.sum_rate(_DEADLINES, _KEPT, ('tier',))} / "
                            f"{q.sum_rate(_DEADLINES, by=('tier',))}",
                            "{{tier}}",
                        ),
                    ),
                    maximum=1,
                ),
                Panel(
                    "Goodput, requests",
                    "First tokens a second that kept their deadline.",
                    "reqps",
                    (Target(q.sum_rate(_DEADLINES, _KEPT, ("tier",)), "{{tier}}"),),
                ),
                Panel(
                    "Goodput, tokens",
                    "Output tokens a second of answers whose first token kept its deadline.",
                    "short",
                    (Target(q.sum_rate("peregrine_goodput_tokens_total", by=("tier",)), "{{tier}}"),),
                ),
            ),
        ),
        Row(
            "Errors",
            (
                Panel(
                    "Failed",
                    "Share of HTTP responses with a status of 500 or above.",
                    "percentunit",
                    (Target(f"({q.sum_rate(_HTTP, _ERRORS)} or vector(0)) / {q.sum_rate(_HTTP)}", "failed"),),
                ),
                Panel(
                    "Refused",
                    "Requests a second that got a 429, by reason.",
                    "reqps",
                    (Target(q.sum_rate("peregrine_refusals_total", by=("reason",)), "{{reason}}"),),
                ),
                Panel(
                    "Ends",
                    "Finished sequences a second, by why they ended.",
                    "reqps",
                    (
                        Target(
                            q.sum_rate("peregrine_requests_total", by=("finish_reason",)), "{{finish_reason}}"
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Tenants",
            (
                Panel(
                    "Requests by tenant",
                    "Admitted requests a second.",
                    "reqps",
                    (Target(q.sum_rate("peregrine_tenant_requests_total", by=("tenant",)), "{{tenant}}"),),
                    width=6,
                ),
                Panel(
                    "Tokens by tenant",
                    "A second: prompts' and generated ones.",
                    "short",
                    (
                        Target(
                            q.sum_rate("peregrine_tenant_prompt_tokens_total", by=("tenant",)),
                            "{{tenant}} prompt",
                        ),
                        Target(
                            q.sum_rate("peregrine_tenant_output_tokens_total", by=("tenant",)),
                            "{{tenant}} output",
                        ),
                    ),
                    width=6,
                ),
                Panel(
                    "Refused by tenant",
                    "Requests a second over a limit, or for a model or tier that is not the tenant's.",
                    "reqps",
                    (
                        Target(
                            q.sum_rate("peregrine_tenant_refusals_total", by=("tenant", "reason")),
                            "{{tenant}} {{reason}}",
                        ),
                    ),
                    width=6,
                ),
                Panel(
                    "Ledger",
                    "Replicas connected to the ledger of the limits; without tenants there is none.",
                    "short",
                    (Target(q.total("peregrine_tenant_ledger_connected"), "connected"),),
                    width=6,
                ),
            ),
        ),
    ),
)
