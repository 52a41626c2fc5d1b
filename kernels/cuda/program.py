"""A decode step as a list of phases that one kernel launch computes (src/program.h, src/step.cu)."""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.cuda.build import check, library
from kernels.cuda.packing import DEVICE_FORMATS, UNIT_COLUMNS, DeviceMatrix, DeviceWeight
from kernels.types import AttentionWeights, FFNWeights

MAX_TOKENS = 16
BLOCK_TOKENS = 16  # of a KV block
HEAD_DIMS = (64, 128, 256)
_STORE, _GATED, _ATTENTION, _PREPARE = 0, 1, 2, 3
_PLAIN, _NORM, _PREPARED = 0, 1, 2
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_SLAB_UNITS = 16
_UNIT_BYTES_PER_TOKEN = 548  # codes, sums and scale of 256 activations
_ITEM_HEADS, _MIN_COLUMNS, _MAX_COLUMNS, _MAX_SPLITS, _WARPS = 8, 64, 128, 64, 8
_RESIDENT_X_BYTES = 72 << 10  # activations that may stay in shared memory; the ring gets the rest
_MAX_DIRECT_TOKENS, _MAX_DIRECT_UNITS = 2, 256


class _Segment(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("row_factor", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int32),
        ("num_tiles", ctypes.c_int32),
        ("unit_bytes", ctypes.c_int32),
        ("format", ctypes.c_int32),
    )


