"""Detects regular expressions of a tokenizer.json that take far too long on some texts.

The library's engine backtracks. It abandons a match attempt after ten million steps (half a second), but begins a new
one at each character of the text, so a pattern such as `(a+)+b` can take an hour on a text that any client can send.
Therefore patterns are tested when the operator's file is loaded.
"""

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, product
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers

from scalellm.services.common.model_files import shown
from scalellm.services.tokenizer.text.model_tokenizer import UnsupportedTokenizerError, from_library
from scalellm.services.tokenizer.text.pre_tokenizers import KNOWN_PATTERNS

_LENGTH = 16_384
"""Characters of a probe. At this length the engine abandons an attempt with a quadratic number of steps; attempts with
a linear number of steps at each character are detected by the total time."""

_MOST_SECONDS = 0.1
"""Most CPU seconds of one probe. Linear time is some milliseconds, quadratic time half a second or more."""

_MOST_TRIES = 3
"""Measurements, all of which must be slow, because a single one may be slow for another reason, such as a busy
machine."""

_KINDS = ("a", "A", "1", " ", "\n", "_", ".", "'", "é", "中")
"""One character of each kind that patterns distinguish."""

_SYNTAX = frozenset("\\()[]{}|?*+^$-:,")
_MOST_LITERALS = 16


def check_patterns(tokenizer: Tokenizer, source: object) -> None:
    """Raise UnsupportedTokenizerError for a tokenizer, read from `source`, one of whose patterns takes too long."""
    found: set[str] = set()
    for component in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder):
        if component is not None:
            found.update(_patterns(json.loads(component.__getstate__())))
    for pattern in sorted(found - KNOWN_PATTERNS):
        # Removing the matches makes one text, while splitting at them would make an object for each.
        remove = normalizers.Replace(Regex(pattern), "").normalize_str
        refusal = f"{source}: the pattern {shown(pattern)} takes too long on repeated characters"
        for probe in _probes(pattern):
            match = partial(from_library, partial(remove, probe), refusal)
            # all() stops at the first quick measurement.
            if all((seconds := _cpu_seconds(match)) > _MOST_SECONDS for _ in range(_MOST_TRIES)):
                raise UnsupportedTokenizerError(f"{refusal}: {seconds:.1f} s for {len(probe)}")


def _cpu_seconds(call: Callable[[], object]) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started


def _patterns(spec: Any) -> Iterator[str]:
    """Yield the regular expressions in a component's description."""
    if isinstance(spec, dict):
        if isinstance(pattern := spec.get("Regex"), str):
            yield pattern
        for value in spec.values():
            yield from _patterns(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from _patterns(value)


def _probes(pattern: str) -> Iterator[str]:
    """Yield long texts of one repeated character, or of two, with an end on which the repetition fails."""
    literals = dict.fromkeys(character for character in pattern if character.isprintable() and character not in _SYNTAX)
    singles = [*dict.fromkeys((*_KINDS, *islice(literals, _MOST_LITERALS)))]
    pairs = [first + second for first, second in product(_KINDS[:4], repeat=2) if first != second]
    pairs += map("".join, zip(literals, islice(literals, 1, _MOST_LITERALS), strict=False))
    # The end contains all characters that a pattern may require, because the engine does not begin without them.
    end = "\0" + "".join(singles)
    for unit in (*singles, *pairs):
        yield unit * (_LENGTH // len(unit)) + end
