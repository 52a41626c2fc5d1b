"""The decoder layers as a chain of products and what lies between them, for prompt chunks and large batches.

Up to 256 tokens a product reads the packed weights, its input in float16. Where that is faster it is e4m3,
if it may be, for prompts of more than 128 tokens. Otherwise a matrix is unpacked into one scratch buffer, as
large as the largest, right before its use, and multiplied by cuBLAS. Sums, residual stream, norms and
rotation are float32, outputs of products bfloat16.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kernels.prefill
from engine.config import Precision
from engine.cuda.bounds import largest_gated, largest_output
from engine.cuda.weights import DeviceWeights, matrix_of
from engine.models.config import ModelConfig
from kernels import AttentionWeights, FFNWeights
from kernels.cuda import prompt, prompt_fp8, tables
from kernels.cuda.packing import DeviceWeight
from kernels.prefill import FP8, Activations, Bound, Form, Product

Caches = Sequence[tuple[Tensor, Tensor]]
Pending = tuple[Product, Tensor | None, Tensor | None]
"""What is to be added to the residual stream: a product, its bias, the norm behind it."""

DIRECT_TOKENS = 256  # at most are multiplied by packed weights in float16: for more, unpacking once is faster
_FP8_BITS = 4  # wider codes lose more to e4m3's three bits of mantissa than they lost to rounding


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """units: `prompt.units_of`, or None where packed weights are not multiplied.

    fp8_units: `tables.fp8_units`, or None where unpacked weights are bfloat16.
    """

    weight: DeviceWeight
    units: tuple[float, ...] | None
    fp8_units: tuple[float, ...] | None

    def form(self, num_tokens: int, *, is_prompt: bool) -> Form:
        """Of its input. is_prompt: of prompts alone, whose values may be rounded to e4m3."""
        if self.units is not None and num_tokens <= DIRECT_TOKENS:
            n, k = self.weight.n, self.weight.k
            is_fp8 = is_prompt and self.fp8_units is not None and prompt_fp8.beats_float16(num_tokens, n, k)
            return "tiled_fp8" if is_fp8 else "tiled"
        if self.fp8_units is None:
            return "bf16"
        is_direct = self.units is not None and prompt_fp8.is_faster(num_tokens, self.weight.n, self.weight.k)
        return "tiled_fp8" if is_direct else "fp8"


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    attention: AttentionWeights
    ffn: FFNWeights
    caches: tuple[Tensor, Tensor]
    qkv: Matrix
    o: Matrix
    gate_up: Matrix
    down: Matrix
    attended: Bound | None
    """Of attention's outputs, where they are tiled."""
    gated: Bound | None
    """Of gate times up, where one kernel computes it from both."""

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return self.qkv, self.o, self.gate_up, self.down


