"""What constraints cost beside a decode step: a batch's masks, applying them, taking in the tokens.

Outputs are generated once under each constraint; then the same tokens are gone through again, as the sampler
does it, with a clock. Steps are timed without constraints, in the same process. What compiling takes, apart.
"""

import json
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from deploy.bench.report import percentile
from engine import Constraint, EngineConfig, SamplingParams
from engine.core import EngineCore
from engine.messages import AddRequest
from engine.structured import fill_masks
from kernels.sampling import mask_bias, num_mask_words

_ROUNDS = 5
_MAX_TOKENS = 96
_DECODES = 48  # unconstrained steps that are timed for each batch

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "pattern": "^[a-z.]{1,20}@[a-z]{1,10}\\.(com|org)$"},
        "tags": {"type": "array", "items": {"enum": ["new", "old", "blue"]}, "maxItems": 4},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string", "maxLength": 30}, "zip": {"type": "integer"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "email", "tags", "address"],
    "additionalProperties": False,
}
CONSTRAINTS = {
    "json_object": Constraint("json_object"),
    "json_schema": Constraint("json_schema", json.dumps(_PERSON)),
    "regex": Constraint("regex", "([A-Z][a-z]{1,12} ){3,12}[0-9]{4}-[0-9]{2}-[0-9]{2}"),
    "choice": Constraint("choice", json.dumps([f"option {i} of the list" for i in range(50)])),
    "grammar": Constraint("grammar", 'root ::= sum ("=" sum){3}\nsum ::= [0-9]{1,4} ("+" [0-9]{1,4}){2,9}'),
}
_PROMPT = "Describe a person in detail, as JSON where that is possible: "


def run(model: str, batches: Sequence[int] = (1, 8)) -> list[dict[str, Any]]:
    """A row for each constraint and batch: medians of five rounds, µs a step, and the share of a step."""
    core = EngineCore(EngineConfig(model=model, device="cpu", num_blocks=1200))
    core.warm_up()
    rows = []
    steps_ms = {batch: _step_ms(core, batch) for batch in batches}
    for kind, constraint in CONSTRAINTS.items():
        compile_ms = _compile_ms(core, constraint)
        for batch in batches:
            outputs = _generate(core, constraint, batch)
            rounds = [_costs(core, constraint, outputs) for _ in range(_ROUNDS)]
            parts = {k: median(r[k] for r in rounds) for k in rounds[0]}
            step_us = parts["fill_us"] + parts["apply_us"] + parts["accept_us"]
            rows.append(
                {
                    "constraint": kind,
                    "batch": batch,
                    "compile_ms": round(compile_ms, 2),
                    **{k: round(us, 1) for k, us in parts.items()},
                    "total_us": round(step_us, 1),
                    "step_ms": round(steps_ms[batch], 2),
                    "share_of_step": round(step_us / (1e3 * steps_ms[batch]), 4),
                }
            )
    return rows


def _prompt(core: EngineCore) -> tuple[int, ...]:
    return tuple(core.grammars.prepare().result().tokenize_str(_PROMPT))


def _step_ms(core: EngineCore, batch: int) -> float:
    """Median of decode steps without constraints."""
    params = SamplingParams(temperature=0.0, max_tokens=_DECODES + 1, ignore_eos=True)
    for i in range(batch):
        core.add_request(AddRequest(f"free-{i}", _prompt(core), params, time.monotonic()))
    times = []
    while core.has_work:
        done = core.step()
        if done.kind == "decode" and len(done.outputs) == batch:
            times.append(1e3 * done.stats.last_step_s)
    return median(times)


def _compile_ms(core: EngineCore, constraint: Constraint) -> float:
    """Of a grammar that is not there yet: one of another name is another."""
    times = []
    for i in range(_ROUNDS):
        other = Constraint(constraint.kind, constraint.value, name=f"round {i}")
        start = time.perf_counter()
        core.grammars.compile(other).result()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def _generate(core: EngineCore, constraint: Constraint, batch: int) -> list[list[int]]:
    for i in range(batch):
        params = SamplingParams(temperature=1.0, seed=i, max_tokens=_MAX_TOKENS, constraint=constraint)
        core.add_request(AddRequest(str(i), _prompt(core), params, time.monotonic()))
    tokens: list[list[int]] = [[] for _ in range(batch)]
    while core.has_work:
        for output in core.step().outputs:
            if output.token_id is not None:
                tokens[int(output.request_id)].append(output.token_id)
    return tokens


def _costs(core: EngineCore, constraint: Constraint, outputs: Sequence[Sequence[int]]) -> dict[str, float]:
    """Medians over the steps, µs; `p99_us` is of all three together."""
    vocab_size = core.runner.info.vocab_size
    compiled = core.grammars.compile(constraint).result()
    states = [core.grammars.start(compiled) for _ in outputs]
    times: list[tuple[float, float, float]] = []
    for position in range(max(map(len, outputs))):
        alive = [i for i, tokens in enumerate(outputs) if position < len(tokens)]
        masks = np.empty((len(alive), num_mask_words(vocab_size)), dtype=np.int32)
        logits = torch.zeros(len(alive), vocab_size)
        start = time.perf_counter()
        fill_masks([(states[i], ()) for i in alive], masks)
        filled = time.perf_counter()
        logits += mask_bias(torch.from_numpy(masks), vocab_size)
        applied = time.perf_counter()
        for i in alive:
            states[i].accept(outputs[i][position])
        times.append((filled - start, applied - filled, time.perf_counter() - applied))
    fill, apply, accept = (1e6 * median(part) for part in zip(*times, strict=True))
    return {
        "fill_us": fill,
        "apply_us": apply,
        "accept_us": accept,
        "p99_us": 1e6 * percentile([sum(t) for t in times], 0.99),
    }
