"""Grammars: compiled by llguidance beside the step path, and masks of what samples may go on with."""

from services.executor.grammar.compiler import LlGrammarCompiler
from services.executor.grammar.masks import Masks

__all__ = ["LlGrammarCompiler", "Masks"]
