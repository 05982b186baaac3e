"""The memory of weights on a CPU."""

import torch

from scalellm.services.executor.models import WeightMemory

CPU = torch.device("cpu")


def test_tensors_are_apart_aligned_and_outlive_the_memory() -> None:
    memory = WeightMemory()
    shapes = [(3, 5), (0, 4), (7,), (1 << 12, 1 << 13), (1 << 12, 1 << 13), (2, 2)]
    dtypes = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int32, torch.bfloat16]
    tensors = [memory.allocate(shape, dtype=dtype, device=CPU) for shape, dtype in zip(shapes, dtypes, strict=True)]
    del memory
    for number, (tensor, shape, dtype) in enumerate(zip(tensors, shapes, dtypes, strict=True)):
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        tensor.view(torch.uint8)[:2] = number
    for number, tensor in enumerate(tensors):
        assert bool((tensor.view(torch.uint8)[:2] == number).all())


def test_only_a_cpu_has_it() -> None:
    assert WeightMemory().allocate((2, 3), dtype=torch.float32, device=torch.device("meta")).is_meta
