"""The edge's work for a request grows with the request and no faster: counted, as a clock would mislead."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer

from scalellm.services.tokenizer.limits import RequestLimits
from scalellm.services.tokenizer.sample_stream import OutputOptions, SampleStream
from scalellm.services.tokenizer.text.conversation import Segment, answer_segment
from scalellm.services.tokenizer.text.detokenizer import TokenTexts
from scalellm.services.tokenizer.text.stop_strings import StopStrings
from scalellm.services.tokenizer.token_receiver import TokenBatch, TokenReceiver
from scalellm.services.tokenizer.validation import validate_chat
from scalellm.v1 import generation_pb2

SIZE = 1000
ANSWER = "The committee met on Tuesday, 14 March 2023. "


class CountedText(str):
    """Adds up how many characters it is compared with."""

    compared: list[int]

    @classmethod
    def of(cls, text: str, compared: list[int]) -> CountedText:
        counted = cls(text)
        counted.compared = compared
        return counted

    def startswith(self, prefix: Any, *where: Any) -> bool:
        self.compared[0] += len(prefix)
        return super().startswith(prefix, *where)

    def __eq__(self, other: object) -> bool:
        self.compared[0] += len(self)
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def count_steps(work: Callable[[], object]) -> int:
    """Instructions of the interpreter that `work` takes."""
    steps = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal steps
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        steps += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return steps


def check_growth(cost: Callable[[int], int]) -> None:
    small, large = cost(SIZE), cost(2 * SIZE)
    assert small >= SIZE  # the work was seen
    assert large <= 2.2 * small


def ids_of(tokenizer: Tokenizer, text: str, count: int) -> list[int]:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return (ids * (count // len(ids) + 1))[:count]


def byte_run(count: int, tokenizer: Tokenizer) -> list[int]:
    """Bytes of characters of which none is certain before the run ends."""
    return [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "数".encode()] * (count // 3)


@pytest.mark.parametrize("name", ["smollm2", "byte_fallback"])
@pytest.mark.parametrize("is_cut", [False, True])
def test_the_segment_of_an_answer(name: str, is_cut: bool, tokenizers, token_texts) -> None:
    def cost(size: int) -> int:
        compared = [0]
        ids = ids_of(tokenizers[name], ANSWER, size)
        detokenizer = token_texts[name].detokenizer()
        content = detokenizer.push(ids) + detokenizer.flush()
        content = CountedText.of(content[:-3] if is_cut else content, compared)
        segments: list[Segment] = []
        steps = count_steps(lambda: segments.append(answer_segment(token_texts[name], ids, content)))
        assert 0 < len(segments[0].token_ids) <= size - is_cut
        return steps + compared[0]

    check_growth(cost)


def test_the_segment_of_an_answer_in_bytes(tokenizers, token_texts) -> None:
    def cost(size: int) -> int:
        ids = byte_run(size, tokenizers["byte_fallback"])
        compared = [0]
        content = CountedText.of("数" * (len(ids) // 3 - 1), compared)
        return compared[0] + count_steps(lambda: answer_segment(token_texts["byte_fallback"], ids, content))

    check_growth(cost)


@pytest.mark.parametrize("stops", [None, ["Tuesday, 15", "met in", "a" * 256]])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_sample(stops: list[str] | None, batch: int, tokenizers, token_texts: dict[str, TokenTexts]) -> None:
    automaton = None if stops is None else StopStrings(stops)

    def cost(size: int) -> int:
        ids = ids_of(tokenizers["smollm2"], ANSWER, size)
        stream = SampleStream(0, OutputOptions(keep_answer=True), token_texts["smollm2"], automaton)

        def run() -> None:
            for start in range(0, size, batch):
                stream.push(TokenBatch(0, ids[start : start + batch]))

        return count_steps(run)

    check_growth(cost)


def test_what_waits_for_a_slow_reader() -> None:
    def cost(size: int) -> int:
        receiver = TokenReceiver(1, min_tokens=10**6)

        def run() -> None:
            for offset in range(size):
                receiver.on_tokens(0, offset, [5], now=1)

        return count_steps(run)

    check_growth(cost)


def test_checks_of_requests() -> None:
    limits = RequestLimits(max_messages=10**6)

    def cost(size: int) -> int:
        chat = generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content="Hi")] * size)
        return count_steps(lambda: validate_chat(chat, limits))

    check_growth(cost)
