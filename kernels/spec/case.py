"""Cases: an op, its inputs, and the comparison of its results with float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scalellm.kernels.capability import Capability
from scalellm.kernels.cpu.cache import can_have_layout, keys_by_token
from scalellm.kernels.dispatch import Ops

BF16, FP16, FP32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
FLOATS = (FP32, BF16, FP16)
META = torch.device("meta")

# Of a row's norm, or of an element next to the largest of its row. Results are rounded once or a few times to their
# dtype (half a unit: 2^-9 for bfloat16), and products are of operands so rounded.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float64: 1e-9}
_CODES_APART = 0.01  # share of e4m3 codes that may be one off: at the midpoint between two, either is as good


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes random tensors on one device, equal ones for equal seeds; on `meta`, tensors without memory or values."""

    device: torch.device
    generator: torch.Generator | None

    @classmethod
    def on(cls, device: torch.device, seed: int = 0) -> Maker:
        """Begin with a seed."""
        return cls(device, None if device == META else torch.Generator(device).manual_seed(seed))

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Return normally distributed numbers."""
        return (torch.randn(shape, generator=self.generator, device=self.device) * scale).to(dtype)

    def rand(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return numbers from 0 to 1."""
        return torch.rand(shape, generator=self.generator, device=self.device).to(dtype)

    def randint(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Return integers from `low` to below `high`."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device).to(dtype)

    def permutation(self, count: int) -> Tensor:
        """Return the numbers below `count` in some order."""
        return torch.randperm(count, generator=self.generator, device=self.device)

    def poison(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor of values that no op would write: NaN, or -77."""
        if dtype.is_floating_point:
            return torch.full(shape, torch.nan, device=self.device).to(dtype)
        return torch.full(shape, -77, dtype=dtype, device=self.device)

    def tensor(self, values: Any, dtype: torch.dtype) -> Tensor:
        """Return these values."""
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class Bound:
    """An op bound to inputs. It writes all of `results`, some of which may be inputs that it changes in place."""

    run: Callable[[], object]
    results: Mapping[str, Tensor]
    expected: Callable[[], Mapping[str, Tensor]]
    """Computes the expected `results`, in float64 if they are floats. Called before `run` or after `reset`. NaN marks
    elements that must not be written."""
    initial: Mapping[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "initial", {name: value.clone() for name, value in self.results.items()})

    def reset(self) -> None:
        """Undo `run`."""
        for name, value in self.initial.items():
            as_integers(self.results[name]).copy_(as_integers(value))

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies of the current results."""
        return {name: value.clone() for name, value in self.results.items()}


@dataclass(frozen=True, slots=True)
class Outcome:
    """The distance of a result from the expected one. `error` is in units of `tolerance`'s."""

    passed: bool
    error: float
    tolerance: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """One op with one set of inputs, for any device.

    `bind` makes the inputs for the forms in `ops`. `dtype` and `kv_cache_dtype` are for the choice of forms.
    `tolerance` replaces the value in `TOLERANCE` for a result's dtype. Devices below `min_sm` cannot run it.
    `allocates` is true if the op allocates tensors here, as some do for prompts, so that it cannot be captured.
    """

    op: str
    what: str
    bind: Callable[[Ops, Maker], Bound]
    dtype: torch.dtype = torch.bfloat16
    kv_cache_dtype: torch.dtype | None = None
    tolerance: float | None = None
    min_sm: int = 80
    gibibytes: float = 1.0
    """Most memory that it takes, in GiB."""
    allocates: bool = False

    @property
    def name(self) -> str:
        """Unique name of the case."""
        return f"{self.op} {self.what}"

    def trace(self, ops: Ops) -> None:
        """Call the op on tensors without memory, so that its launches are recorded and nothing is computed."""
        self.bind(ops, Maker.on(META)).run()

    def check(self, ops: Ops, device: torch.device) -> Outcome:
        """Run the op and compare its results with the expected ones."""
        bound = self.bind(ops, Maker.on(device))
        expected = bound.expected()
        bound.run()
        worst = Outcome(True, 0.0, 0.0)
        for name, result in bound.results.items():
            tolerance = TOLERANCE.get(result.dtype) if self.tolerance is None else self.tolerance
            outcome = compare(result, expected[name], tolerance)
            if not outcome.passed:
                detail = f"{name}: {outcome.detail or f'error {outcome.error:.2e}'}"
                return Outcome(False, outcome.error, outcome.tolerance, detail)
            worst = max(worst, outcome, key=lambda found: found.error)
        return worst


@dataclass(frozen=True, slots=True)
class Spec:
    """All cases of the ops of a file.

    Attributes:
        small: cases that are small enough for the interpreter. Run by every form: torch and C++ (`make test`), Triton
            on its interpreter (`make test-kernels`).
        served: cases with the launches of serving, for the shapes of the presets. Compiled by `make aot`, run by
            `make gpu`.
        large: further cases for a GPU: dtypes, lengths and widths that no preset has. Run by `make gpu`.
    """

    small: tuple[Case, ...]
    served: tuple[Case, ...]
    large: tuple[Case, ...] = ()


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name in those of cases."""
    return str(dtype).removeprefix("torch.").replace("float8_e4m3fn", "e4m3")


def capability_of(ops: Ops) -> Capability:
    """Return the capability of the device for which forms were chosen."""
    return Capability.of(torch.device("cpu")) if ops.launch is None else ops.launch.capability


def lay_keys(ops: Ops, keys: Tensor) -> Tensor:
    """Return keys [num_blocks, page, Hkv, D] in the memory layout of the forms of `ops`."""
    if ops.library is None or not can_have_layout(keys.shape[1], keys.shape[3]):
        return keys
    return keys_by_token(keys.permute(0, 2, 3, 1).contiguous())


def as_integers(value: Tensor) -> Tensor:
    """Return a view as integers of the same size."""
    return value.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])


def bit_equal(a: Tensor, b: Tensor) -> bool:
    """True if two tensors have the same bits, whatever their dtypes mean."""
    return torch.equal(as_integers(a), as_integers(b))


def compare(result: Tensor, expected: Tensor, tolerance: float | None) -> Outcome:
    """Compare a result with the expected one: integers exactly, e4m3 by codes, floats row by row.

    Rows are compared separately, because the norm of a large tensor would not show that one row is wrong.
    """
    if result.shape != expected.shape:
        return Outcome(False, float("inf"), 0.0, f"shape {tuple(result.shape)}, not {tuple(expected.shape)}")
    if result.dtype == E4M3:
        return _compare_codes(result, expected)
    if not result.dtype.is_floating_point:
        wrong = int((result != expected).sum())
        return Outcome(wrong == 0, float(wrong), 0.0, f"{wrong} of {result.numel()} differ")
    assert tolerance is not None
    got, want = result.double(), expected.double()
    untouched = want.isnan()
    if not torch.equal(got.isnan(), untouched):
        return Outcome(False, float("inf"), tolerance, "NaN where there should be none, or written where not")
    if bool(untouched.any()):
        got, want = got.masked_fill(untouched, 0), want.masked_fill(untouched, 0)
    infinite = want.isinf()
    if bool(infinite.any()):
        if not torch.equal(got.masked_fill(~infinite, 0), want.masked_fill(~infinite, 0)):
            return Outcome(False, float("inf"), tolerance, "infinities differ")
        got, want = got.masked_fill(infinite, 0), want.masked_fill(infinite, 0)
    if want.numel() == 0:
        return Outcome(True, 0.0, tolerance)
    got, want = (t.reshape(-1, t.shape[-1] if t.ndim else 1) for t in (got, want))
    norms = want.norm(dim=-1)
    # The error of a row that is nearly zero is taken relative to a thousandth of the mean norm of the rows.
    floor = 1e-3 * norms.mean() + 1e-30
    error = float(((got - want).norm(dim=-1) / torch.maximum(norms, floor)).max())
    return Outcome(error <= tolerance, error, tolerance)


def _compare_codes(result: Tensor, expected: Tensor) -> Outcome:
    got, want = (_ordered(t.to(E4M3)) for t in (result, expected))
    apart = (got - want).abs()
    share = float((apart > 0).float().mean()) if apart.numel() else 0.0
    if apart.numel() and int(apart.max()) > 1:
        return Outcome(False, float(apart.max()), 1.0, f"codes up to {int(apart.max())} apart")
    return Outcome(share <= _CODES_APART, share, _CODES_APART, f"{share:.2%} of codes differ")


def _ordered(codes: Tensor) -> Tensor:
    """Number the codes of e4m3 in the order of their values."""
    bits = codes.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)
