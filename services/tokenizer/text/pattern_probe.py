"""Finds regular expressions of a tokenizer.json that take far too long on some texts.

The library's engine backtracks. It gives an attempt to match up after ten million steps, half a second, but makes a new
one at each character of the text: a pattern such as `(a+)+b` costs an hour on a text that anybody can send. The file is
the operator's and the text a stranger's, so patterns are tried when the file is loaded.
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
"""Characters of a probe. One attempt whose steps grow with the square of the text is given up by the engine at this
length; where each attempt takes as many steps as the text has characters, the time tells."""

_MOST_SECONDS = 0.1
"""Most CPU time of one probe: it takes some milliseconds if it grows with the length, half a second and more if it
grows with the length squared."""

_MOST_TRIES = 3
"""Measurements before a probe counts as slow: a single one may be long for another reason, such as a busy machine."""

_KINDS = ("a", "A", "1", " ", "\n", "_", ".", "'", "é", "中")
"""A character of each kind that patterns tell apart."""

_SYNTAX = frozenset("\\()[]{}|?*+^$-:,")
_MOST_LITERALS = 16


def check_patterns(tokenizer: Tokenizer, source: object) -> None:
    """Raise UnsupportedTokenizerError for a tokenizer, read from `source`, one of whose patterns takes too long."""
    found: set[str] = set()
    for component in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder):
        if component is not None:
            found.update(_patterns(json.loads(component.__getstate__())))
    for pattern in sorted(found - KNOWN_PATTERNS):
        # Removing the matches makes one text; splitting at them would make an object, and collect garbage, for each.
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
    # The end has all characters that a pattern may need somewhere: without them the engine does not even begin.
    end = "\0" + "".join(singles)
    for unit in (*singles, *pairs):
        yield unit * (_LENGTH // len(unit)) + end
