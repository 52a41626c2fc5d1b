"""What a replica's engine does: steps and their floor, phases, KV cache, speculation."""

from monitoring.dashboards.spec import QUERY as q
from monitoring.dashboards.spec import Dashboard, Panel, Row, Target

_STEP = "peregrine_engine_step_seconds"
_DRAFTS = "peregrine_spec_decode_num_drafts_total"
_DRAFTED, _ACCEPTED = (f"peregrine_spec_decode_num_{kind}_tokens_total" for kind in ("draft", "accepted"))
_BY_INSTANCE = ("instance",)

ENGINE = Dashboard(
    "peregrine-engine",
    "Peregrine / Engine",
    "Steps against the memory's floor, queue, prefill and decode, KV cache, speculation.",
    (
        Row(
            "Steps",
            (
                Panel(
                    "Step time p50 and p99",
                    "By whether the step computed prompt tokens beside its decodes, alone, or none.",
                    "s",
                    (
                        Target(q.quantile(0.5, _STEP, by=("kind",)), "{{kind}} p50"),
                        Target(q.quantile(0.99, _STEP, by=("kind",)), "{{kind}} p99"),
                    ),
                ),
                Panel(
                    "Share of the floor",
                    "Time to read the weights once, over what a decode step takes. 1 is the memory's limit.",
                    "percentunit",
                    (Target(q.series("peregrine_decode_floor_ratio"), "{{instance}}"),),
                    maximum=1,
                ),
                Panel(
                    "Decode step and floor",
                    "Mean decode step beside the time to read all weights once.",
                    "s",
                    (
                        Target(q.mean(_STEP, 'kind="decode"'), "decode step"),
                        Target(f"max({q.series('peregrine_decode_floor_seconds')})", "floor"),
                    ),
                ),
                Panel(
                    "Steps",
                    "A second, by replica.",
                    "short",
                    (Target(q.sum_rate("peregrine_engine_steps_total", by=_BY_INSTANCE), "{{instance}}"),),
                ),
                Panel(
                    "Batch",
                    "Sequences that run together, by replica.",
                    "short",
                    (Target(q.series("peregrine_requests_running"), "{{instance}}"),),
                ),
                Panel(
                    "Output tokens",
                    "A second, by replica.",
                    "short",
                    (Target(q.sum_rate("peregrine_output_tokens_total", by=_BY_INSTANCE), "{{instance}}"),),
                ),
            ),
        ),
        Row(
            "Phases of a request",
            (
                Panel(
                    "Queue p99",
                    "Arrival to first scheduling, by tier.",
                    "s",
                    (Target(q.quantile(0.99, "peregrine_queue_wait_seconds", by=("tier",)), "{{tier}}"),),
                    width=6,
                ),
                Panel(
                    "Prefill p99",
                    "First scheduling to first token, by tier.",
                    "s",
                    (Target(q.quantile(0.99, "peregrine_prefill_seconds", by=("tier",)), "{{tier}}"),),
                    width=6,
                ),
                Panel(
                    "Decode p99",
                    "First to last token, by tier.",
                    "s",
                    (Target(q.quantile(0.99, "peregrine_decode_seconds", by=("tier",)), "{{tier}}"),),
                    width=6,
                ),
                Panel(
                    "TPOT p99",
                    "Mean time per output token of each sequence, by tier.",
                    "s",
                    (Target(q.quantile(0.99, "peregrine_tpot_seconds", by=("tier",)), "{{tier}}"),),
                    width=6,
                ),
                Panel(
                    "Queued sequences",
                    "By replica; and those of them that ran before and gave up their blocks.",
                    "short",
                    (
                        Target(q.series("peregrine_requests_waiting"), "{{instance}}"),
                        Target(q.series("peregrine_requests_preempted"), "{{instance}} preempted"),
                    ),
                    width=12,
                ),
                Panel(
                    "Prompt tokens to compute",
                    "By replica.",
                    "short",
                    (Target(q.series("peregrine_waiting_tokens"), "{{instance}}"),),
                    width=12,
                ),
            ),
        ),
        Row(
            "KV cache",
            (
                Panel(
                    "Use",
                    "Share of the blocks that sequences hold, by replica.",
                    "percentunit",
                    (Target(q.series("peregrine_kv_usage_ratio"), "{{instance}}"),),
                    width=6,
                    limits=(0.8, 0.95),
                    maximum=1,
                ),
                Panel(
                    "Blocks",
                    "Held by sequences, kept for prefix hits, empty.",
                    "short",
                    (Target(q.total("peregrine_kv_blocks", by=("state",)), "{{state}}"),),
                    width=6,
                ),
                Panel(
                    "Prefix hits",
                    "Share of prompt tokens that were not computed again.",
                    "percentunit",
                    (
                        Target(
                            f"{q.sum_rate('peregrine_cached_tokens_total')} / "
                            f"{q.sum_rate('peregrine_prompt_tokens_total')}",
                            "hits",
                        ),
                    ),
                    width=6,
                    maximum=1,
                ),
                Panel(
                    "Preemptions",
                    "A second: sequences that gave their blocks to others and compute them again.",
                    "short",
                    (Target(q.sum_rate("peregrine_preemptions_total", by=_BY_INSTANCE), "{{instance}}"),),
                    width=6,
                ),
            ),
        ),
        Row(
            "Speculation",
            (
                Panel(
                    "Drafts accepted",
                    "Share of drafted tokens that were.",
                    "percentunit",
                    (Target(f"{q.sum_rate(_ACCEPTED)} / {q.sum_rate(_DRAFTED)}", "accepted"),),
                    maximum=1,
                ),
                Panel(
                    "Tokens a verification",
                    "Mean number that a verified draft brought; 1 would be plain decoding.",
                    "short",
                    (Target(f"1 + {q.sum_rate(_ACCEPTED)} / {q.sum_rate(_DRAFTS)}", "tokens"),),
                ),
                Panel(
                    "Drafted tokens",
                    "A second.",
                    "short",
                    (Target(q.sum_rate(_DRAFTED), "drafted"), Target(q.sum_rate(_ACCEPTED), "accepted")),
                ),
            ),
        ),
    ),
)
