"""The shape of an answer: what a client asks for in, a grammar in llguidance's variant of Lark out."""

from scalellm.services.tokenizer.structure.grammar import grammar_of

__all__ = ["grammar_of"]
