"""Structured output: constraints as grammars, and the masks of the tokens that they allow."""

from engine.structured.arrivals import ConstrainedArrivals
from engine.structured.compiler import GrammarCompiler
from engine.structured.state import GrammarState, fill_masks
from engine.structured.vocabulary import GrammarsUnavailableError

__all__ = ["ConstrainedArrivals", "GrammarCompiler", "GrammarState", "GrammarsUnavailableError", "fill_masks"]
