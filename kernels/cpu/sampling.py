"""Drawing tokens in C++. Specified by the torch form, `kernels.reference.sampling`."""

import torch
from torch import Tensor

from scalellm.kernels.cpu.library import CpuLibrary
from scalellm.kernels.reference import sampling as reference
from scalellm.kernels.reference.sampling import SampleOutput


def sample(
    library: CpuLibrary,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    num_logprobs: int | None = 0,
    logprob_logits: Tensor | None = None,
    workspace: Tensor | None = None,
    out: SampleOutput | None = None,
) -> SampleOutput:
    """C++ form of `kernels.sample`. The noise, and therefore the draws, equal those of the torch form."""
    source = logits if logprob_logits is None else logprob_logits
    (rows, vocab), k = logits.shape, num_logprobs or 0
    if out is None:
        out = SampleOutput(
            torch.empty(rows, dtype=torch.int64),
            torch.empty(rows, dtype=torch.float32),
            torch.empty((rows, k), dtype=torch.int64),
            torch.empty((rows, k), dtype=torch.float32),
        )
    rows_of_logits = all(x.dtype == torch.float32 and x.stride(1) == 1 for x in (logits, source))
    if not rows_of_logits or k > vocab or not all(part.is_contiguous() for part in out):
        arguments = (logits, temperature, top_k, top_p, min_p, seeds, positions)
        return reference.sample(*arguments, num_logprobs=num_logprobs, logprob_logits=logprob_logits, out=out)
    columns = (
        _column(temperature, torch.float32),
        _column(top_k, torch.int64),
        _column(top_p, torch.float32),
        _column(min_p, torch.float32),
        _column(seeds, torch.int64),
        _column(positions, torch.int64),
    )
    pointers = [tensor.data_ptr() for tensor in (logits, source, *columns, *out)]
    library.call(
        "sample", *pointers, rows, vocab, logits.stride(0), source.stride(0), -1 if num_logprobs is None else k
    )
    return out


def _column(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).contiguous()
