import pytest
import torch

from scalellm.kernels import lora_expand


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_columns_outside_the_result_are_refused():
    with pytest.raises(ValueError, match="offset: columns 6 to 16 do not fit in the 15 of out"):
        lora_expand(randn(1, 4), randn(1, 10, 4), torch.zeros(1).int(), out=randn(1, 15), offset=6)
