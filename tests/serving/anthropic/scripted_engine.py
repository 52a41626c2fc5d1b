"""A TEST DOUBLE of the engine: says given pieces of text, one a step, and keeps what it was asked."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine import EngineStats, ModelInfo, RequestOutput, SamplingParams, Urgency
from engine.urgency import NOT_URGENT

NUM_CACHED = 16


@dataclass
class ScriptedEngine:
    """error: raised after the pieces, in place of an end."""

    pieces: Sequence[str]
    finish_reason: str = "stop"
    stop_reason: str | int | None = None
    error: Exception | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    params: SamplingParams | None = None
    prompt: tuple[int, ...] = ()

    @property
    def model(self) -> ModelInfo:
        return ModelInfo("m", "double", 0, 1000, 256, 0, "none")

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0)

    def chat_template(self, *, has_tools: bool) -> str | None:
        return None

    def token_id(self, token: str) -> int | None:
        return None

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    async def tokenize_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        self.messages = [dict(m) for m in messages]
        return list(range(20))

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        arrival_time: float | None = None,
        urgency: Urgency = NOT_URGENT,
    ) -> AsyncGenerator[RequestOutput, None]:
        self.prompt, self.params = tuple(prompt_token_ids), params
        last = len(self.pieces) - 1
        for number, piece in enumerate(self.pieces):
            is_end = number == last and self.error is None
            yield RequestOutput(
                request_id,
                0,
                piece,
                (number,),
                len(prompt_token_ids),
                NUM_CACHED,
                number + 1,
                finish_reason=self.finish_reason if is_end else None,
                stop_reason=self.stop_reason if is_end else None,
            )
        if self.error is not None:
            raise self.error
