"""The model's tokens as the grammar library sees them."""

import copy
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError

if TYPE_CHECKING:
    from llguidance import LLTokenizer


class GrammarsUnavailableError(EngineError):
    """Structured output is not to be had with this model or installation."""


def build_vocabulary(backend_tokenizer: Any, vocab_size: int, eos_token_ids: Iterable[int]) -> "LLTokenizer":
    """The tokens of a `tokenizers.Tokenizer`; ids up to `vocab_size` beyond them are never allowed.

    Takes 0.2 s for 49 k tokens, a second for 256 k; engines of one process share the result.

    Raises:
        GrammarsUnavailableError: llguidance is missing, or nothing could end an output.
    """
    eos = tuple(sorted(eos_token_ids))
    if not eos:
        raise GrammarsUnavailableError("the model has no end-of-sequence token, which would end the output")
    backend = copy.copy(backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    return _build(backend.to_str(), max(vocab_size, backend.get_vocab_size(with_added_tokens=True)), eos)


@lru_cache(maxsize=2)
def _build(tokenizer_json: str, vocab_size: int, eos: tuple[int, ...]) -> "LLTokenizer":
    try:
        from llguidance import LLTokenizer
    except ImportError as error:
        message = "structured output needs the package llguidance, which is not installed"
        raise GrammarsUnavailableError(message) from error
    try:
        return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos))
    except ValueError as error:
        raise GrammarsUnavailableError(f"the tokenizer cannot be used for grammars: {error}") from error
