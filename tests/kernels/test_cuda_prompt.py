"""Products from packed weights, against float64 on the same float16 activations."""

import pytest
import torch

from kernels import prefill
from kernels.cuda import prompt, tables
from kernels.cuda.packing import DeviceWeight, dequantize, to_device
from tests.kernels.helpers import random_packed

HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_HOPPER, reason="needs a Hopper GPU (sm_90)")]
DEVICE = torch.device("cuda")
NARROW = ["w2g128", "w2g32", "w2g64", "w3g64", "w3g128", "w4g64", "w4g128", "w4g32-f16", "w4g64-sym"]
WIDE = ["w5g128", "w6g128", "w6g128-sym", "w8row-sym", "w5g32-f16", "w8g32-f16"]


def _weight(n: int, k: int, *names: str) -> DeviceWeight:
    parts = [to_device(random_packed(n, k, name, seed), DEVICE).parts for seed, name in enumerate(names)]
    return DeviceWeight(sum(parts, ()))


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
    assert float(errors.max()) < 2.5e-3  # bfloat16 results, weights of 11 bits
    return got


@pytest.mark.parametrize("name", [*NARROW, *WIDE])
@pytest.mark.parametrize("shape", [(16, 256), (144, 96), (1043, 800)])
@pytest.mark.parametrize("tokens", [1, 17, 64, 100, 300])
@pytest.mark.parametrize("rows", [128, 256])
@pytest.mark.parametrize("splits", [1, 3])
def test_product(name, shape, tokens, rows, splits, monkeypatch):
    weight = _weight(*shape, name)
    units = weight.parts[0].units
    tile, _, _ = prompt.plan(tokens, 16, 1)
    monkeypatch.setattr(prompt, "plan", lambda *sizes: (tile, rows, -(-units // -(-units // splits))))
    _check(weight, tokens, monkeypatch)


@pytest.mark.parametrize("tokens", [32, 200])
def test_parts_of_one_format_and_of_several(tokens, monkeypatch):
    for names in (
        ("w4g64",) * 3,
        ("w4g64", "w4g64", "w3g64"),
        ("w2g64", "w4g32-f16"),
        ("w8row-sym", "w6g128"),
    ):
        weight = _weight(208, 512, *names)
        assert prompt.can_multiply(weight)
        _check(weight, tokens, monkeypatch)
    assert not prompt.can_multiply(_weight(75, 256, "w4g64", "w4g64"))


def test_a_narrow_matrix_is_split_along_k(monkeypatch):
    got = _check(_weight(128, 8192, "w4g64"), 40, monkeypatch)
    assert got.values.dim() == 3
    assert len(got.values) > 1


@pytest.mark.parametrize("tokens", [16, 130])
@pytest.mark.parametrize("n", [640, 1001])
def test_a_whole_product(tokens, n, monkeypatch):
    got = _check(_weight(n, 2048, "w6g128"), tokens, monkeypatch, is_whole=True)
    assert got.values.shape == (tokens, n)
    assert got.values.dtype == torch.float32


def test_replays_of_a_chain_are_the_same_bits():
    """Kernels that start before the one before has ended read nothing too early."""
    from kernels.triton_ops import prefill as ops

    weights = [_weight(1024, 1024, "w4g64") for _ in range(4)]
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
