"""What the form of the KV cache costs: the next tokens' divergence to those of a bfloat16 cache.

Everything else is the same: on any machine all arithmetic is float32, and keys and values are rounded as the
cache would; on a Hopper GPU the engine's own kernels run too. Beside the engine's scales stand those of other
engines: one for everything (1.0, where nothing was calibrated), and one for each head, from other text; and
beside e4m3 integers of 8 bits with the engine's scales.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deploy.bench.prefill_divergence import normed_states
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.cuda.weights import load_weights
from engine.models.layerwise import Cached
from engine.quality.divergence import compare, head_table, hidden_states
from engine.quality.text import calibration_documents, heldout_documents, token_windows
from kernels import kv_cache
from kernels.cuda import tables

_E4M3, _E4M3_MAX = torch.float8_e4m3fn, 448.0
_CALIBRATION_WINDOWS = 4
OfLayer = Callable[[int], tuple[Cached, Cached]]


def run(model: Path, windows: int, length: int) -> list[dict[str, Any]]:
    """Rows: what is cached (`codes`, `scales`, `bits` a value), KL (nats a token), best token, perplexity.

    Raises ModelLoadError or QualityError where there is no such model, or not so much text.
    """
    checkpoint = open_checkpoint(model)
    tokenizer = checkpoint.load_tokenizer()
    tokens = token_windows(tokenizer, heldout_documents(), windows, length)
    calibration = token_windows(tokenizer, calibration_documents(), _CALIBRATION_WINDOWS, length)
    base = {"model": model.stem, "windows": windows, "length": length}
    rows = [{**base, **row} for row in _rounded(checkpoint, tokens, calibration)]
    if torch.cuda.is_available():
        rows += [{**base, **row} for row in _by_kernels(checkpoint, tokens)]
    return rows


def _rounded(checkpoint: Checkpoint, tokens: Tensor, calibration: Tensor) -> Iterator[dict[str, Any]]:
    head, config = head_table(checkpoint), checkpoint.config
    in_bfloat16 = hidden_states(checkpoint, tokens, cached=lambda _: (_to_bfloat16, _to_bfloat16))
    of_format = kv_cache.bytes_per_token(config.num_kv_heads, config.head_dim, "fp8")
    own_bits = 8 * of_format / (2 * config.kv_size)
    largest = _largest(checkpoint, calibration)
    kinds: list[tuple[str, str, float, OfLayer | None]] = [
        ("float32", "none", 32, None),
        ("e4m3", "token and head", own_bits, lambda _: (_to_own, _to_own)),
        ("e4m3", "head", 8, lambda i: (_to_e4m3(largest[i][0]), _to_e4m3(largest[i][1]))),
        ("e4m3", "1.0", 8, lambda _: (_to_e4m3(None), _to_e4m3(None))),
        ("int8", "token and head", own_bits, lambda _: (_to_int8, _to_int8)),
    ]
    for codes, scales, bits, cached in kinds:
        states = hidden_states(checkpoint, tokens, cached=cached)
        row = {"arithmetic": "float32", "codes": codes, "scales": scales, "bits": round(bits, 2)}
        yield row | _divergence(states, in_bfloat16, head, tokens)


def _by_kernels(checkpoint: Checkpoint, tokens: Tensor) -> Iterator[dict[str, Any]]:
    device, length = torch.device("cuda"), tokens.shape[1]
    weights = load_weights(checkpoint, length, device)
    head = tables.dequantize(weights.head, torch.float32)
    with torch.inference_mode():
        states = [
            normed_states(weights, checkpoint.config, tokens, "bf16", length, kv_format)
            for kv_format in ("bf16", "fp8")
        ]
    row = {"arithmetic": "kernels", "codes": "e4m3", "scales": "token and head"}
    yield row | _divergence(states[1], states[0], head, tokens.to(device))


def _divergence(states: Tensor, reference: Tensor, head: Tensor, tokens: Tensor) -> dict[str, float]:
    d = compare(states, head, reference, head, tokens)
    return {
        "kl": float(f"{float(d.kl.mean()):.3g}"),
        "kl_p99": float(f"{float(d.kl.flatten().quantile(0.99)):.3g}"),
        "same_top_1": round(float(d.agrees.float().mean()), 4),
        "perplexity": round(float(d.nll.mean().exp()), 3),
        "perplexity_bf16": round(float(d.reference_nll.mean().exp()), 3),
    }


def _largest(checkpoint: Checkpoint, tokens: Tensor) -> list[list[Tensor]]:
    """By layer: the largest magnitude of each head's keys and values, [kv_heads, 1, 1]."""
    found: list[list[Tensor]] = [[] for _ in range(checkpoint.config.num_layers)]

    def note(layer: int, which: int) -> Cached:
        def noted(x: Tensor) -> Tensor:
            own, new = found[layer], x.abs().amax(dim=(0, 2, 3)).view(-1, 1, 1)
            own[which:] = [torch.maximum(own[which], new) if len(own) > which else new, *own[which + 1 :]]
            return x

        return noted

    hidden_states(checkpoint, tokens, cached=lambda i: (note(i, 0), note(i, 1)))
    return found


def _to_bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _to_own(x: Tensor) -> Tensor:
    return kv_cache.decode(*kv_cache.encode(x))


def _to_int8(x: Tensor) -> Tensor:
    scale = torch.exp2(torch.ceil(torch.log2(x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127)))
    return (x / scale).round() * scale


def _to_e4m3(largest: Tensor | None) -> Cached:
    """Rounding with the scale that makes this the largest code, or with none."""
    scale = torch.ones(()) if largest is None else largest / _E4M3_MAX

    def rounded(x: Tensor) -> Tensor:
        return (x / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(_E4M3).float() * scale

    return rounded
