"""Grammars: compiled by llguidance beside the step path, and masks of what samples may go on with."""

from scalellm.services.executor.grammar.compiler import LlGrammarCompiler
from scalellm.services.executor.grammar.masks import Masks

__all__ = ["LlGrammarCompiler", "Masks"]
