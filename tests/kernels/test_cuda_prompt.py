"""Products from packed weights, against float64 on the same float16 activations."""

from dataclasses import replace

import pytest
import torch

from engine.cuda.bounds import largest_gated
from kernels import prefill
from kernels.cuda import prompt, tables
from kernels.cuda.packing import DeviceWeight, dequantize
from kernels.reference import activate
from tests.kernels.helpers import random_weight

HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_HOPPER, reason="needs a Hopper GPU (sm_90)")]
DEVICE = torch.device("cuda")
NARROW = ["w2g128", "w2g32", "w2g64", "w3g64", "w3g128", "w4g64", "w4g128", "w4g32-f16", "w4g64-sym"]
WIDE = ["w5g128", "w6g128", "w6g128-sym", "w8row-sym", "w5g32-f16", "w8g32-f16"]


def _operands(weight: DeviceWeight) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(weight.n * weight.k, dtype=prefill.FP8, device=DEVICE)
    return tables.dequantize_fp8(
        weight, tables.fp8_units(weight), out, torch.full((weight.n,), float("nan"), device=DEVICE)
    )


def _check(
    weight: DeviceWeight, tokens: int, monkeypatch: pytest.MonkeyPatch, is_whole: bool = False
) -> prefill.Product:
    x = torch.randn(tokens, weight.k, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x *= torch.linspace(1e-3, 1e3, tokens, device=DEVICE).unsqueeze(1)
    tiled = prefill.quantize(x, "tiled")
    assert tiled.scale is not None
    out = torch.full((tokens, weight.n), float("nan"), device=DEVICE) if is_whole else None
    empty = torch.empty
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
        got = prompt.multiply(weight, prompt.units_of(weight), tiled, out)
    operand = (x / tiled.scale.unsqueeze(1)).half().double() * tiled.scale.double().unsqueeze(1)
    exact = operand @ torch.cat([dequantize(p) for p in weight.parts]).double().T
    errors = (got.float().double() - exact).norm(dim=1) / exact.norm(dim=1)
    # Weights of 11 bits, of which a sum that nearly cancels out keeps the errors; bfloat16 results of 8.
    assert float(errors.max()) < 2**-10 + (2**-8 if got.values.dtype == torch.bfloat16 else 0)
    return got


@pytest.mark.parametrize("name", [*NARROW, *WIDE])
@pytest.mark.parametrize("shape", [(16, 256), (144, 96), (1043, 800)])
@pytest.mark.parametrize("tokens", [1, 17, 64, 100, 300])
@pytest.mark.parametrize("rows", [128, 256])
@pytest.mark.parametrize("splits", [1, 3])
def test_product(name, shape, tokens, rows, splits, monkeypatch):
    weight = random_weight(*shape, name)
    units = weight.parts[0].units
    cut = prompt.plan(tokens, 16, 1, 2176)
    rows = rows if cut.tile > 16 or rows == 128 else 304  # two tiles for some of 16 warps
    cut = replace(cut, rows=rows, splits=-(-units // -(-units // splits)))
    monkeypatch.setattr(prompt, "plan", lambda *sizes: cut)
    _check(weight, tokens, monkeypatch)


@pytest.mark.parametrize("tokens", [32, 200])
def test_parts_of_one_format_and_of_several(tokens, monkeypatch):
    for names in (
        ("w4g64",) * 3,
        ("w4g64", "w4g64", "w3g64"),
        ("w2g64", "w4g32-f16"),
        ("w8row-sym", "w6g128"),
    ):
        weight = random_weight(208, 512, *names)
        assert prompt.can_multiply(weight)
        _check(weight, tokens, monkeypatch)
    assert not prompt.can_multiply(random_weight(75, 256, "w4g64", "w4g64"))


def test_a_narrow_matrix_is_split_along_k(monkeypatch):
    got = _check(random_weight(128, 8192, "w4g64"), 40, monkeypatch)
    assert got.values.dim() == 3
    assert len(got.values) > 1


@pytest.mark.parametrize("tokens", [16, 130])
@pytest.mark.parametrize("n", [640, 1001])
def test_a_whole_product(tokens, n, monkeypatch):
    got = _check(random_weight(n, 2048, "w6g128"), tokens, monkeypatch, is_whole=True)
    assert got.values.shape == (tokens, n)
    assert got.values.dtype == torch.float32


@pytest.mark.parametrize("name", ["w2g128", "w3g64", "w4g64", "w4g32-f16", "w6g128", "w8row-sym"])
@pytest.mark.parametrize("n", [48, 1040])
@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 100, 200])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_product(name, n, tokens, activation, monkeypatch):
    weight = random_weight(n, 800, *(name,) * 2)
    units = prompt.units_of(weight)
    weight = weight if len(set(units)) == 1 else random_weight(n, 800, name)
    if len(weight.parts) == 1:  # of an affine format, whose unit depends on its values
        weight = DeviceWeight(weight.parts * 2)
        units = prompt.units_of(weight)
    assert prompt.can_gate(weight, units)
    x = prefill.quantize(torch.randn(tokens, 800, device=DEVICE), "tiled")
    norm = torch.ones(800, device=DEVICE)
    bound = prefill.Bound.of(largest_gated(*weight.parts, norm), 256, DEVICE)
    empty = torch.empty
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
        got = prompt.multiply_gated(weight, units, x, activation, bound)
        both = prompt.multiply(weight, units, x)
    assert got.scale is not None
    exact = activate(both.float()[:, :n].double(), activation) * both.float()[:, n:].double()
    expected = prefill.tiled((exact * bound.inverse).half()).double()
    values = got.values[:, :tokens].double()
    assert (values - expected[:, :tokens]).norm() / expected.norm() < 8e-3  # `both` is bfloat16


@pytest.mark.parametrize("name", ["w2g128", "w3g64", "w4g64", "w4g32-f16", "w6g128", "w8row-sym"])
@pytest.mark.parametrize("rows", [160, 288, 448])
def test_gated_products_do_not_depend_on_the_cut(name, rows, monkeypatch):
    weight = DeviceWeight(random_weight(1040, 800, name).parts * 2)
    units = prompt.units_of(weight)
    x = prefill.quantize(torch.randn(13, 800, device=DEVICE), "tiled")
    bound = prefill.Bound.of(largest_gated(*weight.parts, torch.ones(800, device=DEVICE)), 256, DEVICE)
    expected = prompt.multiply_gated(weight, units, x, "silu", bound)
    monkeypatch.setattr(prompt, "plan", lambda *sizes, **kwargs: prompt.Cut(16, rows, 1))
    got = prompt.multiply_gated(weight, units, x, "silu", bound)
    assert torch.equal(got.values[:, :13], expected.values[:, :13])


def test_replays_of_a_chain_are_the_same_bits():
    """Kernels that start before the one before has ended read nothing too early."""
    from kernels.triton_ops import prefill as ops

    weights = [random_weight(1024, 1024, "w4g64") for _ in range(4)]
    x, norm = torch.randn(48, 1024, device=DEVICE), torch.ones(1024, device=DEVICE)
    stream = torch.cuda.Stream()

    def chain() -> torch.Tensor:
        own, pending = x.clone(), ()
        for weight in weights * 4:
            normed = ops.normalize(own, norm, 1e-5, "tiled", *pending)
            pending = prompt.multiply(weight, prompt.units_of(weight), normed), None, None
        ops.add(own, *pending, 1e-5)
        return own

    with torch.cuda.stream(stream):
        expected = chain()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            got = chain()
        for _ in range(50):
            graph.replay()
            stream.synchronize()
            assert torch.equal(got, expected)
    assert not expected.isnan().any()


@pytest.mark.parametrize("name", [*NARROW, *WIDE])
def test_dequantize_to_e4m3(name):
    weight = random_weight(75, 800, name)
    values, scale = _operands(weight)
    exact = dequantize(weight.parts[0])
    error = (values.float() * scale[:, None] - exact).norm() / exact.norm()
    assert error < 0.03
    assert float(values.float().abs().max()) < 448


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_are_dequantized_below_each_other(dtype):
    weight = random_weight(75, 288, "w4g64", "w4g64", "w8row-sym")
    exact = torch.cat([dequantize(p) for p in weight.parts])
    got = tables.dequantize(weight, dtype).float()
    assert (got - exact).norm() / exact.norm() < (3e-3 if dtype == torch.bfloat16 else 1e-4)
