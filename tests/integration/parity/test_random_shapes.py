"""A file of random weights, as `bench.peers --shape` makes it, is the same model to everybody who reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bench.peers.shapes import SHAPES, LlamaShape, write_random
from scalellm.services.executor.build import build_engine
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine.request import EngineRequest
from scalellm.services.executor.engine.sampling_params import SamplingParams
from scalellm.services.tokenizer.text.loading import load_model_tokenizer

SMALL = LlamaShape(2, 64, 128, 4, 2, 500_000.0, 512)
PROMPT = (100, 2000, 31_000, 7)
NUM_TOKENS = 12


def test_answers_are_those_of_transformers(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    source = model_dir("smollm2-135m-instruct") / "model.gguf"
    path = tmp_path / "model.gguf"
    write_random(path, SMALL, "small", source)
    vocabulary = load_model_tokenizer(path).tokenizer.get_vocab()
    assert vocabulary == load_model_tokenizer(source).tokenizer.get_vocab()

    settings = ExecutorSettings(
        model=str(path), device="cpu", num_threads=1, max_model_len=256, quantization="none", kv_cache_dtype="float32"
    )
    engine = build_engine(settings, lambda line: None).engine
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    engine.add(EngineRequest((0, 0), "", PROMPT, sampling))
    answer: list[int] = []
    while engine.has_unfinished():
        answer += [token_id for tokens in engine.step().tokens for token_id in tokens.token_ids]

    model = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=path.name, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert answer == ids[0, len(PROMPT) :].tolist()


def test_llama_3_2_1b_has_its_published_number_of_parameters() -> None:
    shape = SHAPES["llama-3.2-1b"]
    norms = (2 * shape.num_layers + 1) * shape.hidden_size
    assert sum(outputs * inputs for _, outputs, inputs in shape.matrices(128_256)) + norms == 1_235_814_400
