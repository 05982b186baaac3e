"""Launches of Triton kernels at a low cost on the host, and the detection of compilation while serving.

`kernel[grid](...)` binds and specialises its arguments again at every call, which takes 10 us for 9 arguments and 29 us
for 24 (measured), and a layer of a model makes ten such calls. `Launch` keeps the compiled kernel and launches it
directly from then on (4 to 6 us).
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

from scalellm.kernels.capability import Capability
from scalellm.kernels.tiles import Tile, tile_table

_OVERLAP_MIN_SM = 90  # of programmatic dependent launch


class Launch:
    """Launches kernels on one device, each compiled variant straight from a dictionary once it has been seen.

    A variant is what Triton compiles separately: the kernel, the dtypes of its tensors and whether they are aligned to
    16 bytes, the widths of its integers, its constexprs and its options. A kernel launched through here therefore
    - has its runtime parameters first and its constexprs after them, and
    - lists every runtime integer in `do_not_specialize`, or Triton would compile again when one is 1 or a multiple
      of 16; what the code generator should know (strides, head counts) is a constexpr.
    A kernel with a constexpr `OVERLAPS` gets it from here, see `kernels.triton.overlap`.

    After `seal`, a new variant is still compiled and run, but counted in `late_variants`, because requests waited for
    the compiler, which warm-up should have prevented. Not safe for concurrent use.
    """

    def __init__(self, capability: Capability) -> None:
        self.capability = capability
        self.late_variants: list[str] = []  # names of kernels, one entry per variant; should be empty
        self._variants: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}
        self._sealed = False

    def tile(self, op: str, **sizes: int) -> Tile:
        """Return the tile in the device's table for a call of `op` with these sizes; see `kernels.tiles`."""
        return tile_table(op, self.capability).choose(**sizes)

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *args: Any,
        num_warps: int = 4,
        num_stages: int = 2,
        **constexprs: Any,
    ) -> None:
        """Queue `kernel` on the current stream of the current device; an empty grid does nothing.

        Args:
            kernel: a `@triton.jit` function.
            grid: numbers of programs, up to three.
            args: the runtime arguments in the order of the kernel's parameters: tensors, numbers and None.
            num_warps: warps of a program.
            num_stages: depth of the pipeline that loads ahead.
            constexprs: all other parameters, but for `OVERLAPS`.

        Raises:
            TypeError: the arguments are not the kernel's parameters, or Triton would specialise on one.
        """
        if 0 in grid:
            return
        key = (kernel, num_warps, num_stages, *map(_specialisation, args), *constexprs.values())
        variant = self._variants.get(key)
        if variant is not None and variant[0] is not None:
            compiled, tail, _ = variant
            compiled[(*grid, 1, 1)[:3]](*args, *tail)
            return
        tail, options = complete(kernel, self.capability, args, constexprs) if variant is None else variant[1:]
        compiled = kernel[grid](*args, *tail, num_warps=num_warps, num_stages=num_stages, **options)
        if variant is None:
            if self._sealed:
                self.late_variants.append(kernel.__name__)
            self._variants[key] = (compiled, tail, options)  # the interpreter compiles nothing: None

    @property
    def num_variants(self) -> int:
        """Number of different variants launched so far."""
        return len(self._variants)

    def warm_up(self, manifest: Iterable[Callable[[], object]]) -> float:
        """Run every call of the manifest, which must reach every variant that serving will, then `seal`.

        Returns:
            Seconds that it took. Compiling is synchronous, so start-up waits for it.
        """
        start = time.perf_counter()
        for call in manifest:
            call()
        self.seal()
        return time.perf_counter() - start

    def seal(self) -> None:
        """End the warm-up: from now on, a new variant counts as late."""
        self._sealed = True


def complete(
    kernel: Any, capability: Capability, args: tuple[Any, ...], constexprs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the constexprs in the order of the kernel's parameters, and the options other than warps and stages.

    Raises:
        TypeError: the kernel violates a rule of `Launch`.
    """
    names = list(kernel.arg_names)
    options: dict[str, Any] = {}
    if "OVERLAPS" in names:
        overlaps = capability.sm >= _OVERLAP_MIN_SM and hasattr(kernel, "params")  # the interpreter knows no such thing
        constexprs = {**constexprs, "OVERLAPS": overlaps}
        if overlaps:
            options["launch_pdl"] = True
    if set(names[len(args) :]) != constexprs.keys():
        expected, got = sorted(names[len(args) :]), sorted(constexprs)
        raise TypeError(f"{kernel.__name__}: after {len(args)} runtime arguments come {expected}, not {got}")
    for parameter, value in zip(getattr(kernel, "params", ()), args, strict=False):  # the interpreter keeps no list
        if isinstance(value, int) and not parameter.do_not_specialize:
            raise TypeError(f"{kernel.__name__}: {parameter.name} is an integer and not in do_not_specialize")
    return tuple(constexprs[name] for name in names[len(args) :]), options


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is not less than n > 0; triton's takes 2 us, and wrappers need several."""
    return 1 << (n - 1).bit_length()


def _specialisation(value: Any) -> Any:
    """Return Triton's specialisation on a runtime argument, besides passing it on: a tensor, float, int or None."""
    kind = type(value)
    if kind is float or value is None:
        return kind
    if kind is int:
        return value.bit_length() > 31
    return value.dtype, value.data_ptr() % 16 == 0
