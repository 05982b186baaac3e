"""The requests that wait for the compilation of their grammars."""

import logging
from collections.abc import Iterator

from scalellm.services.executor.engine.grammar import GrammarCompiler, GrammarError
from scalellm.services.executor.engine.sampling_params import InvalidRequestError
from scalellm.services.executor.engine.sequence import SequenceGroup

_log = logging.getLogger(__name__)


class Compiling:
    """Requests whose grammars are being compiled. They are queued like all others, but may not run yet
    (`SequenceGroup.compilation`).

    Args:
        compiler: Makes matchers; None if requests may not have grammars.
    """

    def __init__(self, compiler: GrammarCompiler | None) -> None:
        self._compiler = compiler
        self._groups: dict[int, SequenceGroup] = {}

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def takes_grammars(self) -> bool:
        """True if requests may have a grammar."""
        return self._compiler is not None

    def check(self, grammar: str) -> None:
        """Raise InvalidRequestError for a grammar if this executor has no compiler."""
        if grammar and self._compiler is None:
            raise InvalidRequestError("structured_output", "must be absent: this executor has no tokenizer")

    def start(self, group: SequenceGroup) -> None:
        """Start to compile the grammar of a checked request, if it has one. Raises InvalidRequestError if that fails,
        because the engine must go on.
        """
        if self._compiler is not None and group.request.grammar:
            outputs = [seq.token_ids[group.num_prompt_tokens :] for seq in group.samples]
            try:
                group.compilation = self._compiler.start(group.request.grammar, outputs)
            except Exception as error:
                raise InvalidRequestError("structured_output", _unexpected(error, group)) from error
            self._groups[group.arrival] = group

    def take(self) -> Iterator[tuple[SequenceGroup, str]]:
        """Let requests run whose compilation is done. Yields those whose grammars are invalid, with the error
        messages.
        """
        for group in list(self._groups.values()):
            if group.compilation is None or not group.compilation.is_done:
                continue
            try:
                matchers = group.compilation.matchers()
            except GrammarError as error:
                yield group, str(error)
            except Exception as error:
                yield group, _unexpected(error, group)
            else:
                for seq, matcher in zip(group.samples, matchers, strict=True):
                    seq.matcher = matcher
            self.drop(group)

    def drop(self, group: SequenceGroup) -> None:
        """Forget a request, and cancel its compilation if it is not done."""
        if group.compilation is not None:
            group.compilation.cancel()
            group.compilation = None
            del self._groups[group.arrival]


def _unexpected(error: Exception, group: SequenceGroup) -> str:
    """Log an error of the compiler itself, which ends only the request, and return the message for the client."""
    _log.error("a grammar could not be compiled", exc_info=error, extra={"request_id": group.request.request_id})
    return f"the grammar could not be compiled ({type(error).__name__})"
