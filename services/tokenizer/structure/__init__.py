"""Conversion of the shape that a client asks for to a grammar in llguidance's variant of Lark."""

from scalellm.services.tokenizer.structure.grammar import grammar_of

__all__ = ["grammar_of"]
