"""Compiles a variant and reads its resource usage from the machine code."""

import hashlib
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from scalellm.kernels.aot.recorder import Variant

# Most specific first: a kernel may use plain mma beside the instructions of its generation.
_MMA = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}
_BUFFER = re.compile(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d")
_WAIT = re.compile(r"ttg\.async_wait .*\{num = (\d+) : i32\}")
_TOUCHES = re.compile(r"\b(?:ld|st|atom|red|prefetch)\.\S*global|\bcp\.async|\bcp\.reduce|\bbra\b|\bcall\b")
# Brings memory into the cache where all kernels' writes go, and so reads nothing that could be out of date.
_FETCHES = re.compile(r"\bcp\.async\.bulk\.prefetch\.L2\.global\b")
_WIDE = re.compile(r"(?:ld|st)\.global\S*\.(?:v4\.\w32|v2\.\w64|v8\.\w+)|cp\.async\.cg\.|cp\.async\.bulk\.")


class Loop(NamedTuple):
    """A loop that loads ahead into shared memory: the number of buffered tiles per operand, and the number of loads
    still under way when the loop waits for those of its next iteration. With several operands or waits, the least.

    A loop with one buffer and no loads under way waits for memory in every iteration.
    """

    buffers: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class Report:
    """A compiled program. `stack` is bytes of local memory per thread: registers that did not fit. `shared` is bytes.

    `wide` counts instructions that move 128 bits or more between a thread and device memory; `loops` are the loops that
    load ahead, in the order of the program.
    """

    registers: int
    stack: int
    shared: int
    mma: str
    wide: int
    loops: tuple[Loop, ...]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Report":
        """Undo `asdict` and JSON."""
        return cls(**{**values, "loops": tuple(Loop(*loop) for loop in values["loops"])})


def compile_variant(variant: Variant, sm: int, cache: Path) -> Report:
    """Compile for compute capability `sm` / 10, or return an earlier run's report for the same source.

    Raises:
        ValueError: a kernel that may begin before its predecessor has ended does not wait for that first.
    """
    source = ASTSource(variant.kernel, variant.signature, variant.constexprs, variant.attributes)
    found = [field.name for field in fields(Report)]
    identity = f"{triton.__version__} {found} {source.hash()} {sm} {sorted(variant.options.items())}"
    cached = cache / f"{hashlib.sha256(identity.encode()).hexdigest()}.json"
    if cached.exists():
        return Report.from_json(json.loads(cached.read_text()))
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=variant.options)
    registers, stack = _resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    if variant.options.get("launch_pdl") and not waits_first(ptx):
        raise ValueError(f"sm_{sm} {variant.name}: begins early, and may touch memory before it waits")
    mma = next((name for name, instruction in _MMA.items() if instruction in ptx), "none")
    wide, loops = len(_WIDE.findall(_FETCHES.sub("", ptx))), pipelined_loops(compiled.asm["ttgir"])
    report = Report(registers, stack, compiled.metadata.shared, mma, wide, loops)
    cache.mkdir(parents=True, exist_ok=True)
    # Several processes share the folder, so files are written atomically.
    with tempfile.NamedTemporaryFile("w", dir=cache, delete=False) as file:
        json.dump(asdict(report), file)
    Path(file.name).replace(cached)
    return report


def pipelined_loops(ttgir: str) -> tuple[Loop, ...]:
    """Read the loops that load ahead from Triton's last representation of its own."""
    found: list[Loop] = []
    buffers: list[int] = []  # of the loop that follows
    around: list[
        tuple[str, list[int], list[int]]
    ] = []  # loops around the line: what closes one, its buffers, its waits
    for line in ttgir.splitlines():
        if buffer := _BUFFER.search(line):
            buffers.append(int(buffer[1]))
        elif "scf.for " in line:
            around.append((line[: len(line) - len(line.lstrip())] + "}", buffers, []))
            buffers = []
        elif around and line.startswith(around[-1][0]):
            _, held, waits = around.pop()
            if held and waits:  # one without buffers of its own waits for the last loads of a loop in it
                found.append(Loop(min(held), min(waits)))
            buffers = []
        elif around and (wait := _WAIT.search(line)):
            around[-1][2].append(int(wait[1]))
    return tuple(found)


def waits_first(ptx: str) -> bool:
    """True if a kernel waits for the one before it ahead of any access to device memory, and on every path."""
    before, wait, _ = ptx[ptx.index(".entry") :].partition("griddepcontrol.wait;")
    return bool(wait) and not _TOUCHES.search(_FETCHES.sub("", before))


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing about registers: {text!r}")
    return int(found[1]), int(found[2])
