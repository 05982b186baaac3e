"""Grammars: their compilation by llguidance outside the step loop, and the masks of the tokens that samples may
draw."""

from scalellm.services.executor.grammar.compiler import LlGrammarCompiler
from scalellm.services.executor.grammar.masks import Masks

__all__ = ["LlGrammarCompiler", "Masks"]
