"""Random weights, caches and steps of ugly sizes."""

import torch

import kernels
from kernels.cuda.packing import DeviceWeight, to_device
from kernels.formats import Format

FORMATS = [
    "w4g32-f16",
    "w8g32-f16",
    "w5g64-f16",
    "w2g64",
    "w3g64",
    "w3g128-sym",
    "w4g128",
    "w6row",
    "w8row-sym",
]


def random_integer(n: int, k: int, name: str, seed: int = 0) -> kernels.IntegerWeight:
    """Random codes and parameters; the last group is short where the group size does not divide K."""
    f = Format.parse(name)
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << f.bits, (n, k), generator=g, dtype=torch.uint8)
    groups = (n, f.num_groups(k))
    size = 2 / (1 << f.bits) / k**0.5
    if f.kind == "affine":
        scale = (torch.rand(groups, generator=g) + 0.5) * size
        offset = -scale * (1 << (f.bits - 1)) * (1 + 0.1 * torch.randn(groups, generator=g))
        return kernels.IntegerWeight(f, codes, scale.half(), offset.half())
    scale = torch.randint(100, 256, groups, generator=g, dtype=torch.uint8)
    zero = torch.randint(90, 160, groups, generator=g, dtype=torch.uint8) if f.kind == "zero" else None
    row_scale = (torch.rand(n, generator=g) + 0.5) * size
    return kernels.IntegerWeight(f, codes, scale, zero, row_scale.half())


def random_packed(n: int, k: int, name: str, seed: int = 0) -> kernels.PackedWeight:
    return kernels.pack(random_integer(n, k, name, seed))


def random_weight(n: int, k: int, *names: str, device: str = "cuda") -> DeviceWeight:
    """Matrices [n, k] of these formats, one below the other, as the CUDA kernels have them."""
    packed = (random_packed(n, k, name, seed) for seed, name in enumerate(names))
    return DeviceWeight(tuple(part for p in packed for part in to_device(p, torch.device(device)).parts))


def rope(max_len: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(max_len).float(), 1e4 ** -(torch.arange(0, dim, 2) / dim))
    return angles.cos(), angles.sin()


def step(
    chunks: list[tuple[int, int]], num_blocks: int, block_size: int = 16, seed: int = 0
) -> kernels.AttentionMetadata:
    """A step of sequences (num_computed, num_new), their blocks scattered over the cache."""
    g = torch.Generator().manual_seed(seed)
    free = torch.randperm(num_blocks, generator=g, dtype=torch.int32).tolist()
    longest = max(-(-(a + b) // block_size) for a, b in chunks)
    table = torch.full((len(chunks), longest), num_blocks - 1, dtype=torch.int32)
    positions, slots, starts = [], [], [0]
    for i, (computed, new) in enumerate(chunks):
        blocks = [free.pop() for _ in range(-(-(computed + new) // block_size))]
        table[i, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        for p in range(computed, computed + new):
            positions.append(p)
            slots.append(blocks[p // block_size] * block_size + p % block_size)
        starts.append(len(positions))
    return kernels.AttentionMetadata(
        positions=torch.tensor(positions, dtype=torch.int32),
        slot_mapping=torch.tensor(slots, dtype=torch.int32),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor([a + b for a, b in chunks], dtype=torch.int32),
        block_table=table,
    )


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest deviation over the largest expected magnitude; NaN counts as infinite."""
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    return float("inf") if torch.isnan(got).any() else float(error)
