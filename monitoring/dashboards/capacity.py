"""What it takes and what it costs. Each replica has one GPU; without GPUs a replica stands for one."""

from monitoring.dashboards.spec import QUERY as q
from monitoring.dashboards.spec import Dashboard, Panel, Row, Target, Textbox

_TOKENS_S = q.sum_rate("peregrine_output_tokens_total")
_GPUS = f"count({q.series('peregrine_replica_ready')})"
_TOKENS_PER_GPU_HOUR = f"3600 * {_TOKENS_S} / {_GPUS}"

CAPACITY = Dashboard(
    "peregrine-capacity",
    "Peregrine / Capacity and cost",
    "Tokens per GPU-hour, joules per token, cost, room left, GPUs.",
    (
        Row(
            "Cost",
            (
                Panel(
                    "Tokens per GPU-hour",
                    "Output tokens of an hour at the present rate, over replicas, which have one GPU each.",
                    "short",
                    (Target(_TOKENS_PER_GPU_HOUR, "tokens"),),
                    width=6,
                ),
                Panel(
                    "Joules per token",
                    "Power of all GPUs over output tokens a second.",
                    "joule",
                    (Target(f"{q.total('peregrine_gpu_power_watts')} / {_TOKENS_S}", "joules"),),
                    width=6,
                ),
                Panel(
                    "Cost of a million output tokens",
                    "At the price of a GPU-hour given above, in its currency.",
                    "short",
                    (Target(f"1e6 * $gpu_hour_price / ({_TOKENS_PER_GPU_HOUR})", "cost"),),
                    width=6,
                ),
                Panel(
                    "Goodput per GPU-hour",
                    "The same for tokens of answers that kept their deadline.",
                    "short",
                    (Target(f"3600 * {q.sum_rate('peregrine_goodput_tokens_total')} / {_GPUS}", "tokens"),),
                    width=6,
                ),
            ),
        ),
        Row(
            "Room",
            (
                Panel(
                    "Replicas",
                    "Ready ones by what they run.",
                    "short",
                    (
                        Target(
                            f"sum by (model, weight_format, version) ({q.series('peregrine_replica_info')})",
                            "{{model}} {{weight_format}} {{version}}",
                        ),
                    ),
                    width=6,
                ),
                Panel(
                    "KV blocks",
                    "Over all replicas: there are, and sequences hold.",
                    "short",
                    (
                        Target(q.total("peregrine_kv_blocks"), "all blocks"),
                        Target(q.total("peregrine_kv_blocks", 'state="used"'), "used blocks"),
                    ),
                    width=6,
                ),
                Panel(
                    "Block size",
                    "Tokens of a block, and blocks of a replica, as configured.",
                    "short",
                    (
                        Target(
                            f"count by (block_size, num_gpu_blocks) ({q.series('peregrine_kv_cache_info')})",
                            "{{num_gpu_blocks}} blocks of {{block_size}}",
                        ),
                    ),
                    width=6,
                ),
                Panel(
                    "Uptime",
                    "Since each replica began to serve.",
                    "s",
                    (Target(f"time() - {q.series('peregrine_replica_start_time_seconds')}", "{{instance}}"),),
                    width=6,
                ),
            ),
        ),
        Row(
            "GPUs",
            (
                Panel(
                    "Memory",
                    "Share in use.",
                    "percentunit",
                    (
                        Target(
                            f"{q.series('peregrine_gpu_memory_used_bytes')} / "
                            f"{q.series('peregrine_gpu_memory_total_bytes')}",
                            "{{gpu}}",
                        ),
                    ),
                    maximum=1,
                ),
                Panel(
                    "Power", "Drawn now.", "watt", (Target(q.series("peregrine_gpu_power_watts"), "{{gpu}}"),)
                ),
                Panel(
                    "Energy",
                    "Joules a second by the counter, which misses no peak between two scrapes.",
                    "watt",
                    (Target(q.rate("peregrine_gpu_energy_joules_total"), "{{gpu}}"),),
                ),
                Panel(
                    "Clocks",
                    "A falling one under load is heat or a power limit.",
                    "hertz",
                    (Target(q.series("peregrine_gpu_clock_hertz"), "{{gpu}} {{clock}}"),),
                    width=6,
                ),
                Panel(
                    "Temperature",
                    "Of the chip.",
                    "celsius",
                    (Target(q.series("peregrine_gpu_temperature_celsius"), "{{gpu}}"),),
                    width=6,
                    limits=(80, 88),
                ),
                Panel(
                    "Busy",
                    "Share of the time in which any kernel ran.",
                    "percentunit",
                    (Target(q.series("peregrine_gpu_utilization_ratio"), "{{gpu}}"),),
                    width=6,
                    maximum=1,
                ),
                Panel(
                    "Xid errors",
                    "Errors that the driver reported, by number.",
                    "short",
                    (Target(q.series("peregrine_gpu_xid_errors_total"), "{{gpu}} Xid {{xid}}"),),
                    width=6,
                ),
            ),
        ),
    ),
    textboxes=(Textbox("gpu_hour_price", "Price of a GPU-hour", "2.5"),),
)
