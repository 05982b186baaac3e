"""Cases that are compiled ahead of time reach a kernel without making a tensor or asking for a tensor's values."""

from dataclasses import replace

import pytest

pytest.importorskip("triton")

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scalellm.kernels import Capability, select_ops
from scalellm.kernels.aot.compiler import Loop, Report, pipelined_loops, waits_first
from scalellm.kernels.aot.gate import violations
from scalellm.kernels.aot.recorder import Recorder
from scalellm.kernels.spec import SERVED


class NoAllocation(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.is_view, f"{func} makes a tensor"
        return func(*args, **(kwargs or {}))


class StrictOps:
    """Ops that may not allocate; making the arguments of a call may."""

    def __init__(self, ops):
        self.launch, self.library = ops.launch, ops.library
        self._ops = ops

    def __getattr__(self, name):
        def call(*args, **kwargs):
            with NoAllocation():
                return getattr(self._ops, name)(*args, **kwargs)

        return call


@pytest.mark.parametrize("case", [case for case in SERVED if not case.allocates], ids=lambda case: case.name)
def test_case_launches_without_allocating(case):
    recorder = Recorder(Capability(sm=100, num_sms=148), case.name)
    case.trace(StrictOps(select_ops(recorder.capability, dtype=case.dtype, launch=recorder)))
    assert recorder.variants


def test_every_triton_op_is_compiled():
    ops = select_ops(Capability(sm=90, num_sms=132), dtype=torch.bfloat16)
    expected = {name for name, backend in ops.backends.items() if backend == "triton"}
    assert expected <= {case.op for case in SERVED}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"registers": 115}, None),
        ({"registers": 116}, "registers: 100 -> 116"),
        ({"stack": 8}, "spills: 0 -> 8 bytes of local memory"),
        ({"shared": 300_000}, "shared memory is 300000 bytes, the limit is 232448"),
        ({"wide": 1}, None),
        ({"wide": 0}, "no access to device memory has 128 bits any more"),
        ({"mma": "mma"}, "matrix instructions: wgmma -> mma"),
        ({"loops": (Loop(3, 4), Loop(2, 2), Loop(1, 0))}, None),
        ({"loops": (Loop(3, 4),)}, "loops that load ahead: 2 -> 1"),
        (
            {"loops": (Loop(3, 4), Loop(1, 0))},
            "loop 2 loads less ahead: 2 buffers with 2 loads under way -> 1 with 0",
        ),
    ],
)
def test_gate(change, message):
    before = Report(registers=100, stack=0, shared=1000, mma="wgmma", wide=4, loops=(Loop(3, 4), Loop(2, 2)))
    expected = [] if message is None else [f"sm_90 x: {message}"]
    assert violations(90, "x", replace(before, **change), before) == expected
    assert violations(90, "x", before, None) == ["sm_90 x: is not in the baseline"]


TTGIR = """
    %q_1 = ttg.local_alloc %q_0 : (tensor<16x128xbf16, #blocked>) -> !ttg.memdesc<16x128xbf16, #shared, #smem>
    %k = ttg.local_alloc : () -> !ttg.memdesc<2x128x64xbf16, #shared2, #smem, mutable>
    %v = ttg.local_alloc : () -> !ttg.memdesc<3x64x128xbf16, #shared, #smem, mutable>
    %9 = ttg.async_wait %8 {num = 0 : i32}
    %acc:2 = scf.for %i = %a to %b step %c iter_args(%arg = %z) -> (tensor<16xf32>) : i32 {
      %w = ttg.async_wait %x, %y {num = 2 : i32}
      %p = ttg.local_alloc %o : (tensor<16x64xbf16, #mma>) -> !ttg.memdesc<16x64xbf16, #shared, #smem>
      %n = scf.for %j = %a to %b step %c iter_args(%arg = %z) -> (i32) : i32 {
        scf.yield %j : i32
      }
      %u = ttg.async_wait %x {num = 3 : i32}
      scf.yield %u : i32
    }
    %10 = ttg.async_wait {num = 0 : i32}
    %11 = scf.for %i = %a to %b step %c iter_args(%arg = %z) -> (i32) : i32 {
      scf.yield %i : i32
    }
    %t = ttg.local_alloc : () -> !ttg.memdesc<1x64xbf16, #shared, #smem, mutable>
    scf.for %i = %a to %b step %c : i32 {
      %w = ttg.async_wait %x {num = 0 : i32}
    } {tt.num_stages = 2 : i32}
    scf.for %number = %a to %b step %c : i32 {
      %before = scf.for %i = %a to %b step %c iter_args(%arg = %z) -> (i32) : i32 {
        scf.yield %i : i32
      }
      %k = ttg.local_alloc : () -> !ttg.memdesc<4x128x64xbf16, #shared2, #smem, mutable>
      %acc = scf.for %i = %a to %b step %c iter_args(%arg = %z) -> (tensor<16xf32>) : i32 {
        %w = ttg.async_wait %x, %y {num = 6 : i32}
        scf.yield %u : i32
      }
      %12 = ttg.async_wait {num = 0 : i32}
    }
"""


def test_how_far_loops_load_ahead_is_read_from_the_compiler():
    assert pipelined_loops(TTGIR) == (Loop(2, 2), Loop(1, 0), Loop(4, 6))


ENTRY = ".visible .entry _norm(\n.param .u64 p0\n)\n{\n"


@pytest.mark.parametrize(
    ("body", "proven"),
    [
        ("ld.param.b64 %rd1, [p0];\ngriddepcontrol.wait;\nld.global.b32 %r1, [%rd1];", True),
        ("ld.param.b64 %rd1, [p0];\nld.global.b32 %r1, [%rd1];\ngriddepcontrol.wait;", False),
        ("@%p1 st.relaxed.gpu.global.b32 [%rd1], %r1;\ngriddepcontrol.wait;", False),
        ("atom.global.gpu.acq_rel.add.u32 %r1, [%rd1], 1;\ngriddepcontrol.wait;", False),
        ("cp.async.cg.shared.global [%r1], [%rd1], 16;\ngriddepcontrol.wait;", False),
        ("@%p1 bra $L__BB0_2;\ngriddepcontrol.wait;\n$L__BB0_2:\nld.global.b32 %r1, [%rd1];", False),
        ("ld.global.b32 %r1, [%rd1];", False),
        ("cp.async.bulk.prefetch.L2.global [%rd1], %r1;\ngriddepcontrol.wait;\nld.global.b32 %r1, [%rd1];", True),
        ("prefetch.global.L1 [%rd1];\ngriddepcontrol.wait;\nld.global.b32 %r1, [%rd1];", False),
    ],
)
def test_a_kernel_that_begins_early_waits_before_it_touches_memory(body, proven):
    assert waits_first(ENTRY + body + "\nret;\n}\n") is proven
