"""From tokens to what a client sees: the same, however the tokens were batched on their way."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm.services.tokenizer.sample_stream import OutputOptions, SampleStream
from scalellm.services.tokenizer.text.stop_strings import StopStrings
from scalellm.services.tokenizer.token_receiver import TokenReceiver
from scalellm.v1 import common_pb2, link_pb2

EVERYTHING = OutputOptions(token_ids=True, keep_answer=True, logprobs=True)
VOCAB = 49152
EOS = 2


def play(texts, samples, data, *, options=EVERYTHING, stops=(), reason=common_pb2.FINISH_REASON_LENGTH, end=None):
    """Send samples through receiver and streams in arbitrary pieces, taken at arbitrary moments."""
    receiver = TokenReceiver(len(samples), logprobs=options.logprobs, min_tokens=data.draw(st.integers(1, 4)))
    automaton = StopStrings(stops) if stops else None
    streams = [SampleStream(index, options, texts, automaton) for index in range(len(samples))]
    deltas = []

    def take():
        for batch in receiver.take():
            delta = streams[batch.index].push(batch)
            deltas.extend([delta] if delta is not None else [])

    done = [0] * len(samples)
    open_samples = set(range(len(samples)))
    while open_samples:
        index = data.draw(st.sampled_from(sorted(open_samples)))
        tokens = samples[index]
        count = data.draw(st.integers(1, max(1, len(tokens))))
        # A replay may repeat what is known.
        start, stop = max(0, done[index] - data.draw(st.integers(0, 2))), min(len(tokens), done[index] + count)
        if options.logprobs:
            values = common_pb2.TokenLogprobs(logprobs=[-float(place) for place in range(start, stop)])
            receiver.on_logprobs(link_pb2.LinkLogprobs(handle=1, index=index, offset=start, values=values))
        receiver.on_tokens(index, start, tokens[start:stop], now=1)
        done[index] = stop
        if stop == len(tokens):
            receiver.on_sample_finish(
                link_pb2.LinkSampleFinish(handle=1, index=index, reason=reason, stop_token_id=end)
            )
            open_samples.remove(index)
        if data.draw(st.booleans()):
            take()
    receiver.on_finish(link_pb2.Finish(handle=1), now=0)
    take()
    assert not receiver.has_more
    for index, stream in enumerate(streams):
        ends = [delta.finished for delta in deltas if delta.index == index]
        assert ends == [None] * (len(ends) - 1) + [stream.ended], "the last delta of a sample tells its end"
    return streams, deltas


@settings(max_examples=150)
@given(
    data=st.data(),
    samples=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30), min_size=1, max_size=3),
)
def test_any_batching_gives_what_decoding_at_once_gives(texts, smollm, data, samples):
    streams, deltas = play(texts, samples, data)
    for index, tokens in enumerate(samples):
        mine = [delta for delta in deltas if delta.index == index]
        assert "".join(delta.text for delta in mine) == smollm.tokenizer.decode(tokens)
        assert [token for delta in mine for token in delta.token_ids] == tokens
        assert [value for delta in mine for value in delta.logprobs.logprobs] == [-float(i) for i in range(len(tokens))]
        offset = 0
        for delta in mine:
            assert delta.offset == offset
            assert len(delta.logprobs.logprobs) == delta.num_tokens
            offset += delta.num_tokens
        assert streams[index].answer_ids == tokens
        assert "".join(streams[index].answer_text) == smollm.tokenizer.decode(tokens)
    assert {stream.ended.reason for stream in streams} == {common_pb2.FINISH_REASON_LENGTH}


@settings(max_examples=150)
@given(
    data=st.data(),
    text=st.text(alphabet="ab é🦊\n", min_size=1, max_size=40),
    stops=st.lists(st.text(alphabet="ab é🦊", min_size=1, max_size=4), min_size=1, max_size=3),
    include_stop=st.booleans(),
)
def test_stop_strings_do_not_depend_on_batching(texts, smollm, data, text, stops, include_stop):
    tokens = smollm.tokenizer.encode(text).ids
    whole = smollm.tokenizer.decode(tokens)
    options = OutputOptions(token_ids=True, keep_answer=True, include_stop=include_stop)
    (stream,), deltas = play(texts, [tokens], data, options=options, stops=stops)
    shown = "".join(delta.text for delta in deltas)
    sample = stream.ended
    ends = [(whole.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in whole]
    if not ends:
        assert shown == whole
        assert sample.reason == common_pb2.FINISH_REASON_LENGTH
        return
    end, _, stop = min(ends)  # the first to be complete; of several that end together the longest
    assert (sample.reason, sample.stop) == (common_pb2.FINISH_REASON_STOP, stop)
    assert shown == (whole[:end] if include_stop else whole[: end - len(stop)])
    ids = [token for delta in deltas for token in delta.token_ids]
    assert tokens[: len(ids)] == ids
    assert stop in smollm.tokenizer.decode(ids)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@given(data=st.data())
@settings(max_examples=25)
def test_the_final_stop_token_is_not_text(texts, smollm, data, skip_special_tokens):
    tokens = [*smollm.tokenizer.encode("Fine <|im_start|> then.").ids, EOS]
    options = OutputOptions(token_ids=True, skip_special_tokens=skip_special_tokens)
    (stream,), deltas = play(texts, [tokens], data, options=options, reason=common_pb2.FINISH_REASON_STOP, end=EOS)
    shown = "".join(delta.text for delta in deltas)
    # A final token can be told only with the sample's end, and comes with it; see StepOutput.
    assert shown == smollm.tokenizer.decode(tokens[:-1], skip_special_tokens=skip_special_tokens)
    assert sum(delta.num_tokens for delta in deltas) == len(tokens)
    assert stream.ended.stop_token_id == EOS


def test_ids_alone_are_not_detokenised(texts):
    receiver = TokenReceiver(1)
    stream = SampleStream(0, OutputOptions(text=False, token_ids=True), texts)
    receiver.on_tokens(0, 0, [5, 6], now=1)
    delta = stream.push(receiver.take()[0])
    assert (delta.text, list(delta.token_ids), delta.num_tokens) == ("", [5, 6], 2)
