"""Detection of stop strings in streamed text, also across the borders of chunks.

All stop strings are matched at once by an Aho-Corasick automaton (Aho and Corasick, 1975), in amortised constant time
per character. Its state is the longest end of the text that could still become a stop string, and exactly that text is
held back. The match that is complete first wins, and of several that end at the same character the longest, so the
result depends on the text alone, not on how it was cut.
"""

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


class StopStrings:
    """The automaton for a set of stop strings. Immutable: built once per request, shared by its samples.

    Args:
        stops: The stop strings; none may be empty. An empty collection matches nothing.

    Attributes:
        stops: The stop strings.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self.stops = tuple(stops)
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match = [""]
        firsts = set()
        for stop in self.stops:
            if not stop:
                raise ValueError("a stop string must not be empty")
            firsts.add(stop[0])
            self._insert(stop)
        self._fail = self._failure_links()
        self._first = re.compile("[" + re.escape("".join(sorted(firsts))) + "]") if firsts else None

    def scan(self, state: int, text: str, *, passes_matches: bool = False) -> tuple[int, int]:
        """Advance from `state` over `text` to the first completed match, or to the end: with `passes_matches` always.

        Returns the new state and how many characters were read; `match(state)` tells which of the two it was.
        """
        if self._first is None:
            return 0, len(text)
        position, length = 0, len(text)
        while position < length:
            if state == 0:  # the regex engine skips text that begins no stop string
                found = self._first.search(text, position)
                if found is None:
                    return 0, length
                position = found.start()
            state = self._step(state, text[position])
            position += 1
            if self._match[state] and not passes_matches:
                break
        return state, position

    def match(self, state: int) -> str:
        """Return the stop string that is complete in `state`, or an empty string."""
        return self._match[state]

    def depth(self, state: int) -> int:
        """Return how many characters at the end of the text read so far could begin a stop string."""
        return self._depth[state]

    def _step(self, state: int, char: str) -> int:
        while state and char not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(char, 0)

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._match.append("")
            state = self._next[state][char]
        self._match[state] = stop

    def _failure_links(self) -> list[int]:
        """Link each state to the longest proper suffix that is a state, breadth first."""
        fail = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            self._match[state] = self._match[state] or self._match[fail[state]]
            for char, child in self._next[state].items():
                link = fail[state]
                while link and char not in self._next[link]:
                    link = fail[link]
                fail[child] = self._next[link].get(char, 0)
                queue.append(child)
        return fail


@dataclass(frozen=True, slots=True)
class StopResult:
    """The result of matching a chunk of text.

    Attributes:
        text: Text that may be shown now.
        num_chars_read: Characters of the chunk up to the end of the stop string; all without one.
        stop: The stop string that ended the text, or None.
    """

    text: str
    num_chars_read: int
    stop: str | None = None


class StopMatcher:
    """Watches one sample's text for stop strings. Not safe for concurrent use.

    Args:
        stops: The automaton.
        include_stop: True if the stop string belongs to the text. Then nothing needs to be held back.
    """

    def __init__(self, stops: StopStrings, *, include_stop: bool = False) -> None:
        self._stops = stops
        self._include_stop = include_stop
        self._state = 0
        self._held = ""

    def push(self, text: str, *, passes_matches: bool = False) -> StopResult:
        """Return what may be shown now that `text` follows. After a match the matcher is used up.

        With `passes_matches` a stop string that ends in `text` is text like any other; one that only begins there will
        match.
        """
        self._state, read = self._stops.scan(self._state, text, passes_matches=passes_matches)
        # Without new text, a state that is a match is left from a match that was passed over.
        stop = self._stops.match(self._state) if read and not passes_matches else ""
        known = self._held + text[:read]
        if stop:
            self._held = ""
            if self._include_stop:
                return StopResult(text[:read], read, stop)
            return StopResult(known[: len(known) - len(stop)], read, stop)
        if self._include_stop:
            return StopResult(text, read)
        shown = len(known) - self._stops.depth(self._state)
        self._held = known[shown:]
        return StopResult(known[:shown], read)

    def flush(self) -> str:
        """Return the text that was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held
