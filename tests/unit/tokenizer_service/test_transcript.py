"""Transcripts: through a journal in any pieces, and to readers from any place, each token comes exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm.services.tokenizer.generation.answer import Answer, make_samples
from scalellm.services.tokenizer.kept.journal_tail import whole_steps
from scalellm.services.tokenizer.kept.transcript import Transcript
from scalellm.services.tokenizer.latency import LatencyTrace
from scalellm.services.tokenizer.sample_stream import OutputOptions
from scalellm.services.tokenizer.token_receiver import TokenBatch
from scalellm.v1 import common_pb2, generation_pb2, link_pb2

PROMPT = [7, 8, 9]


class NoMetrics:
    """Counts nothing."""

    def __init__(self) -> None:
        self.ttft = self

    def observe(self, value: float) -> None:
        pass

    observe_gap = observe


def make_submit(num_samples: int, *, logprobs: bool) -> link_pb2.Submit:
    sampling = common_pb2.SamplingParams(n=num_samples, max_tokens=100, seed=1)
    if logprobs:
        sampling.logprobs = sampling.prompt_logprobs = 1
    return link_pb2.Submit(token_ids=PROMPT, sampling=sampling)


def values(start: int, stop: int) -> common_pb2.TokenLogprobs:
    logprobs = [-float(number) for number in range(start, stop)]
    return common_pb2.TokenLogprobs(
        logprobs=logprobs, num_top=1, top_token_ids=range(start, stop), top_logprobs=logprobs
    )


def seen(texts, transcript: Transcript, submit: link_pb2.Submit, offsets: list[int]):
    """Return the deltas per sample that a client sees which already has `offsets` tokens."""
    request = generation_pb2.GenerateRequest()
    options = OutputOptions(token_ids=True, logprobs=submit.sampling.HasField("logprobs"))
    samples = make_samples(request, options, submit, SimpleNamespace(texts=texts, can_count_reasoning=False))
    answer = Answer(PROMPT, samples, LatencyTrace(), NoMetrics(), lambda index: None, offsets)
    found = [[] for _ in samples]
    with transcript.reader(offsets, 1) as reader:
        while reader.changed.is_set():
            reader.changed.clear()
            for event in answer.take(reader):
                if not isinstance(event, generation_pb2.PromptLogprobs):
                    found[event.index].append(event)
    return found


def read_in_pieces(journal: bytes, most: int) -> Iterator[link_pb2.StepOutput]:
    """Yield the steps of a journal, `most` bytes at a time where these have a whole one."""
    while journal:
        num_read = most
        while not (num_whole := whole_steps(journal[:num_read]) if num_read < len(journal) else len(journal)):
            num_read += 1
        yield link_pb2.StepOutput.FromString(journal[:num_whole])
        journal = journal[num_whole:]


@settings(max_examples=100)
@given(
    data=st.data(),
    samples=st.lists(st.lists(st.integers(0, 40_000), min_size=1, max_size=20), min_size=1, max_size=3),
    logprobs=st.booleans(),
)
def test_a_journal_in_any_pieces_read_from_any_place(texts, smollm, data, samples, logprobs):
    submit = make_submit(len(samples), logprobs=logprobs)
    mine, journal = Transcript(submit), b""
    mark = mine.begin()
    if logprobs:
        mine.add_prompt_logprobs(0, values(0, 2))
        mine.add_prompt_logprobs(1, values(1, 3))  # a replay
    done = [0] * len(samples)
    while any(done[index] < len(tokens) for index, tokens in enumerate(samples)):
        index = data.draw(st.sampled_from([i for i, tokens in enumerate(samples) if done[i] < len(tokens)]))
        start, stop = done[index], min(len(samples[index]), done[index] + data.draw(st.integers(1, 8)))
        finish = None
        if stop == len(samples[index]):
            finish = link_pb2.LinkSampleFinish(index=index, reason=common_pb2.FINISH_REASON_LENGTH)
        mine.add(TokenBatch(index, samples[index][start:stop], values(start, stop) if logprobs else None, finish))
        done[index] = stop
        if data.draw(st.booleans()):
            step, mark = mine.since(mark, data.draw(st.integers(1, 8)))
            journal += step.SerializeToString()
    while mark != mine.mark:
        most = data.draw(st.integers(1, 8))
        step, mark = mine.since(mark, most)
        assert max(len(step.token_ids), *(len(part.values.logprobs) for part in step.prompt_logprobs), 0) <= most
        journal += step.SerializeToString()
    assert mine.since(mark)[0] == link_pb2.StepOutput()

    other = Transcript(submit)
    for step in read_in_pieces(journal, data.draw(st.integers(1, 100))):
        other.apply(step)
        assert not (other.num_tokens and logprobs) or len(other.prompt_logprobs.logprobs) == len(PROMPT)
    other.apply(link_pb2.StepOutput.FromString(journal))  # what is known is skipped
    assert other.since(other.begin()) == mine.since(mine.begin())
    resumed = link_pb2.Submit()
    resumed.CopyFrom(submit)
    other.resume(resumed)
    assert [list(sample.token_ids) for sample in resumed.resumed] == samples
    assert not resumed.sampling.HasField("prompt_logprobs")

    offsets = [data.draw(st.integers(0, len(tokens))) for tokens in samples]
    first = Transcript(submit)  # as a client saw it that left in between
    for index, offset in enumerate(offsets):
        finish = mine.samples[index].finish if offset == len(samples[index]) else None
        if offset:
            first.add(TokenBatch(index, samples[index][:offset], values(0, offset) if logprobs else None, finish))
    before, after = seen(texts, first, submit, [0] * len(samples)), seen(texts, other, submit, offsets)
    for index, tokens in enumerate(samples):
        deltas = before[index] + after[index]
        assert [token for delta in deltas for token in delta.token_ids] == tokens
        assert "".join(delta.text for delta in deltas) == smollm.tokenizer.decode(tokens)
        place = 0
        for delta in deltas:
            assert delta.offset == place
            place += delta.num_tokens
            if logprobs:
                assert list(delta.logprobs.logprobs) == [-float(n) for n in range(delta.offset, place)]
        length = generation_pb2.SampleFinished(index=index, reason=common_pb2.FINISH_REASON_LENGTH)
        assert [delta.finished for delta in deltas] == [None] * (len(deltas) - 1) + [length], "its end is told once"


def test_steps_are_not_cut_whatever_they_tell():
    end = link_pb2.LinkSampleFinish(index=0, reason=common_pb2.FINISH_REASON_STOP, stop_token_id=300)
    tokens = {"handles": [0], "indices": [0], "offsets": [300], "counts": [200], "token_ids": [70_000] * 200}
    prompt = link_pb2.LinkLogprobs(values=values(0, 100))
    steps = [
        link_pb2.StepOutput(prompt_logprobs=[prompt]),
        link_pb2.StepOutput(prompt_logprobs=[prompt]),
        link_pb2.StepOutput(**tokens, logprobs=[prompt, prompt], prompt_logprobs=[prompt], finished_samples=[end]),
        link_pb2.StepOutput(**tokens, finished_samples=[end, end]),
        link_pb2.StepOutput(**tokens),
    ]
    parts = [step.SerializeToString() for step in steps]
    data, borders = b"".join(parts), {sum(map(len, parts[:count])) for count in range(len(parts))}
    for length in range(len(data) + 1):
        known = [border for border in borders if border < length]  # the next step's first byte tells
        assert whole_steps(data[:length]) == max(known, default=0)
    assert whole_steps(b"\xff" * 100) == 0, "it is no step"


def test_a_gap_is_not_taken():
    transcript = Transcript(make_submit(1, logprobs=False))
    step = link_pb2.StepOutput(handles=[0], indices=[0], offsets=[1], counts=[1], token_ids=[5])
    with pytest.raises(ValueError, match="tokens 0 to 0 of sample 0 are missing"):
        transcript.apply(step)


def test_an_end_behind_the_tokens_is_read():
    transcript = Transcript(make_submit(1, logprobs=False))
    finish = link_pb2.LinkSampleFinish(index=0, reason=common_pb2.FINISH_REASON_LENGTH)
    with transcript.reader([0], 1) as reader:
        transcript.add(TokenBatch(0, [5, 6]))
        assert reader.take() == [TokenBatch(0, [5, 6])]
        transcript.add(TokenBatch(0, [], None, finish))
        assert reader.take() == [TokenBatch(0, [], None, finish)]
        assert reader.take() == []


def test_parts_of_a_batch():
    finish = link_pb2.LinkSampleFinish(index=0, reason=common_pb2.FINISH_REASON_LENGTH)
    batch = TokenBatch(0, [5, 6, 7], values(0, 3), finish)
    assert batch.parts(2) == [TokenBatch(0, [5, 6], values(0, 2)), TokenBatch(0, [7], values(2, 3), finish)]
    assert TokenBatch(0, [], None, finish).parts(2) == [TokenBatch(0, [], None, finish)]
