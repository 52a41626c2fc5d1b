"""The benchmark of what metrics cost: its rows, not their figures."""

import json

from deploy.bench import metrics_cost


def test_each_step_that_was_measured_gets_a_row(tmp_path):
    engine = tmp_path / "engine.json"
    rows = [
        {"shape": "8b", "batch": 1, "itl_ms": 2.0},
        {"shape": "8b", "batch": 1, "prompt_tokens": 128, "ttft_ms": 9.0},
        {"shape": "8b", "batch": 4, "itl_ms": 3.0},
        {"shape": "70b", "batch": 1, "itl_ms": 14.0},
    ]
    engine.write_text(json.dumps({"rows": rows}))
    cpu = tmp_path / "cpu.json"
    cpu.write_text(json.dumps({"rows": [{"runtime": "peregrine", "batch": 8, "tok_s": 160.0}]}))
    found = metrics_cost.run(engine, cpu)
    assert [(row["step_of"], row["batch"], row["step_ms"]) for row in found] == [
        ("8B on a GPU", 1, 2.0),
        ("8B on a GPU", 4, 3.0),
        ("135M on a CPU", 8, 50.0),
    ]
    for row in found:
        parts = row["tokens_us"] + row["taking_in_us"] + row["answers_us"] + row["scrapes_us"]
        assert abs(parts - row["total_us"]) < 0.03
