from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from scripted_generation import ScriptedGeneration
from scripted_openai import ScriptedOpenAi

LETTERS = "abcdefghij"


@pytest.fixture
async def grpc_server():
    server = ScriptedGeneration()
    server.address = await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def openai_server():
    server = ScriptedOpenAi()
    server.base_url = await server.start()
    yield server
    await server.stop()


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """A hundred words of letters, and some tokens that are none."""
    words = [a + b for a in LETTERS for b in LETTERS]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate([*words, "1", "ü", "a-b"])}, "1")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path
