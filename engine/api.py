"""The face the server sees: a protocol, so that serving can be tested against a fake."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from engine.outputs import EngineStats, ModelInfo, RequestOutput, RequestTimings, StepTimes
from engine.pooling_params import PoolingParams
from engine.sampling_params import SamplingParams
from engine.urgency import NOT_URGENT, Urgency


class InferenceEngine(Protocol):
    """What `AsyncEngine` offers and everything the server uses of it."""

    @property
    def model(self) -> ModelInfo: ...

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, computed off the event loop."""
        ...

    def chat_template(self, *, has_tools: bool) -> str | None:
        """The source of the model's template for conversations with or without tools; None without one."""
        ...

    async def tokenize_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation under the model's chat template.

        tools: as Hugging Face's templates take them; a template that does not know tools ignores them.
        add_generation_prompt: ready for the assistant's turn.

        Raises ParameterError("messages", ...) when the model has no chat template or the template
        refuses the conversation.
        """
        ...

    def token_id(self, token: str) -> int | None:
        """Id of a token by its exact string in the vocabulary; None where there is none."""
        ...

    def token(self, token_id: int) -> str:
        """The token as the vocabulary spells it; empty for an id that has none."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of text that the token stands for; alone they need not be valid UTF-8."""
        ...

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, special ones included."""
        ...

    def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        arrival_time: float | None = None,
        urgency: Urgency = NOT_URGENT,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Stream the deltas of all `params.n` choices (interleaved; `index` tells them apart).

        Ends after every choice sent its `finish_reason`. Closing the iterator (`aclose`, cancellation)
        aborts the request. `arrival_time` is time.monotonic() at the server's door. `urgency` decides who
        starts first and who gives way.

        Raises:
            PromptTooLongError, ParameterError: before the first output.
            EngineDeadError: when the core stopped.
        """
        ...

    def embed(
        self,
        prompt_token_ids: Sequence[int],
        params: PoolingParams,
        *,
        request_id: str,
        arrival_time: float | None = None,
        urgency: Urgency = NOT_URGENT,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Compute a prompt of up to `max_model_len` tokens: one output, with its `embedding`.

        Closing the iterator aborts the request. Arguments and errors as for `generate`.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """End a request in any state; unknown and finished ids are ignored (idempotent)."""
        ...

    def stats(self) -> EngineStats: ...

    def drain_timings(self) -> list[RequestTimings]:
        """Timings of the choices finished since the last call."""
        ...

    def drain_step_times(self) -> StepTimes:
        """What the steps since the last call took. Grows until it is called."""
        ...

    async def check_health(self) -> None:
        """Raises EngineDeadError when the core does not answer."""
        ...

    async def shutdown(self) -> None: ...
