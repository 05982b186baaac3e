"""Frames with extreme values, at each end of both links: whatever they say, they cost no more than their own link."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from link_frames import client_frames, steps
from link_fuzz import make_tracer, play_to_engine, play_to_scheduler, play_to_worker
from scalellm.services.common.tracing.tracer import Tracer
from scalellm.services.tokenizer.text.detokenizer import TokenTexts

EXAMPLES = 150


@pytest.fixture(scope="module")
def tracer() -> Tracer:
    return make_tracer()


@pytest.fixture(scope="module")
def texts() -> TokenTexts:
    tokenizer = Tokenizer(models.BPE({chr(33 + token): token for token in range(90)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return TokenTexts(tokenizer)


@settings(max_examples=EXAMPLES)
@given(st.lists(client_frames, max_size=6))
def test_an_engine_takes_whatever_a_scheduler_sends(frames) -> None:
    play_to_engine(frames)


@settings(max_examples=EXAMPLES)
@given(st.lists(client_frames, max_size=6), st.lists(steps, max_size=6))
def test_a_scheduler_takes_whatever_workers_and_executors_send(tracer, frames, answers) -> None:
    play_to_scheduler(frames, answers, tracer)


@settings(max_examples=EXAMPLES)
@given(st.lists(steps, max_size=6))
def test_a_worker_takes_whatever_a_scheduler_sends(texts, answers) -> None:
    play_to_worker(answers, texts)
