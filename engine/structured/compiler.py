"""Compiles constraints off the loops that serve, and keeps what it has compiled."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from engine.constraint import Constraint
from engine.errors import ParameterError
from engine.structured.grammar import grammar_of
from engine.structured.state import GrammarState
from engine.structured.vocabulary import build_vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MAX_KEPT = 256
_MAX_REASON = 600  # characters; errors in grammars quote their lines


class GrammarCompiler:
    """One model's grammars, the latest 256 constraints of which are kept. Thread-safe.

    Compiling takes a millisecond for most schemas and up to a second for the largest, in a thread.
    """

    def __init__(
        self, load_tokenizer: Callable[[], Any], vocab_size: int, eos_token_ids: frozenset[int]
    ) -> None:
        """load_tokenizer: gives the model's `tokenizers.Tokenizer`; called once, in a thread."""
        self._load_tokenizer = load_tokenizer
        self._vocab_size, self._eos_token_ids = vocab_size, eos_token_ids
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammars")
        self._lock = threading.Lock()
        self._vocabulary: Future[LLTokenizer] | None = None
        self._compiled: OrderedDict[Constraint, Future[LLMatcher]] = OrderedDict()

    def prepare(self) -> "Future[LLTokenizer]":
        """Begin to load the vocabulary, so that the first request with a constraint need not wait for it."""
        with self._lock:
            return self._begin()

    def compile(self, constraint: Constraint) -> "Future[LLMatcher]":
        """The compiled grammar, from which `start` makes states.

        The future raises ParameterError where the grammar is none or asks for what cannot be held, and
        GrammarsUnavailableError where the model can have no grammars.
        """
        with self._lock:
            known = self._compiled.get(constraint)
            if known is not None and not (known.done() and known.exception()):
                self._compiled.move_to_end(constraint)
                return known
            vocabulary = self._begin()
            future = self._threads.submit(_compile, constraint, vocabulary)
            self._compiled[constraint] = future
            if len(self._compiled) > _MAX_KEPT:
                self._compiled.popitem(last=False)
            return future

    def start(self, compiled: "LLMatcher") -> GrammarState:
        """A sequence's state at the grammar's beginning."""
        return GrammarState(compiled.deep_copy(), self._eos_token_ids)

    def _begin(self) -> "Future[LLTokenizer]":
        if self._vocabulary is None:
            self._vocabulary = self._threads.submit(self._load)
        return self._vocabulary

    def _load(self) -> "LLTokenizer":
        return build_vocabulary(self._load_tokenizer(), self._vocab_size, self._eos_token_ids)


def _compile(constraint: Constraint, vocabulary: "Future[LLTokenizer]") -> "LLMatcher":
    tokens = vocabulary.result()
    from llguidance import LLMatcher, LLParserLimits

    grammar = grammar_of(constraint)
    # Without the verbose errors, which would put the grammar, that is the request, into the log.
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
    if not matcher.is_error():
        matcher.compute_bitmask()  # the first mask builds what the others use, and finds an empty language
    if matcher.is_error():
        reason = matcher.get_error().strip()
        # Of a schema inside a grammar the library shows the grammar's line, which the client may not know.
        _, _, of_schema = reason.partition("failed to compile JSON schema: ")
        reason = (of_schema.partition("\n")[0] or reason)[:_MAX_REASON]
        raise ParameterError(constraint.name, f"is not supported: {reason}")
    return matcher
