"""The choice of a form for each op: plain torch, a Triton kernel, or C++ on the CPU (see `kernels.cpu`).

    ops = select_ops(Capability.of(device), dtype=torch.bfloat16)
    ops.silu_and_mul(x, out=y)
    ops.backends["silu_and_mul"]  # "triton"

How a Triton form is added
1. `kernels/triton/<file>.py` gets the kernel (rules in `launch.Launch`) and a function of the op's name. Its first
   parameter is `launch: Launch`; the others are, name by name, those of the torch form in `kernels/reference`, whose
   docstring is the contract. It never waits for the device, never reads a tensor's values on the host, allocates
   nothing when `out` (and `workspace`) are given, and computes addresses in int64. Kernels are started with
   `launch(kernel, grid, *runtime_arguments, num_warps=..., NAME=constexpr, ...)`. What depends on the device, as
   sizes of tiles may, comes from `launch.tile`; see `kernels.tiles`. An argument that needs e4m3 is held against the
   device by `launch.capability.require_e4m3`.
2. `_TRITON` below gets a line: the file and what the device must have.
3. `kernels/spec/<file>.py` gets its cases: small ones, on which every form is compared with float64; those of every
   variant that serving uses, which are compiled, and run on a GPU; and what else only a GPU gets through.
4. `make aot AOT_ARGS=--write` adds the new variants to the baseline; look at them before committing.
5. `tests/kernels/interp/test_<file>_interp.py` has what is no comparison with float64 (fixture `ops`: Triton forms).
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from scalellm.kernels.capability import Capability
from scalellm.kernels.cpu.library import CpuLibrary, default_build_dir, load_library
from scalellm.kernels.launch import Launch
from scalellm.kernels.reference.activation import gelu_tanh_and_mul, silu_and_mul
from scalellm.kernels.reference.attention import paged_attention_decode, unified_attention
from scalellm.kernels.reference.cache import copy_blocks_, swap_blocks
from scalellm.kernels.reference.linear import Gate, fused_linear
from scalellm.kernels.reference.logits import apply_logits_processors_
from scalellm.kernels.reference.lora import lora_expand, lora_shrink
from scalellm.kernels.reference.moe import fused_moe, fused_moe_wna16, moe_align_block_size, topk_softmax
from scalellm.kernels.reference.norm import fused_add_rms_norm
from scalellm.kernels.reference.quant import E4M3, fp8_gemm, scaled_fp8_quant
from scalellm.kernels.reference.rope import qk_norm_rope_and_cache
from scalellm.kernels.reference.sampling import sample
from scalellm.kernels.reference.w4a16 import w4a16_gemm, w8a16_gemm
from scalellm.kernels.tiles import TILED_OPS, tile_table

Backend = Literal["torch", "triton", "cpp"]


@dataclass(frozen=True, slots=True)
class TritonForm:
    """The module of an op's Triton form, and its requirements."""

    module: str  # under kernels.triton; the function has the op's name
    min_sm: int = 80  # bfloat16 and asynchronous copies
    uses_cache: bool = False  # reads or writes the KV cache, so its dtype matters, too
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class CppForm:
    """The module of an op's C++ form, and its limits."""

    module: str  # under kernels.cpu; the function has the op's name
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


_TRITON: Mapping[str, TritonForm] = MappingProxyType(
    {
        "apply_logits_processors_": TritonForm("logits"),
        "copy_blocks_": TritonForm("cache"),
        "fp8_gemm": TritonForm("gemm_fp8", min_sm=89),
        "fused_add_rms_norm": TritonForm("norm"),
        "fused_linear": TritonForm("linear", dtypes=(torch.bfloat16, torch.float16)),
        "fused_moe": TritonForm("moe"),
        "fused_moe_wna16": TritonForm("moe_wna16"),
        "gelu_tanh_and_mul": TritonForm("activation"),
        "lora_expand": TritonForm("lora"),
        "lora_shrink": TritonForm("lora"),
        "moe_align_block_size": TritonForm("moe_routing"),
        "paged_attention_decode": TritonForm("attention_decode", uses_cache=True),
        "qk_norm_rope_and_cache": TritonForm("rope", uses_cache=True),
        "sample": TritonForm("sampling"),
        "scaled_fp8_quant": TritonForm("quant", min_sm=89),
        "silu_and_mul": TritonForm("activation"),
        "topk_softmax": TritonForm("moe_routing"),
        "unified_attention": TritonForm("attention", uses_cache=True),
        "w4a16_gemm": TritonForm("gemm_wna16"),
        "w8a16_gemm": TritonForm("gemm_wna16"),
    }
)
_CPP: Mapping[str, CppForm] = MappingProxyType(
    {
        "apply_logits_processors_": CppForm("logits"),
        "fused_add_rms_norm": CppForm("norm"),
        "fused_moe": CppForm("moe", dtypes=(torch.float32,)),
        "fused_moe_wna16": CppForm("moe"),
        "gelu_tanh_and_mul": CppForm("activation"),
        "paged_attention_decode": CppForm("attention"),
        "qk_norm_rope_and_cache": CppForm("rope"),
        "sample": CppForm("sampling"),
        "silu_and_mul": CppForm("activation"),
        "topk_softmax": CppForm("moe"),
        "unified_attention": CppForm("attention"),
        "w4a16_gemm": CppForm("gemm_wna16"),
        "w8a16_gemm": CppForm("gemm_wna16"),
    }
)


