"""The sampler and the logits processors for the vocabularies of the presets."""

import torch
from torch import Tensor

from scalellm.kernels import SampleOutput
from scalellm.kernels.aot.recorder import Case
from scalellm.kernels.dispatch import Ops

_ROWS, _ENTRIES = 64, 1000
_SCRATCH_OF_A_ROW = 1 << 15  # enough for the largest


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _long(*shape: int) -> Tensor:
    return _meta(*shape, dtype=torch.int64)


def _sample(name: str, vocab: int, *, num_logprobs: int = 0, raw: bool = False) -> Case:
    def call(ops: Ops) -> None:
        ops.sample(
            _meta(_ROWS, vocab),
            _meta(_ROWS),
            _long(_ROWS),
            _meta(_ROWS),
            _meta(_ROWS),
            _long(_ROWS),
            _long(_ROWS),
            num_logprobs=num_logprobs,
            logprob_logits=_meta(_ROWS, vocab) if raw else None,
            workspace=_long(_ROWS * _SCRATCH_OF_A_ROW),
            out=SampleOutput(_long(_ROWS), _meta(_ROWS), _long(_ROWS, num_logprobs), _meta(_ROWS, num_logprobs)),
        )

    return Case(f"sample {name}", call)


def _processors(ops: Ops) -> None:
    entries = _long(_ENTRIES)
    ops.apply_logits_processors_(
        _meta(_ROWS, 128256),
        temperature=_meta(_ROWS),
        bitmask=_meta(_ROWS, 4008, dtype=torch.int32),
        bias_rows=entries,
        bias_token_ids=entries,
        bias_values=_meta(_ENTRIES),
        seen_rows=entries,
        seen_token_ids=entries,
        seen_output_counts=_meta(_ENTRIES, dtype=torch.int32),
        repetition_penalty=_meta(_ROWS),
        frequency_penalty=_meta(_ROWS),
        presence_penalty=_meta(_ROWS),
    )


def _mask(ops: Ops) -> None:
    ops.apply_logits_processors_(_meta(_ROWS, 128256), bitmask=_meta(8, 4008, dtype=torch.int32), mask_rows=_long(8))


CASES = (
    _sample("128256", 128256, num_logprobs=5),  # Llama 3.1
    _sample("151936 raw", 151936, num_logprobs=5, raw=True),  # Qwen3
    _sample("262144", 262144),  # Gemma 3
    Case("apply_logits_processors_ all", _processors),
    Case("apply_logits_processors_ mask", _mask),
)
