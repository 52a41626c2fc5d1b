"""Bounds of values, against inputs that come as close to them as any can."""

import pytest
import torch

from engine.cuda.bounds import largest_gated, largest_output
from kernels.cuda.packing import DeviceMatrix, dequantize, to_device
from tests.kernels.helpers import random_packed

K = 800
NORM = torch.linspace(0.1, 3, K)


def matrix(n: int, name: str, seed: int) -> DeviceMatrix:
    return to_device(random_packed(n, K, name, seed), torch.device("cpu")).parts[0]


def longest(direction: torch.Tensor) -> torch.Tensor:
    """As RMSNorm may give it, before its weights."""
    return direction / direction.norm() * K**0.5


@pytest.mark.parametrize("n", [75, 1100])  # rows are taken 1,024 at a time
@pytest.mark.parametrize("has_bias", [False, True])
def test_an_output(n, has_bias):
    weight = matrix(n, "w3g64", 0)
    dense = dequantize(weight) * NORM
    bias = torch.linspace(-1, 1, n) * dense.norm() / n if has_bias else None
    limit = largest_output(weight, NORM, bias)
    reached = [dense[i] @ longest(dense[i]) + (0 if bias is None else bias[i].abs()) for i in range(n)]
    assert 0.95 * limit < max(map(float, reached)) < limit


@pytest.mark.parametrize("n", [48, 1040])
@pytest.mark.parametrize("is_alike", [False, True])
def test_a_gated_product(n, is_alike):
    gate, up = matrix(n, "w4g64", 1), matrix(n, "w4g64", 1 if is_alike else 2)
    limit = largest_gated(gate, up, NORM)
    g, u = dequantize(gate) * NORM, dequantize(up) * NORM
    unit_g, unit_u = (v / v.norm(dim=1, keepdim=True) for v in (g, u))
    most = 0.0
    for sign in (1, -1):  # the eigenvectors of y g u y
        directions = unit_g + sign * unit_u
        for i in range(n):
            if float(directions[i].norm()) > 1e-3:
                y = longest(directions[i])
                most = max(most, abs(float(g[i] @ y) * float(u[i] @ y)))
    assert 0.95 * limit < most < limit
