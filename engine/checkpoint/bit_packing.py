"""Codes of 2 to 8 bits in int32 words, lowest bits first: what GPTQ, AWQ and compressed-tensors store."""

import torch
from torch import Tensor

_ROWS = 1024  # of widths that straddle words, unpacked at a time: temporaries stay small
_MASK = 0xFFFFFFFF


def num_words(count: int, bits: int) -> int:
    """Words that hold a row of `count` codes."""
    return -(-count * bits // 32)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """uint8 [R, count] from int32 [R, words]; code i is bits i * `bits` and up of its row.

    Raises ValueError for words of another type or number.
    """
    expected = num_words(count, bits)
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != expected:
        raise ValueError(
            f"packed codes are {words.dtype} {tuple(words.shape)}, expected int32 rows of {expected}"
        )
    if 8 % bits == 0:  # whole codes in every byte
        octets = words.contiguous().view(torch.uint8)
        codes = [(octets >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        return torch.stack(codes, dim=-1).flatten(1)[:, :count].contiguous()
    first = torch.arange(count) * bits
    low, high = first // 32, ((first + bits - 1) // 32).clamp(max=words.shape[1] - 1)
    parts = []
    for rows in words.split(_ROWS):
        wide = rows.long() & _MASK
        both = wide[:, low] | (wide[:, high] << 32)  # the same word twice where the code lies in one
        parts.append(((both >> first % 32) & ((1 << bits) - 1)).to(torch.uint8))
    return torch.cat(parts)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """int32 [R, words] from uint8 [R, count]: the inverse of `unpack_words`."""
    rows, count = codes.shape
    words = torch.zeros(rows, num_words(count, bits) + 1, dtype=torch.int64)
    first = torch.arange(count) * bits
    placed = codes.long() << first % 32
    words.index_add_(1, first // 32, placed & _MASK)
    words.index_add_(1, first // 32 + 1, placed >> 32)
    signed = torch.where(words > _MASK >> 1, words - (1 << 32), words)
    return signed[:, :-1].to(torch.int32).contiguous()
