"""What sampling takes and gives: one row of persistent device tensors for each request of the batch."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

MAX_BIAS = 300
MAX_VOCAB = 1 << 18


class Mode(enum.IntEnum):
    """How much of the pipeline runs, which the host knows; a mode also serves the rows of those before it."""

    GREEDY = 0  # argmax alone: every row has temperature 0
    PLAIN = 1  # temperature: no row has top-k, top-p or min-p
    FILTERED = 2


@dataclass(frozen=True, slots=True)
class RowParams:
    """One request's parameters; the same meaning and ranges as the engine's SamplingParams."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def mode(self) -> Mode:
        if self.temperature == 0:
            return Mode.GREEDY
        is_filtered = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return Mode.FILTERED if is_filtered else Mode.PLAIN

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True, slots=True, eq=False)
class SamplingBatch:
    """Parameters and state of R rows, on the device for the life of the process (CUDA graphs hold them).

    temperature (0: greedy), top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: float32
    [R]; top_k: int32 [R], 0 keeps all. seed: int64 [R], a seed modulo 2^64. position: int64 [R], output
    tokens so far. is_in_prompt: bool [R, V] and output_counts: int32 [R, V], None until a request has
    penalties. bias_ids: int32, bias_values: float32 [R, MAX_BIAS], bias_count: int32 [R], None until a
    request has a bias; a row's ids are distinct. masks: int32 [R, ceil(V / 32)], bit i % 32 of word i // 32
    is set where the row may choose token i, and is_masked: int32 [R], whether it is bound to them.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    seed: Tensor
    position: Tensor
    is_in_prompt: Tensor | None = None
    output_counts: Tensor | None = None
    bias_ids: Tensor | None = None
    bias_values: Tensor | None = None
    bias_count: Tensor | None = None
    is_masked: Tensor | None = None
    masks: Tensor | None = None

    @classmethod
    def allocate(cls, capacity: int, device: torch.device | str) -> "SamplingBatch":
        """Greedy rows without penalties and bias."""
        zeros = lambda dtype: torch.zeros(capacity, dtype=dtype, device=device)  # noqa: E731
        ones = lambda: torch.ones(capacity, device=device)  # noqa: E731
        return cls(
            temperature=zeros(torch.float32),
            top_k=zeros(torch.int32),
            top_p=ones(),
            min_p=zeros(torch.float32),
            repetition_penalty=ones(),
            presence_penalty=zeros(torch.float32),
            frequency_penalty=zeros(torch.float32),
            seed=zeros(torch.int64),
            position=zeros(torch.int64),
        )

    @property
    def capacity(self) -> int:
        return self.temperature.shape[0]

    def with_penalties(self, vocab_size: int) -> "SamplingBatch":
        """The same tensors and those that penalties need; graphs captured before do not see them."""
        shape, device = (self.capacity, vocab_size), self.temperature.device
        return replace(
            self,
            is_in_prompt=torch.zeros(shape, dtype=torch.bool, device=device),
            output_counts=torch.zeros(shape, dtype=torch.int32, device=device),
        )

    def with_bias(self) -> "SamplingBatch":
        """The same tensors and those that logit bias needs; graphs captured before do not see them."""
        shape, device = (self.capacity, MAX_BIAS), self.temperature.device
        return replace(
            self,
            bias_ids=torch.zeros(shape, dtype=torch.int32, device=device),
            bias_values=torch.zeros(shape, device=device),
            bias_count=torch.zeros(self.capacity, dtype=torch.int32, device=device),
        )

    def with_masks(self, vocab_size: int) -> "SamplingBatch":
        """The same tensors and those of masks, for rows that are not bound to them yet."""
        device = self.temperature.device
        return replace(
            self,
            is_masked=torch.zeros(self.capacity, dtype=torch.int32, device=device),
            masks=allocate_masks(self.capacity, vocab_size, device),
        )

    def set_row(self, row: int, params: RowParams, seed: int, position: int = 0) -> None:
        """Give a row to a request (outside of graphs, on the stream that runs them).

        Raises ValueError for penalties or a bias that the batch has no tensors for.
        """
        if params.has_penalties and self.output_counts is None:
            raise ValueError("penalties need with_penalties()")
        if params.logit_bias and self.bias_count is None:
            raise ValueError("a logit bias needs with_bias()")
        if len(params.logit_bias) > MAX_BIAS:
            raise ValueError(f"logit_bias has {len(params.logit_bias)} entries, limit {MAX_BIAS}")
        self.top_k[row].fill_(min(params.top_k, MAX_VOCAB))
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            getattr(self, name)[row].fill_(getattr(params, name))
        self.seed[row].fill_((seed + (1 << 63)) % (1 << 64) - (1 << 63))
        self.position[row].fill_(position)
        if self.bias_ids is not None and self.bias_values is not None and self.bias_count is not None:
            count = len(params.logit_bias)
            self.bias_count[row].fill_(count)
            if count:
                ids, values = list(params.logit_bias), list(params.logit_bias.values())
                self.bias_ids[row, :count].copy_(torch.tensor(ids, dtype=torch.int32))
                self.bias_values[row, :count].copy_(torch.tensor(values, dtype=torch.float32))

    def set_tokens(self, row: int, prompt_ids: Tensor, output_ids: Tensor) -> None:
        """Note a row's tokens (int64, on the device) for its penalties."""
        assert self.is_in_prompt is not None
        assert self.output_counts is not None
        self.is_in_prompt[row].zero_().index_fill_(0, prompt_ids, True)
        ones = torch.ones_like(output_ids, dtype=torch.int32)
        self.output_counts[row].zero_().index_add_(0, output_ids, ones)


def num_mask_words(vocab_size: int) -> int:
    """int32 words of a row of `SamplingBatch.masks`."""
    return -(-vocab_size // 32)


def allocate_masks(capacity: int, vocab_size: int, device: torch.device | str) -> Tensor:
    """Masks that allow everything."""
    return torch.full((capacity, num_mask_words(vocab_size)), -1, dtype=torch.int32, device=device)


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """What was chosen: token_ids, int32 [R].

    Where logprobs are asked for, of the model's own distribution, before penalties, bias and mask: logprobs,
    float32 [R], of those tokens; top_ids int32 and top_logprobs float32 [R, n], best first.
    """

    token_ids: Tensor
    logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None
