"""The parts of the run, the most important first: when time is short, the last ones are left out.

A part is added by a module with a class that has `run` (see `bench.gpu.part.Part`) and a line here.
"""

from bench.gpu.part import PartSpec

ENVIRONMENT = PartSpec(
    "environment", "bench.gpu.parts.environment", "Environment", 15, 90, "the device, and what it can do at most"
)
PARTS = (
    ENVIRONMENT,
    PartSpec("parity", "bench.gpu.parts.parity", "Parity", 60, 300, "every op against float64"),
    PartSpec("graphs", "bench.gpu.parts.graphs", "Graphs", 25, 120, "graph replay against eager, late compiles"),
    PartSpec("model-parity", "bench.gpu.parts.model_parity", "ModelParity", 50, 180, "whole models against the CPU"),
    PartSpec("roofline", "bench.gpu.parts.roofline", "Roofline", 60, 240, "each op, and torch's own beside it"),
    PartSpec("model-speed", "bench.gpu.parts.model_speed", "ModelSpeed", 90, 240, "decode steps and prompts"),
    PartSpec("engine-speed", "bench.gpu.parts.engine_speed", "EngineSpeed", 45, 180, "the engine at 64 sequences"),
    PartSpec("sanitizer", "bench.gpu.parts.sanitizer", "ComputeSanitizer", 40, 180, "compute-sanitizer"),
    PartSpec(
        "transformers", "bench.gpu.parts.continuous_batching", "ContinuousBatching", 50, 150, "transformers beside us"
    ),
)
