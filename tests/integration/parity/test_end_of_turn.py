"""A GGUF file that calls `<|endoftext|>` its end: a chat ends with the model's turn, as the original's settings say."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from scalellm.services.common.gguf_metadata import GgufMetadata
from scalellm.services.executor.build import build_engine
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine.request import EngineRequest, FinishReason
from scalellm.services.executor.engine.sampling_params import SamplingParams
from scalellm.services.tokenizer.text.chat_template import ChatTemplate
from scalellm.services.tokenizer.text.loading import load_model_tokenizer

_EOS = "tokenizer.ggml.eos_token_id"
_END_OF_TEXT, _END_OF_TURN = 0, 2
"""The second is `eos_token_id` of generation_config.json and config.json of the original, SmolLM2-135M-Instruct."""


@pytest.fixture
def other_eos(model_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    """The real file with another end token."""
    source = model_dir("smollm2-135m-instruct") / "model.gguf"
    data = bytearray(source.read_bytes())
    place = data.index(_EOS.encode()) + len(_EOS)
    assert struct.unpack_from("<II", data, place) == (4, _END_OF_TURN)
    struct.pack_into("<II", data, place, 4, _END_OF_TEXT)
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    assert GgufMetadata(path)[_EOS] == _END_OF_TEXT
    return path


def test_a_chat_ends_at_the_end_of_the_turn(other_eos: Path) -> None:
    model = load_model_tokenizer(other_eos)
    assert model.eos_token_ids == (_END_OF_TEXT, _END_OF_TURN)  # which is what GetInfo says
    assert model.chat_template is not None
    template = ChatTemplate(model.chat_template, model.special_tokens, max_chars=10_000)
    chat = template.render([{"role": "user", "content": "What is 2 + 2?"}], add_generation_prompt=True)
    prompt = model.tokenizer.encode(chat, add_special_tokens=False).ids

    settings = ExecutorSettings(model=str(other_eos), device="cpu", num_threads=1, max_model_len=256)
    engine = build_engine(settings, lambda line: None).engine
    assert engine.config.eos_token_ids == frozenset(model.eos_token_ids)
    engine.add(EngineRequest((0, 0), "", tuple(prompt), SamplingParams(max_tokens=100, temperature=0.0)))
    answer: list[int] = []
    ends = []
    while engine.has_unfinished():
        result = engine.step()
        answer += [token_id for tokens in result.tokens for token_id in tokens.token_ids]
        ends += result.samples_finished
    (end,) = ends
    assert (end.reason, end.stop_token_id) == (FinishReason.STOP, _END_OF_TURN)
    assert answer.index(_END_OF_TURN) == len(answer) - 1
    assert model.tokenizer.decode(answer).strip()
