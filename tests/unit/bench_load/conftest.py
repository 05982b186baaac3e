from pathlib import Path

import pytest

from scripted_generation import ScriptedGeneration
from scripted_openai import ScriptedOpenAi
from word_tokenizer import write_word_tokenizer


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
    return write_word_tokenizer(tmp_path)
