"""Errors that cross the engine's boundary. Each names what the caller can change."""


class EngineError(Exception):
    """Base of every error that the engine raises on purpose."""


class ParameterError(EngineError, ValueError):
    """A request parameter is out of range or of the wrong kind.

    Attributes:
        field: name of the offending parameter, as the API spells it.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message

    def __reduce__(self) -> tuple[type["ParameterError"], tuple[str, str]]:
        return type(self), (self.field, self.message)


class PromptTooLongError(ParameterError):
    """The prompt leaves no room for a single output token in the model's context (or in the KV cache)."""

    def __init__(self, num_prompt_tokens: int, max_model_len: int) -> None:
        super().__init__(
            "prompt",
            f"the prompt has {num_prompt_tokens} tokens; prompt and output together may have at most "
            f"{max_model_len}",
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.max_model_len = max_model_len

    def __reduce__(self) -> tuple[type["PromptTooLongError"], tuple[int, int]]:  # type: ignore[override]
        return type(self), (self.num_prompt_tokens, self.max_model_len)


class ModelLoadError(EngineError):
    """A checkpoint is missing, damaged or of an architecture that is not supported."""


class OutOfMemoryError(EngineError):
    """The model, or a KV cache of the smallest useful size, does not fit into memory."""


class EngineDeadError(EngineError):
    """The engine core stopped; every request in flight failed and no new one is taken."""


class QualityError(EngineError):
    """A quality measurement cannot be made: its text, its data or its models do not allow it."""
