"""The parts of the run, the most important first: when time is short, the last ones are left out.

A part is added by a module with a class that has `run` (see `bench.gpu.part.Part`) and a line here.
"""

from collections.abc import Sequence
from dataclasses import replace

from bench.gpu.part import PartSpec

ENVIRONMENT = PartSpec(
    "environment", "bench.gpu.parts.environment", "Environment", 15, 90, "the device, and what it can do at most"
)
_ENGINE = PartSpec("engine-speed", "bench.gpu.parts.engine_speed", "EngineSpeed", 45, 180, "the engine at 64 sequences")
PARTS = (
    ENVIRONMENT,
    PartSpec("parity", "bench.gpu.parts.parity", "Parity", 60, 300, "every op against float64"),
    PartSpec("graphs", "bench.gpu.parts.graphs", "Graphs", 25, 120, "graph replay against eager, late compiles"),
    PartSpec("model-parity", "bench.gpu.parts.model_parity", "ModelParity", 50, 180, "whole models against the CPU"),
    PartSpec("roofline", "bench.gpu.parts.roofline", "Roofline", 60, 240, "each op, and torch's own beside it"),
    PartSpec("model-speed", "bench.gpu.parts.model_speed", "ModelSpeed", 90, 240, "decode steps and prompts"),
    _ENGINE,
    PartSpec("ranks", "bench.gpu.parts.ranks", "Ranks", 40, 180, "collectives in graphs, two ranks on one device"),
    PartSpec("sanitizer", "bench.gpu.parts.sanitizer", "ComputeSanitizer", 40, 180, "compute-sanitizer"),
    PartSpec(
        "transformers", "bench.gpu.parts.continuous_batching", "ContinuousBatching", 50, 150, "transformers beside us"
    ),
)
# Making and checking whole layers of Mixtral, up to 50 GiB, is for a full run.
_SMALLER = {"most_gibibytes": 8}
# What is wanted of a machine that is there for minutes; the other parts get what these leave.
FIRST = (
    ENVIRONMENT,
    PartSpec("compile", "bench.gpu.parts.compile", "Compile", 40, 120, "what serving compiles, in a pool"),
    PartSpec(
        "ops", "bench.gpu.parts.ops", "OpsOnce", 25, 90, "one case of each op and dtype, eager and captured", _SMALLER
    ),
    PartSpec(
        "steps",
        "bench.gpu.parts.model_speed",
        "ModelSpeed",
        45,
        120,
        "decode steps of Llama-3.1-8B and the kernels of a replay",
        {
            "models": [["llama-3.1-8b", "bf16"], ["llama-3.1-8b", "fp8"]],
            "batches": [1, 64, 256],
            "prompts": False,
            "profile": True,
        },
    ),
    PartSpec("projections", "bench.gpu.parts.projections", "Projections", 25, 90, "cuBLAS and scaled_mm by rows"),
    PartSpec(
        "kernels",
        "bench.gpu.parts.roofline",
        "Roofline",
        45,
        120,
        "the ops that a step is made of",
        {"ops": ["fused_linear", "fp8_gemm", "paged_attention_decode", "unified_attention", "fused_moe", "w4a16_gemm"]},
    ),
    _ENGINE,
)


def after_first(parts: Sequence[PartSpec]) -> list[PartSpec]:
    """Return what comes after `FIRST` of these parts, without its largest cases."""
    rest = (spec for spec in parts if spec not in FIRST)
    return [replace(spec, options=_SMALLER) if spec.name in ("parity", "graphs") else spec for spec in rest]
