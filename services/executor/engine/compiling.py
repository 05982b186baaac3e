"""The requests that wait until their grammars are compiled."""

from collections.abc import Iterator

from scalellm.services.executor.engine.grammar import GrammarCompiler, GrammarError
from scalellm.services.executor.engine.sampling_params import InvalidRequestError
from scalellm.services.executor.engine.sequence import SequenceGroup


class Compiling:
    """Requests that are queued as all others are, but may not run yet (`SequenceGroup.compilation`).

    Args:
        compiler: makes matchers; None where no request may have a grammar.
    """

    def __init__(self, compiler: GrammarCompiler | None) -> None:
        self._compiler = compiler
        self._groups: dict[int, SequenceGroup] = {}

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def takes_grammars(self) -> bool:
        """True if requests may have one."""
        return self._compiler is not None

    def check(self, grammar: str) -> None:
        """Raise InvalidRequestError for a request that cannot be run here."""
        if grammar and self._compiler is None:
            raise InvalidRequestError("structured_output", "must be absent: this executor has no tokenizer")

    def start(self, group: SequenceGroup) -> None:
        """Begin with the grammar of a request that was checked, if it has one."""
        if self._compiler is not None and group.request.grammar:
            outputs = [seq.token_ids[group.num_prompt_tokens :] for seq in group.samples]
            group.compilation = self._compiler.start(group.request.grammar, outputs)
            self._groups[group.arrival] = group

    def take(self) -> Iterator[tuple[SequenceGroup, str]]:
        """Let requests run whose grammars are compiled. Yields those whose grammars are none, and what is wrong."""
        for group in list(self._groups.values()):
            if group.compilation is None or not group.compilation.is_done:
                continue
            try:
                matchers = group.compilation.matchers()
            except GrammarError as error:
                yield group, str(error)
            else:
                for seq, matcher in zip(group.samples, matchers, strict=True):
                    seq.matcher = matcher
            self.drop(group)

    def drop(self, group: SequenceGroup) -> None:
        """A request waits no more."""
        if group.compilation is not None:
            group.compilation.cancel()
            group.compilation = None
            del self._groups[group.arrival]
