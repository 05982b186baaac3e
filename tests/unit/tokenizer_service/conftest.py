"""Fixtures of the text edge's unit tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from scalellm.services.tokenizer.text.detokenizer import TokenTexts
from scalellm.services.tokenizer.text.loading import load_model_tokenizer
from scalellm.services.tokenizer.text.model_tokenizer import ModelTokenizer
from service_processes import RedisProcess, start_redis


@pytest.fixture(scope="session")
def smollm(model_dir: Callable[[str], Path]) -> ModelTokenizer:
    return load_model_tokenizer(model_dir("smollm2-135m-instruct"))


@pytest.fixture(scope="session")
def smollm_oracle(smollm: ModelTokenizer) -> PreTrainedTokenizerFast:
    """transformers' tokenizer of the same vocabulary. Made once: it copies all of it."""
    return PreTrainedTokenizerFast(tokenizer_object=smollm.tokenizer, **smollm.special_tokens)


@pytest.fixture(scope="session")
def texts(smollm: ModelTokenizer) -> TokenTexts:
    return TokenTexts(smollm.tokenizer)


@pytest.fixture
def redis_process(tmp_path: Path) -> Iterator[RedisProcess]:
    redis = start_redis(tmp_path)
    yield redis
    redis.stop()
    Path(redis.url.removeprefix("unix://")).unlink(missing_ok=True)
