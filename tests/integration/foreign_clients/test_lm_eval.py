"""lm-eval's log-likelihoods by way of /v1/completions are those of transformers on the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from foreign_clients import LM_EVAL, environment, run
from gguf_oracle import load_gguf_oracle
from line import Line
from scalellm.services.tokenizer.text.loading import load_model_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

MODEL = "smollm2-135m-instruct"
TOLERANCE = 5e-4
"""Sums of float32 in another order; 1.1e-4 at most was seen."""
QUESTIONS = [
    {"question": "The capital of France is", "choices": [" Paris", " London", " a large potato"], "answer": 0},
    {"question": "Two plus two is", "choices": [" four", " seven", " the colour of the sky"], "answer": 0},
    {"question": "Water freezes at zero degrees", "choices": [" Celsius", " per second", " naïve café"], "answer": 0},
]
CHOICE = {
    "task": "local_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": "",  # choices begin with their own space
    "metric_list": [{"metric": "acc"}],
}
TEXT = {
    "task": "local_text",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "word_perplexity"}],
}


def samples(folder: Path, task: str) -> list[dict]:
    (found,) = folder.rglob(f"samples_{task}_*.jsonl")
    return sorted(map(json.loads, found.read_text().splitlines()), key=lambda sample: sample["doc_id"])


class Oracle:
    """transformers on the same weights: log-probabilities of what follows a beginning."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_model_tokenizer(folder).tokenizer
        self.model = load_gguf_oracle(folder, 49152)

    @torch.inference_mode()
    def after(self, beginning: list[int], text: list[int]) -> tuple[float, bool]:
        """Log-probability of a text, and whether each of its tokens is the likeliest."""
        logits = self.model(input_ids=torch.tensor([[*beginning, *text]])).logits[0].float()
        scores = torch.log_softmax(logits[len(beginning) - 1 : -1], dim=-1)
        chosen = scores.gather(1, torch.tensor(text)[:, None])
        return chosen.sum().item(), bool((scores.argmax(-1) == torch.tensor(text)).all())


def test_log_likelihoods(real_line: Line, model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}}}
    for task in (CHOICE, TEXT):
        # JSON is YAML.
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps({**task, **source, "test_split": "test"}))
    address = real_line.tokenizer.http_address
    run(
        [
            *(environment(LM_EVAL).program("lm_eval"), "run", "--model", "local-completions"),
            *("--model_args", f"model={MODEL},base_url=http://{address}/v1/completions,num_concurrent=2"),
            *("--include_path", str(tmp_path), "--tasks", "local_choice,local_text"),
            *("--output_path", str(tmp_path / "out"), "--log_samples"),
        ],
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "hf"),
        OPENAI_API_KEY="none",
    )
    oracle = Oracle(model_dir(MODEL))
    encode = oracle.tokenizer.encode
    for question, sample in zip(QUESTIONS, samples(tmp_path / "out", "local_choice"), strict=True):
        beginning = encode(question["question"], add_special_tokens=False).ids
        for choice, (told,) in zip(question["choices"], sample["resps"], strict=True):
            value, is_greedy = oracle.after(beginning, encode(choice, add_special_tokens=False).ids)
            assert float(told[0]) == pytest.approx(value, abs=TOLERANCE), (question, choice)
            assert str(told[1]) == str(is_greedy)
    first = oracle.tokenizer.token_to_id("<|im_start|>")  # the model's first token, which a whole text comes after
    for question, sample in zip(QUESTIONS, samples(tmp_path / "out", "local_text"), strict=True):
        value, _ = oracle.after([first], encode(question["question"], add_special_tokens=False).ids)
        assert float(sample["resps"][0][0]) == pytest.approx(value, abs=TOLERANCE), question
