"""Products of prompt chunks from packed weights, against float64 on the same e4m3 operands."""

import pytest
import torch

from kernels import prefill
from kernels.cuda import prompt, tables
from kernels.cuda.packing import DeviceWeight, dequantize, to_device
from tests.kernels.helpers import random_packed

HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_HOPPER, reason="needs a Hopper GPU (sm_90)")]
DEVICE = torch.device("cuda")
NAMES = ["w2g128", "w2g32", "w2g64", "w3g64", "w3g128", "w4g64", "w4g128", "w4g32-f16", "w4g64-sym"]


def _weight(n: int, k: int, *names: str) -> DeviceWeight:
    parts = [to_device(random_packed(n, k, name, seed), DEVICE).parts for seed, name in enumerate(names)]
    return DeviceWeight(sum(parts, ()))


def _operands(weight: DeviceWeight) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(weight.n * weight.k, dtype=prefill.FP8, device=DEVICE)
    return tables.dequantize_fp8(
        weight, tables.fp8_units(weight), out, torch.full((weight.n,), float("nan"), device=DEVICE)
    )


def _check(weight: DeviceWeight, tokens: int, monkeypatch: pytest.MonkeyPatch) -> prefill.Product:
    x = torch.randn(tokens, weight.k, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    plain, tiled = prefill.quantize(x), prefill.quantize(x, "tiled")
    empty = torch.empty
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
        got = prompt.multiply(weight, tables.fp8_units(weight), tiled)
    values, scale = _operands(weight)
    assert plain.scale is not None
    exact = (plain.values.double() @ values.double().T) * plain.scale.double()[:, None] * scale.double()
    error = (got.float().double() - exact).norm() / exact.norm()
    assert error < 5e-3  # bfloat16 results, and what the tensor cores drop of their sums
    return got


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(16, 256), (144, 96), (640, 800), (1040, 4096)])
@pytest.mark.parametrize("tokens", [17, 64, 100, 300])
@pytest.mark.parametrize("rows", [128, 256])
@pytest.mark.parametrize("splits", [1, 3])
def test_product(name, shape, tokens, rows, splits, monkeypatch):
    monkeypatch.setattr(prompt, "plan", lambda *sizes: (rows, splits))
    _check(_weight(*shape, name), tokens, monkeypatch)


@pytest.mark.parametrize("tokens", [32, 200])
def test_parts_of_one_format_and_of_several(tokens, monkeypatch):
    for names in (("w4g64",) * 3, ("w4g64", "w4g64", "w3g64"), ("w2g64", "w4g32-f16")):
        _check(_weight(208, 512, *names), tokens, monkeypatch)


def test_a_narrow_matrix_is_split_along_k(monkeypatch):
    got = _check(_weight(128, 8192, "w4g64"), 40, monkeypatch)
    assert got.values.dim() == 3
    assert len(got.values) > 1


@pytest.mark.parametrize("name", [*NAMES, "w5g128", "w6g128-sym", "w8row-sym", "w5g32-f16", "w8g32-f16"])
def test_dequantize_to_e4m3(name):
    weight = _weight(75, 800, name)
    values, scale = _operands(weight)
    exact = dequantize(weight.parts[0])
    error = (values.float() * scale[:, None] - exact).norm() / exact.norm()
    assert error < 0.03
    assert float(values.float().abs().max()) < 448


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_are_dequantized_below_each_other(dtype):
    weight = _weight(75, 288, "w4g64", "w4g64", "w8row-sym")
    exact = torch.cat([dequantize(p) for p in weight.parts])
    got = tables.dequantize(weight, dtype).float()
    assert (got - exact).norm() / exact.norm() < (3e-3 if dtype == torch.bfloat16 else 1e-4)
