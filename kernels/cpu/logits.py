"""Masks of logits in C++. Specified by the torch form, `kernels.reference.logits`."""

import torch
from torch import Tensor

from scalellm.kernels.cpu.library import CpuLibrary
from scalellm.kernels.reference import logits as reference


def apply_logits_processors_(
    library: CpuLibrary,
    logits: Tensor,
    *,
    temperature: Tensor | None = None,
    bitmask: Tensor | None = None,
    mask_rows: Tensor | None = None,
    bias_rows: Tensor | None = None,
    bias_token_ids: Tensor | None = None,
    bias_values: Tensor | None = None,
    seen_rows: Tensor | None = None,
    seen_token_ids: Tensor | None = None,
    seen_output_counts: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    presence_penalty: Tensor | None = None,
) -> Tensor:
    """C++ form of `kernels.apply_logits_processors_`, for a bitmask of all rows.

    A call with only a bitmask can be recorded. Bias and penalties change few numbers of a row, and are applied by
    torch.
    """
    rows_of_logits = logits.dtype == torch.float32 and logits.stride(1) == 1
    is_masked = bitmask is not None and mask_rows is None and rows_of_logits and bitmask.stride(1) == 1
    flat = (bias_rows, bias_token_ids, bias_values, seen_rows, seen_token_ids, seen_output_counts)
    if not is_masked or any(part is not None for part in flat):
        reference.apply_logits_processors_(
            logits,
            bitmask=None if is_masked else bitmask,
            mask_rows=mask_rows,
            bias_rows=bias_rows,
            bias_token_ids=bias_token_ids,
            bias_values=bias_values,
            seen_rows=seen_rows,
            seen_token_ids=seen_token_ids,
            seen_output_counts=seen_output_counts,
            repetition_penalty=repetition_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
        )
    if is_masked:
        assert bitmask is not None
        pointers = logits.data_ptr(), bitmask.data_ptr()
        library.call("mask_logits", *pointers, *logits.shape, logits.stride(0), bitmask.stride(0))
    return logits if temperature is None else reference.apply_logits_processors_(logits, temperature=temperature)