class _Matmul(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("source", ctypes.c_int32),
        ("units", ctypes.c_int32),
        ("num_segments", ctypes.c_int32),
        ("rotation", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("x_marks", ctypes.c_int32),
        ("delta_marks", ctypes.c_int32),
        ("stream_marks", ctypes.c_int32),
        ("out_marks", ctypes.c_int32),
        ("copy", ctypes.c_int32),
        ("segments", _Segment * 3),
        ("x", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("delta", ctypes.c_void_p),
        ("delta_norm", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("qkv_stride", ctypes.c_int32),
        ("heads_per_kv", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("qkv_marks", ctypes.c_int32),
        ("out_marks", ctypes.c_int32),
        ("qkv", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("k_cache", ctypes.c_void_p),
        ("v_cache", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
    )


class _Phase(ctypes.Union):
    _fields_ = (("matmul", _Matmul), ("attention", _Attention), ("words", ctypes.c_uint64 * 32))


class _Step(ctypes.Structure):
    _fields_ = (
        ("phases", ctypes.c_void_p),
        ("num_phases", ctypes.c_int32),
        ("num_tokens", ctypes.c_int32),
        ("arrivals", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("sequences", ctypes.c_void_p),
        ("first_rows", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("sums", ctypes.c_void_p),
        ("sums_stride", ctypes.c_int64),
        ("split_out", ctypes.c_void_p),
        ("split_lse", ctypes.c_void_p),
        ("split_count", ctypes.c_void_p),
        ("prepared", ctypes.c_void_p),
        ("prepared_squares", ctypes.c_void_p),
        ("prepared_stride", ctypes.c_int64),
        ("squares_stride", ctypes.c_int64),
        ("ring_bytes", ctypes.c_int32),
        ("x_bytes", ctypes.c_int32),
        ("factor_bytes", ctypes.c_int32),
        ("slabs_that_fit", ctypes.c_int32),
        ("stragglers", ctypes.c_int32),
    )


assert ctypes.sizeof(_Phase) == 256


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """Where a step's tokens are, on the device; read at every launch. All int32.

    positions [16]: -1 marks padding. sequences [16]: row of the block table. first_rows [16]: row of the same
    sequence's first token in this step. block_table [sequences, max blocks].
    """

    token_ids: Tensor
    positions: Tensor
    sequences: Tensor
    first_rows: Tensor
    block_table: Tensor

    @classmethod
    def allocate(cls, num_sequences: int, max_blocks: int, device: torch.device) -> "StepInputs":
        """One token each of the first sequences, all rows padding."""
        rows = torch.arange(MAX_TOKENS, dtype=torch.int32, device=device)
        table = torch.zeros(num_sequences, max_blocks, dtype=torch.int32, device=device)
        return cls(torch.zeros_like(rows), torch.full_like(rows, -1), rows.clone(), rows.clone(), table)


@dataclass(slots=True, eq=False)
class Link:
    """A buffer between phases of a program: one writes it, later ones read it, and so again.

    data: float32 [tokens, units of 256 columns], in the order and with the marks of src/async.cuh.
    """

    data: Tensor
    writings: int = 0  # so far in a launch

    @classmethod
    def allocate(cls, tokens: int, width: int, device: torch.device) -> "Link":
        """Zeros: marks of writing number 0."""
        width = -(-width // UNIT_COLUMNS) * UNIT_COLUMNS
        return cls(torch.zeros(tokens, width, device=device))


@dataclass(slots=True)
class PhaseList:
    """Phases under construction, and the tensors that they point at.

    `direct`: every block quantizes the activations for itself (fewest barriers, for one or two tokens).
    `prepared`: a phase before each product does it once for all blocks.
    """

    direct: list[_Phase] = field(default_factory=list)
    prepared: list[_Phase] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    max_tiles: int = 1  # of one block in one phase
    max_units: int = 1
    min_items: int | None = None  # tiles, or pairs of tiles, of the smallest product
    has_fp8_cache: bool = False
    _next_block: int = 0
    _num_products: int = 0
    _marks: list[tuple[Any, str, Link, int]] = field(default_factory=list)

    def add_matmul(
        self,
        weight: DeviceWeight,
        x: Tensor | Link,
        out: Tensor | Link,
        *,
        bias: Tensor | None = None,
        norm: Tensor | None = None,
        eps: float = 0.0,
        delta: Link | None = None,
        delta_norm: Tensor | None = None,
        stream: Link | None = None,
        activation: str | None = None,
    ) -> None:
        """out[:, :] = W x, or act(W0 x) * (W1 x) where `activation` is set.

        x, out: float32 [tokens, k] and [tokens, n], x from before the launch; or links within it.

        With `norm`, x is the residual stream: delta (through RMSNorm with `delta_norm`, if set) is added
        to it, the result goes to `stream`, and RMSNorm of it is multiplied.
        """
        gated = activation is not None
        phase = _Phase()
        m = phase.matmul
        m.kind, m.source = (_GATED if gated else _STORE), (_PLAIN if norm is None else _NORM)
        m.units, m.num_segments, m.k, m.eps = weight.parts[0].units, len(weight.parts), weight.k, eps
        m.activation = ACTIVATIONS[activation] if activation else 0
        first = 0
        for i, part in enumerate(weight.parts):
            own = None if bias is None else bias[first : first + part.n].contiguous()
            m.segments[i] = segment_of(part, own)
            self.tensors += [t for t in (part.data, part.row_factor, own) if t is not None]
            first += part.n
        for name, tensor in (
            ("x", _data(x)),
            ("norm", norm),
            ("delta", _data(delta)),
            ("delta_norm", delta_norm),
            ("stream", _data(stream)),
            ("out", _data(out)),
        ):
            setattr(m, name, self._pointer(tensor))
        m.out_stride = out.data.stride(0)
        items = weight.parts[0].num_tiles if gated else sum(p.num_tiles for p in weight.parts)
        blocks = num_blocks()
        m.rotation = (blocks - self._next_block) % blocks
        self._next_block = (self._next_block + items) % blocks
        self.min_items = min(items, self.min_items or items)
        self.max_tiles = max(self.max_tiles, -(-items // blocks) * (2 if gated else 1))
        self.max_units = max(self.max_units, m.units)
        before, after = _Phase.from_buffer_copy(phase), _Phase.from_buffer_copy(phase)
        before.matmul.kind, after.matmul.source = _PREPARE, _PREPARED
        before.matmul.copy = after.matmul.copy = self._num_products % 2
        self._num_products += 1
        matmuls = [p.matmul for p in (phase, before, after)]
        self._note(matmuls, "x_marks", x)
        self._note(matmuls, "delta_marks", delta)
        self._note(matmuls, "stream_marks", stream, is_written=True)
        self._note(matmuls, "out_marks", out, is_written=True)
        self.direct.append(phase)
        self.prepared += [before, after]

    def add_attention(
        self, weights: AttentionWeights, qkv: Link, k_cache: Tensor, v_cache: Tensor, out: Link
    ) -> None:
        """out = attention of qkv [tokens, (heads + 2 kv heads) * head_dim]; appends keys and values.

        The caches of a program have one form of `kernels.kv_cache`.
        """
        w, phase = weights, _Phase()
        self.has_fp8_cache = k_cache.dtype == torch.uint8
        a = phase.attention
        a.kind, a.num_heads, a.num_kv_heads, a.head_dim = _ATTENTION, w.num_heads, w.num_kv_heads, w.head_dim
        a.window, a.scale, a.eps, a.qkv_stride = w.window or 0, w.scale, w.eps, qkv.data.stride(0)
        a.heads_per_kv = w.num_heads // w.num_kv_heads
        a.groups = -(-a.heads_per_kv // _ITEM_HEADS)
        for name, tensor in (
            ("qkv", qkv.data),
            ("cos", w.cos),
            ("sin", w.sin),
            ("q_norm", w.q_norm),
            ("k_norm", w.k_norm),
            ("k_cache", k_cache),
            ("v_cache", v_cache),
            ("out", out.data),
        ):
            setattr(a, name, self._pointer(tensor))
        a.out_stride = out.data.stride(0)
        self._note([a], "qkv_marks", qkv)
        self._note([a], "out_marks", out, is_written=True)
        self.direct.append(phase)
        self.prepared.append(phase)

    def finish(self) -> None:
        """Fill in the marks: how often a launch writes a buffer is known when all phases are there."""
        for phase, name, link, writing in self._marks:
            setattr(phase, name, writing & 1 | (link.writings & 1) << 1 | 4)

    def _note(
        self, phases: Sequence[Any], name: str, buffer: Tensor | Link | None, is_written: bool = False
    ) -> None:
        if isinstance(buffer, Link):
            buffer.writings += is_written
            self._marks += [(phase, name, buffer, buffer.writings) for phase in phases]

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self.tensors.append(tensor)  # lives as long as the program
        return tensor.data_ptr()


class StepProgram:
    """Phases on the device, ready to be launched for 1 to 16 tokens."""

    def __init__(
        self, phases: PhaseList, inputs: StepInputs, heads: tuple[int, int, int] = (1, 1, 64)
    ) -> None:
        """heads: query heads, key-value heads, head_dim of the attention phases."""
        device = inputs.positions.device
        phases.finish()
        self._keep = phases.tensors
        self._max_units = phases.max_units
        self._launch = library().peregrine_step_fp8 if phases.has_fp8_cache else library().peregrine_step
        self.inputs = inputs
        self._direct = _on_device(phases.direct, device)
        self._prepared = _on_device(phases.prepared, device)
        num_heads, num_kv_heads, head_dim = heads
        columns = _MIN_COLUMNS  # of an item; where it has more, there are fewer items
        groups = num_kv_heads * -(-(num_heads // num_kv_heads) // _ITEM_HEADS) * (head_dim // columns)
        slots = MAX_TOKENS * groups * _MAX_SPLITS * _ITEM_HEADS
        self._arrivals = torch.zeros(3, dtype=torch.int32, device=device)
        self._split_out = torch.empty(slots * columns, device=device)
        self._split_lse = torch.empty(slots * 2, device=device)
        self._split_count = torch.zeros(MAX_TOKENS * groups, dtype=torch.int32, device=device)
        self._factor_bytes = phases.max_tiles * 16 * 4
        self._sums_stride = phases.max_tiles * 16 * MAX_TOKENS
        self._sums = torch.empty(num_blocks() * self._sums_stride, device=device)
        size = self._max_units * MAX_TOKENS
        self._activations = torch.empty(2, size * _UNIT_BYTES_PER_TOKEN, dtype=torch.uint8, device=device)
        self._squares = torch.empty(2, size, device=device)
        # Where every block has a part in every product, nobody who has all of a phase's values can overtake
        # a block by more than a phase, and so overwrite what it still reads.
        has_all = phases.min_items is not None and phases.min_items >= num_blocks()
        self._direct_stragglers = stragglers() if has_all else 0
        # Queries in bfloat16, and what the warps of a block found.
        self._attention_bytes = 2 * _ITEM_HEADS * (head_dim + 8) * 2
        self._attention_bytes += _WARPS * _ITEM_HEADS * (min(head_dim, _MAX_COLUMNS) + 2) * 4

    def launch(self, num_tokens: int) -> None:
        """Run on the current stream.

        Raises:
            ValueError: more than 16 tokens.
            RuntimeError: the launch is refused.
        """
        if not 1 <= num_tokens <= MAX_TOKENS:
            raise ValueError(f"num_tokens must be 1 to {MAX_TOKENS}, got {num_tokens}")
        mma = next(m for m in (1, 2, 4) if num_tokens <= 4 * m)
        slab = _SLAB_UNITS * num_tokens * _UNIT_BYTES_PER_TOKEN
        all_slabs = -(-self._max_units // _SLAB_UNITS)
        is_direct = self._max_units <= _MAX_DIRECT_UNITS and (
            num_tokens == 1 or (num_tokens <= _MAX_DIRECT_TOKENS and all_slabs * slab <= _RESIDENT_X_BYTES)
        )
        slabs = all_slabs if is_direct else min(all_slabs, max(_RESIDENT_X_BYTES // slab, 1))
        x_bytes = -(-max(slabs * slab, self._attention_bytes) // 128) * 128
        phases = self._direct if is_direct else self._prepared
        late = self._direct_stragglers if is_direct else stragglers()
        ring_bytes = (step_room(mma) - x_bytes - self._factor_bytes) // 128 * 128
        step = _Step(
            phases.data_ptr(),
            len(phases),
            num_tokens,
            self._arrivals.data_ptr(),
            self.inputs.positions.data_ptr(),
            self.inputs.sequences.data_ptr(),
            self.inputs.first_rows.data_ptr(),
            self.inputs.block_table.data_ptr(),
            self.inputs.block_table.stride(0),
            self._sums.data_ptr(),
            self._sums_stride,
            self._split_out.data_ptr(),
            self._split_lse.data_ptr(),
            self._split_count.data_ptr(),
            self._activations.data_ptr(),
            self._squares.data_ptr(),
            self._activations.stride(0),
            self._squares.stride(0),
            ring_bytes,
            x_bytes,
            self._factor_bytes,
            slabs,
            late,
        )
        stream = torch.cuda.current_stream().cuda_stream
        check(self._launch(ctypes.byref(step), mma, num_blocks(), ctypes.c_void_p(stream)))


def segment_of(matrix: DeviceMatrix, bias: Tensor | None = None) -> _Segment:
    """Valid while the tensors live."""
    return _Segment(
        matrix.data.data_ptr(),
        matrix.row_factor.data_ptr(),
        None if bias is None else bias.data_ptr(),
        matrix.n,
        matrix.num_tiles,
        matrix.format.unit_bytes,
        DEVICE_FORMATS.index(matrix.format),
    )


def _data(buffer: Tensor | Link | None) -> Tensor | None:
    return buffer.data if isinstance(buffer, Link) else buffer


def _on_device(phases: Sequence[_Phase], device: torch.device) -> Tensor:
    """uint8 [phases, 256]."""
    raw = bytearray(b"".join(bytes(p) for p in phases))
    return torch.frombuffer(raw, dtype=torch.uint8).view(len(phases), -1).to(device)


@functools.cache
def num_blocks() -> int:
    """One block a multiprocessor."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def stragglers() -> int:
    """Blocks that may be late for a phase whose values carry marks.

    Without any the 8B shape takes 1.84 ms a token, with a half of the blocks 1.77, with ten in eleven 1.74.
    """
    return num_blocks() * 10 // 11


@functools.cache
def step_room(mma: int) -> int:
    """Bytes of shared memory for ring, activations and row factors together."""
    room = ctypes.c_int()
    check(library().peregrine_step_room(torch.cuda.current_device(), mma, ctypes.byref(room)))
    return room.value


def add_layers(
    phases: PhaseList,
    layers: Sequence[tuple[AttentionWeights, FFNWeights]],
    caches: Sequence[tuple[Tensor, Tensor]],
    embedded: Tensor,
    final_norm: Tensor,
    eps: float,
    head: DeviceWeight,
    logits: Tensor,
) -> None:
    """Phases of a whole decoder: from the embedded tokens [tokens, hidden] to logits [tokens, vocab].

    The layers' matrices are DeviceWeight (gate and up as two parts). caches: keys and values in one form of
    `kernels.kv_cache`.
    """
    device, (tokens, hidden) = embedded.device, embedded.shape
    first, _ = layers[0]
    q_size = first.num_heads * first.head_dim
    qkv = Link.allocate(tokens, q_size + 2 * first.num_kv_heads * first.head_dim, device)
    attended = Link.allocate(tokens, q_size, device)
    gated = Link.allocate(tokens, max(_device_weight(f.down).k for _, f in layers), device)
    delta = Link.allocate(tokens, hidden, device)
    # The residual stream: what one block writes, the next one reads while it writes the other buffer.
    other, last = (Link.allocate(tokens, hidden, device) for _ in range(2))
    now: Tensor | Link = embedded
    pending: Link | None = None  # delta of the block before, and its norm
    pending_norm: Tensor | None = None
    for (attention, ffn), (k_cache, v_cache) in zip(layers, caches, strict=True):
        for block in (attention, ffn):
            stream = None if pending is None else other
            enter = functools.partial(
                phases.add_matmul,
                norm=block.norm,
                eps=block.eps,
                delta=pending,
                delta_norm=pending_norm,
                stream=stream,
            )
            if isinstance(block, AttentionWeights):
                enter(_device_weight(block.qkv), now, qkv, bias=block.qkv_bias)
                phases.add_attention(block, qkv, k_cache, v_cache, attended)
                phases.add_matmul(_device_weight(block.o), attended, delta, bias=block.o_bias)
            else:
                both = _device_weight(block.gate_up)
                enter(both, now, gated, bias=block.gate_up_bias, activation=block.activation)
                phases.add_matmul(_device_weight(block.down), gated, delta, bias=block.down_bias)
            if stream is not None:
                now, other, last = stream, last, stream
            pending, pending_norm = delta, block.post_norm
    phases.add_matmul(head, now, logits, norm=final_norm, eps=eps, delta=pending, delta_norm=pending_norm)


def _device_weight(weight: object) -> DeviceWeight:
    assert isinstance(weight, DeviceWeight)
    return weight