class Layers:
    """Valid until the next call are a product's row scales, and what lies in the scratch buffer."""

    def __init__(
        self, weights: DeviceWeights, caches: Caches, device: torch.device, precision: Precision
    ) -> None:
        """precision: of unpacked matrices of at most 4 bits a weight and their inputs; a CPU has bfloat16."""
        self.weights, self.ops = weights, _ops(device)
        use_fp8, is_gpu = precision == "fp8" and device.type == "cuda", device.type == "cuda"
        self._layers = [
            _layer(a, f, c, is_gpu, use_fp8) for (a, f), c in zip(weights.layers, caches, strict=True)
        ]
        self.head = _matrix(weights.head, is_gpu, use_fp8=False)
        matrices = [m for layer in self._layers for m in layer.matrices]
        size = max(_scratch_bytes(m.weight, m.fp8_units is not None) for m in matrices)
        if self.head.units is None:
            size = max(size, _scratch_bytes(self.head.weight, is_fp8=False))
        self._scratch = torch.empty(size, dtype=torch.uint8, device=device)
        self._row_scale = torch.empty(max(m.weight.n for m in matrices), device=device)
        self._one = torch.ones((), device=device)

    @property
    def is_direct(self) -> bool:
        """Whether every product of few tokens reads packed weights."""
        own = (m for layer in self._layers for m in layer.matrices)
        return self.head.units is not None and all(m.units is not None for m in own)

    def forward(
        self, x: Tensor, attend: Callable[[Product, Layer, Form], Activations], *, is_prompt: bool
    ) -> Pending:
        """Through all layers; x float32 [T, hidden] is the residual stream, but for what is returned.

        attend: from the qkv product to the output projection's input, in that form.
        is_prompt: no token is a decode's.
        """
        ops = self.ops

        def form_of(matrix: Matrix) -> Form:
            return matrix.form(len(x), is_prompt=is_prompt)

        pending: Pending | tuple[()] = ()
        for layer in self._layers:
            a, f = layer.attention, layer.ffn
            normed = ops.normalize(x, a.norm, a.eps, form_of(layer.qkv), *pending)
            attended = attend(self.multiply(normed, layer.qkv), layer, form_of(layer.o))
            out = self.multiply(attended, layer.o)
            form = form_of(layer.gate_up)
            normed = ops.normalize(x, f.norm, f.eps, form, out, a.o_bias, a.post_norm)
            if form == "tiled" == form_of(layer.down) and layer.gated is not None:
                matrix = layer.gate_up
                assert matrix.units is not None
                gated = prompt.multiply_gated(matrix.weight, matrix.units, normed, f.activation, layer.gated)
            else:
                both = self.multiply(normed, layer.gate_up)
                gated = ops.gate(both, f.gate_up_bias, f.activation, form_of(layer.down))
            pending = self.multiply(gated, layer.down), f.down_bias, f.post_norm
        assert pending
        return pending

    def multiply(self, x: Activations, matrix: Matrix) -> Product:
        """x times the matrix, transposed."""
        if x.values.dtype == torch.float16:
            assert matrix.units is not None
            return prompt.multiply(matrix.weight, matrix.units, x)
        if x.values.dim() == 3:
            assert matrix.fp8_units is not None
            return prompt_fp8.multiply(matrix.weight, matrix.fp8_units, x)
        if matrix.fp8_units is None:
            dense = tables.dequantize(matrix.weight, out=self._scratch.view(torch.bfloat16))
            return Product(x.values @ dense.T)
        values, row_scale = tables.dequantize_fp8(
            matrix.weight, matrix.fp8_units, self._scratch.view(FP8), self._row_scale
        )
        out = torch._scaled_mm(
            x.values,
            values.T,
            scale_a=self._one,
            scale_b=self._one,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return Product(out, x.scale, row_scale)

    def logits(self, x: Tensor, eps: float, pending: Pending, out: Tensor) -> None:
        """out float32 [T, vocab] of the residual stream of at most DIRECT_TOKENS tokens."""
        normed = self.ops.normalize(
            x, self.weights.final_norm, eps, self.head.form(len(x), is_prompt=False), *pending
        )
        if self.head.units is None:
            dense = tables.dequantize(self.head.weight, out=self._scratch.view(torch.bfloat16))
            torch.mm(normed.values.float(), dense.float().T, out=out)
        else:
            prompt.multiply(self.head.weight, self.head.units, normed, out)


def workspace_bytes(
    config: ModelConfig, weights: DeviceWeights, num_tokens: int, num_rows: int, precision: Precision
) -> int:
    """What chunks of so many tokens (padding included) and batches of so many rows take, rounded up.

    Beside weights and cache, scratch buffer included.
    """
    layers = [matrix_of(w) for a, f in weights.layers for w in (a.qkv, a.o, f.gate_up, f.down)]
    scratch = max(_scratch_bytes(m, precision == "fp8" and _is_narrow(m)) for m in layers)
    # float32 residual stream; bfloat16 (or narrower) inputs and outputs of the two widest products.
    widest = 3 * config.intermediate_size + 2 * (config.q_size + config.kv_size) + 2 * config.hidden_size
    splits = (
        2 * prompt.MAX_SPLITS * 4 * DIRECT_TOKENS * (config.q_size + 2 * config.kv_size + config.hidden_size)
    )
    # Logits, and what the sampler makes of them.
    logits = 3 * 4 * min(num_rows, DIRECT_TOKENS) * config.vocab_size
    tokens = num_tokens * (4 * config.hidden_size + 2 * widest)
    return scratch + 4 * max(m.n for m in layers) + tokens + splits + logits


def _layer(
    a: AttentionWeights, f: FFNWeights, caches: tuple[Tensor, Tensor], is_gpu: bool, use_fp8: bool
) -> Layer:
    qkv, o, gate_up, down = (_matrix(w, is_gpu, use_fp8) for w in (a.qkv, a.o, f.gate_up, f.down))
    attended = gated = None
    if o.units is not None:
        values = qkv.weight.parts[-1]  # attention's outputs are means of them
        bias = None if a.qkv_bias is None else a.qkv_bias[-values.n :]
        attended = Bound.of(largest_output(values, a.norm, bias), DIRECT_TOKENS, a.norm.device)
    if (
        gate_up.units is not None
        and f.gate_up_bias is None
        and prompt.can_gate(gate_up.weight, gate_up.units)
    ):
        gate, up = gate_up.weight.parts
        gated = Bound.of(largest_gated(gate, up, f.norm), DIRECT_TOKENS, f.norm.device)
    return Layer(a, f, caches, qkv, o, gate_up, down, attended, gated)


def _matrix(weight: object, is_gpu: bool, use_fp8: bool) -> Matrix:
    matrix = matrix_of(weight)
    units = prompt.units_of(matrix) if is_gpu and prompt.can_multiply(matrix) else None
    return Matrix(matrix, units, tables.fp8_units(matrix) if use_fp8 and _is_narrow(matrix) else None)


def _is_narrow(matrix: DeviceWeight) -> bool:
    return all(p.format.bits <= _FP8_BITS and p.n % 16 == 0 for p in matrix.parts)  # as cuBLAS has it


def _scratch_bytes(matrix: DeviceWeight, is_fp8: bool) -> int:
    return matrix.n * matrix.k * (1 if is_fp8 else 2)


def _ops(device: torch.device) -> Any:
    """The functions of `kernels.prefill`, in Triton on a GPU."""
    if device.type != "cuda":
        return kernels.prefill
    from kernels.triton_ops import prefill  # imports triton

    return prefill
