"""The GPU's runner on the CPU: torch stands in for the kernels, the logic around them is the real one."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import engine.core
import kernels.prefill
from engine.cuda import batch, decode, layers, prefill, runner
from engine.cuda.weights import DeviceWeights, matrix_of
from kernels import AttentionMetadata, AttentionWeights, reference
from kernels.cuda.packing import DeviceWeight
from kernels.cuda.packing import dequantize as dense_matrix
from kernels.cuda.program import StepInputs
from kernels.prefill import Product, Tokens

CPU = torch.device("cpu")


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every EngineCore made from now on runs a CudaModelRunner, on the CPU."""
    tables = SimpleNamespace(embed=_embed, dequantize=_dequantize)
    monkeypatch.setattr(runner, "_check_machine", lambda config, device: None)
    monkeypatch.setattr(runner, "resolve_device", lambda config: CPU)
    for module in (batch, decode, layers, prefill):
        monkeypatch.setattr(module, "tables", tables)
    monkeypatch.setattr(decode.DecodeProgram, "_build", _build)
    monkeypatch.setattr(engine.core, "create_runner", runner.CudaModelRunner)


def _dense(weight: object) -> torch.Tensor:
    return torch.cat([dense_matrix(p) for p in matrix_of(weight).parts])


def _dequantize(weight: DeviceWeight, out: torch.Tensor) -> torch.Tensor:
    matrix = out[: weight.n * weight.k].view(weight.n, weight.k)
    return matrix.copy_(_dense(weight))


def _embed(
    token_ids: torch.Tensor,
    table: DeviceWeight,
    out: torch.Tensor,
    scale: float = 1.0,
    advance: torch.Tensor | None = None,
) -> None:
    out.copy_(scale * _dense(table)[token_ids.long()])
    if advance is not None:
        first = advance[: len(out)]
        first += (first >= 0).int()


class _Model:
    """What StepProgram does with the layers of `add_layers`."""

    def __init__(self, program: Any, caches: Any) -> None:
        weights: DeviceWeights = program._weights
        self.inputs: StepInputs
        self._x, self._logits = program._embedded, program.logits
        self._eps, self._norm = program._config.rms_norm_eps, weights.final_norm
        self._head = _dense(weights.head)
        self._caches = list(caches)
        self._layers = [
            (
                replace(a, qkv=_dense(a.qkv), o=_dense(a.o)),
                replace(f, gate_up=_dense(f.gate_up), down=_dense(f.down)),
            )
            for a, f in weights.layers
        ]

    def launch(self, num_tokens: int) -> None:
        inputs = self.inputs
        positions, first_rows = inputs.positions[:num_tokens], inputs.first_rows[:num_tokens]
        rows = [i for i in range(num_tokens) if positions[i] >= 0]
        if not rows:
            return
        assert rows == list(range(num_tokens))
        starts = [i for i in rows if first_rows[i] == i]
        ends = [*starts[1:], num_tokens]
        sequences = inputs.sequences[:num_tokens].long()
        for start, end in zip(starts, ends, strict=True):
            assert set(first_rows[start:end].tolist()) == {start}
            assert len(set(sequences[start:end].tolist())) == 1
            assert positions[start:end].tolist() == list(
                range(positions[start], positions[start] + end - start)
            )
        blocks = inputs.block_table[sequences, (positions // 16).long()]
        metadata = AttentionMetadata(
            positions,
            blocks * 16 + positions % 16,
            torch.tensor([*starts, num_tokens], dtype=torch.int32),
            positions[[end - 1 for end in ends]] + 1,
            inputs.block_table[sequences[starts]],
        )
        x = self._x[:num_tokens]
        for (attention, ffn), (keys, values) in zip(self._layers, self._caches, strict=True):
            if keys.dtype == torch.uint8:
                _attend_fp8(x, attention, (keys, values), inputs)
            else:
                reference.attention_block(x, attention, keys.transpose(2, 3), values, metadata)
            reference.ffn_block(x, ffn)
        self._logits[:num_tokens] = reference.logits(x, self._norm, self._eps, self._head)
        self._x.fill_(float("nan"))  # nothing may be read from it afterwards


def _attend_fp8(x: torch.Tensor, w: AttentionWeights, caches: Any, inputs: StepInputs) -> None:
    """`reference.attention_block` over an "fp8" cache."""
    assert isinstance(w.qkv, torch.Tensor)
    qkv = Product((reference.rms_norm(x, w.norm, w.eps) @ w.qkv.T).unsqueeze(0))
    positions, sequences = inputs.positions[: len(x)], inputs.sequences[: len(x)]
    tokens = Tokens(positions, sequences, inputs.block_table, positions.new_empty(0, 4), 1)
    attended = kernels.prefill.attend_next(qkv, w, caches, tokens, "bf16", is_shared=True).values
    reference.add_projection(x, reference.linear(attended.float(), w.o, w.o_bias), w.post_norm, w.eps)


class _Head:
    def __init__(self, model: _Model) -> None:
        self._model = model

    def launch(self, num_tokens: int) -> None:
        m = self._model
        m._logits[:num_tokens] = reference.logits(m._x[:num_tokens], m._norm, m._eps, m._head)


def _build(program: Any, caches: Any) -> tuple[_Model | None, _Head]:
    model = _Model(program, caches or ())
    return model if caches is not None else None, _Head(model)