class Ops:
    """The public ops in the forms chosen for one device; without arguments, all in plain torch.

    `backends` names the form of each op. `launch` starts the Triton forms and counts their late compiles; it is None
    when there are none. `library` has the C++ forms; None when there are none.
    """

    # These class attributes are the torch forms and give every op its type; other forms shadow them.
    apply_logits_processors_ = staticmethod(apply_logits_processors_)
    copy_blocks_ = staticmethod(copy_blocks_)
    fp8_gemm = staticmethod(fp8_gemm)
    fused_add_rms_norm = staticmethod(fused_add_rms_norm)
    fused_linear = staticmethod(fused_linear)
    fused_moe = staticmethod(fused_moe)
    fused_moe_wna16 = staticmethod(fused_moe_wna16)
    gelu_tanh_and_mul = staticmethod(gelu_tanh_and_mul)
    lora_expand = staticmethod(lora_expand)
    lora_shrink = staticmethod(lora_shrink)
    moe_align_block_size = staticmethod(moe_align_block_size)
    paged_attention_decode = staticmethod(paged_attention_decode)
    qk_norm_rope_and_cache = staticmethod(qk_norm_rope_and_cache)
    sample = staticmethod(sample)
    scaled_fp8_quant = staticmethod(scaled_fp8_quant)
    silu_and_mul = staticmethod(silu_and_mul)
    swap_blocks = staticmethod(swap_blocks)
    topk_softmax = staticmethod(topk_softmax)
    unified_attention = staticmethod(unified_attention)
    w4a16_gemm = staticmethod(w4a16_gemm)
    w8a16_gemm = staticmethod(w8a16_gemm)

    def __init__(
        self,
        launch: Launch | None = None,
        forms: Mapping[str, tuple[Backend, Callable[..., Any]]] | None = None,
        library: CpuLibrary | None = None,
    ) -> None:
        self.launch = launch
        self.library = library
        backends: dict[str, Backend] = dict.fromkeys(OP_NAMES, "torch")
        for name, (backend, function) in (forms or {}).items():
            backends[name] = backend
            setattr(self, name, function)
        self.backends: Mapping[str, Backend] = MappingProxyType(backends)

    def takes_fused(self, rows: int, gate: Gate | None = None) -> bool:
        """True if `fused_linear` should replace a product of `rows` rows and the ops around it."""
        if self.launch is None or self.backends["fused_linear"] != "triton":
            return False
        return rows <= self.launch.tile("fused_linear", matrices=1 if gate is None else 2)["max_rows"]


OP_NAMES = tuple(sorted(name for name, value in vars(Ops).items() if isinstance(value, staticmethod)))


def select_ops(
    capability: Capability,
    *,
    dtype: torch.dtype,
    kv_cache_dtype: torch.dtype | None = None,
    overrides: Mapping[str, Backend] | None = None,
    launch: Launch | None = None,
    build_dir: Path | None = None,
) -> Ops:
    """Choose a form of every op: Triton on a GPU and C++ on a CPU, where the op has it and it can run; else torch.

    Args:
        capability: of the device that the ops will run on.
        dtype: of activations.
        kv_cache_dtype: of the KV cache; None is `dtype`.
        overrides: op name to backend, instead of the choice made here; the name "all" stands for every op that has
            the backend asked for.
        launch: starts the Triton forms; None makes one for `capability`.
        build_dir: where compiled C++ forms are kept; None is in the user's cache directory.

    Raises:
        ValueError: an override names an op that does not exist, or a form that does not exist or that the device
            cannot run; kv_cache_dtype is e4m3 and the device cannot convert it, unless overrides name the torch forms
            of the ops on the cache; or the tile table of an op is not one.
    """
    overrides = overrides or {}
    for name in overrides.keys() - {"all", *OP_NAMES}:
        raise ValueError(f"overrides: there is no op {name!r}; ops are {', '.join(OP_NAMES)}")
    launch = launch or Launch(capability)
    build_dir = build_dir or default_build_dir()
    best: Backend = "triton" if capability.sm else "cpp"
    forms: dict[str, tuple[Backend, Callable[..., Any]]] = {}
    for name in OP_NAMES:
        backend = overrides.get(name) or overrides.get("all", best)
        obstacle = None if backend == "torch" else _obstacle(name, backend, capability, dtype, build_dir)
        if obstacle and name in overrides:
            raise ValueError(f"overrides: {name} cannot run on {backend}: {obstacle}")
        if backend == "triton" and not obstacle:
            if _TRITON[name].uses_cache and kv_cache_dtype == E4M3:
                capability.require_e4m3("kv_cache_dtype")  # rather than the torch form, which would crawl
            forms[name] = backend, _form(f"triton.{_TRITON[name].module}", name, launch)
            if name in TILED_OPS:
                tile_table(name, capability)  # a table that cannot be used is refused here, not at the first call
        elif backend == "cpp" and not obstacle:
            forms[name] = backend, _form(f"cpu.{_CPP[name].module}", name, load_library(build_dir))
    chosen = {backend for backend, _ in forms.values()}
    return Ops(launch if "triton" in chosen else None, forms, load_library(build_dir) if "cpp" in chosen else None)


def _form(module: str, name: str, started_by: object) -> Callable[..., Any]:
    return functools.partial(getattr(importlib.import_module(f"scalellm.kernels.{module}"), name), started_by)


def _obstacle(name: str, backend: Backend, capability: Capability, dtype: torch.dtype, build_dir: Path) -> str | None:
    """Return the reason why the form of an op for this backend cannot be used, or None."""
    form = _TRITON.get(name) if backend == "triton" else _CPP.get(name)
    if form is None:
        return "it has no such form"
    if isinstance(form, TritonForm) and capability.sm < form.min_sm:
        return f"it needs compute capability {form.min_sm / 10}, the device has {capability.sm / 10}"
    if isinstance(form, CppForm) and capability.sm:
        return "it is for CPUs"
    if dtype not in form.dtypes:
        return f"it does not take {dtype}"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if backend == "cpp" and load_library(build_dir) is None:
        return "it could not be compiled"
    return None
