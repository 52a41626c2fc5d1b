"""Made-up rows of two shapes, as a run would leave them: enough for every table and picture."""

from pathlib import Path

from deploy.bench.article.results import Results, Row

MACHINE: Row = {"gpu": "a card", "cpu": "a processor", "cores": 2}


def filled(directory: Path, machine: Row = MACHINE) -> Results:
    results = Results(directory / "article.json")
    for shape, bits, ms in (("8b", 4.25, 1.7), ("70b", 4.0, 12.6)):
        results.begin(shape, machine)
        floor = {"read_gb_s": 3050, "step_gb": 4.1, "floor_ms": 0.8 * ms}
        held = {"weights_gb": 4.4, "kv_gb": 60.0, "workspace_gb": 0.8, "kv_tokens": 450_000}
        results.add(shape, "memory", {"path": "engine", **held, **floor})
        results.add(shape, "server", {"path": "http", "start_s": 40.0, "used_gb": 71.0})
        for path, added in (("engine", 0.0), ("http", 3.0)):
            for prompt in (128, 512, 2048):
                ttft = prompt / 100 + added
                results.add(shape, "ttft", {"path": path, "prompt_tokens": prompt, "ttft_ms": ttft})
            for streams in (1, 16):
                itl = ms * (1 + streams / 16) + added / 100
                figures = {"streams": streams, "itl_ms": itl, "tok_s": 1e3 * streams / itl}
                extra = {"itl_ms_p50": itl, "itl_ms_p99": 2 * itl, "ttft_ms_p50": 9.0, "ttft_ms_p99": 20.0}
                results.add(shape, "decode", {"path": path, "bits": bits, **figures, **extra})
        results.add(shape, "long", {"path": "http", "bits": bits, "output_tokens": 2000, "e2e_s": 2 * ms})
        for kind, count in (("unfused", 900.0), ("one an operation", 356), ("fused", 5.0), ("captured", 1.0)):
            results.add(shape, "launches", {"path": "engine", "kind": kind, "per_token": count})
        for rate, share in ((1.0, 1.0), (2.0, 0.95), (4.0, 0.4)):
            results.add(shape, "goodput", goodput_row(rate, share))
        timing = {"ttft_ms": 8.0, "itl_ms": ms, "e2e_s": 0.4}
        kind = {"workload": "voice turn", "prompt_tokens": 192, "output_tokens": 64}
        results.add(shape, "workload", {"path": "http", **kind, **timing})
        results.add(shape, "integration", {"path": "http", "probe": "health", "passed": True})
        failed = {"probe": "a <b>", "passed": False, "answer": "404: |"}
        results.add(shape, "integration", {"path": "http", **failed})
    results.add("70b", "long", {"failed": "stopped after 3 s"})
    return results


def goodput_row(rate: float, share: float) -> dict:
    return {
        "path": "http",
        "tier": "voice",
        "deadline_ms": 200,
        "ends": "first token",
        "workload": "voice turn",
        "rate_req_s": rate,
        "num_refused": 0,
        "share_good": share,
        "goodput_req_s": rate * share,
        "goodput_tok_s": rate * share * 64,
    }
