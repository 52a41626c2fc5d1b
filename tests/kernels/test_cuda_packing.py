"""The GPU's fragment order holds exactly what the checkpoint's bytes say."""

import pytest
import torch

from kernels.cuda.packing import (
    DEVICE_FORMATS,
    DeviceFormat,
    dequantize,
    device_format,
    is_supported,
    to_device,
)
from kernels.formats import dequantize as dequantize_packed
from kernels.formats import stack
from tests.kernels.helpers import random_packed

CPU = torch.device("cpu")
NAMES = [
    "w2g128",
    "w2g32",
    "w2g64",
    "w3g64",
    "w3g128",
    "w4g64",
    "w4g128",
    "w5g128",
    "w6g128-sym",
    "w8row-sym",
]
NAMES += ["w4g32-f16", "w5g32-f16", "w8g32-f16", "w4g64-sym", "w4g256", "w3row", "w2row-sym", "w4g64-f16"]


def _same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal codes and parameters; the products are rounded in another order."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(16, 256), (48, 512), (37, 96), (5, 800)])
def test_same_values(name: str, shape: tuple[int, int]) -> None:
    packed = random_packed(*shape, name)
    (matrix,) = to_device(packed, CPU).parts
    _same(dequantize(matrix), dequantize_packed(packed))


def test_cut_into_gate_and_up() -> None:
    packed = random_packed(64, 256, "w4g64")
    weight = to_device(packed, CPU, rows=(32, 32))
    assert [p.n for p in weight.parts] == [32, 32]
    _same(torch.cat([dequantize(p) for p in weight.parts]), dequantize_packed(packed))
    with pytest.raises(ValueError, match="cannot cut"):
        to_device(packed, CPU, rows=(24, 40))


def test_stacked_formats_stay_apart() -> None:
    packed = stack([random_packed(32, 256, n) for n in ("w4g64", "w3g64", "w8row-sym")])
    weight = to_device(packed, CPU)
    _same(torch.cat([dequantize(p) for p in weight.parts]), dequantize_packed(packed))


def test_unknown_formats_are_refused() -> None:
    packed = random_packed(16, 256, "w8g64")
    assert device_format(packed.format) is None
    assert not is_supported(packed)
    with pytest.raises(ValueError, match="w8g64"):
        to_device(packed, CPU)


def test_bytes_of_a_unit() -> None:
    assert DeviceFormat(4, 64, "zero").unit_bytes * 8 == 4096 * 4.25
    assert all(f.unit_bytes % 64 == 0 for f in DEVICE_FORMATS)
