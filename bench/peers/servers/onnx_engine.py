"""ONNX Runtime GenAI's batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a model.

    Attributes:
        model: A folder of `onnx_export`.
        threads: Threads of its inference.
        filler: A token id that ends no prompt. The library needs one that ends answers, and fills rows up with it.
    """

    model: Path
    threads: int
    filler: int


class OnnxModel:
    """A model that makes batches."""

    def __init__(self, options: Options) -> None:
        config = genai.Config(str(options.model))
        session = {"intra_op_num_threads": options.threads}
        tokens = {"eos_token_id": options.filler, "pad_token_id": options.filler}
        config.overlay(json.dumps({"model": {**tokens, "decoder": {"session_options": session}}}))
        self._model = genai.Model(config)
        self._filler = options.filler

    def begin(self, prompts: Sequence[Sequence[int]], num_steps: int) -> OnnxBatch:
        """A batch of these prompts."""
        input_ids = np.full((len(prompts), max(map(len, prompts))), self._filler, dtype=np.int32)
        for row, prompt in zip(input_ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        parameters = genai.GeneratorParams(self._model)
        length = input_ids.shape[1] + num_steps
        # As many at least as at most: the token that would end a row is barred.
        parameters.set_search_options(do_sample=False, batch_size=len(prompts), max_length=length, min_length=length)
        return OnnxBatch(genai.Generator(self._model, parameters), input_ids)


class OnnxBatch:
    """See Batch."""

    def __init__(self, generator: genai.Generator, input_ids: np.ndarray) -> None:
        self._generator = generator
        self._generator.append_tokens(input_ids)

    def step(self) -> list[int]:
        """See Batch."""
        self._generator.generate_next_token()
        token_ids: list[int] = self._generator.get_next_tokens().tolist()
        return token_ids
