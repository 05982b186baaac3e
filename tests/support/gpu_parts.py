"""Parts that go wrong, for the tests of the GPU benchmark's supervisor; run in its worker processes."""

import os
import time

from bench.gpu.part import PartSpec, UnavailableError


class Works:
    def run(self, bench, found):
        found.row(name="row", figure=1.5, count=3)
        found.check("holds", True)
        found.check("a figure of the device", None)
        found.share(left=bench.seconds_left() > 0)


class Fails:
    def run(self, bench, found):
        assert bench.shared["left"]
        found.row(name="row", figure=2.5, count=4)
        found.check("does not hold", False, "on purpose")


class Raises:
    def run(self, bench, found):
        found.check("before", True)
        raise RuntimeError("something broke")


class Dies:
    def run(self, bench, found):
        found.row(name="before", figure=0.5, count=1)
        os._exit(7)


class Hangs:
    def run(self, bench, found):
        found.row(name="before", figure=0.5, count=1)
        found.check("before", True)
        time.sleep(600)


class NoRuntimeError(Exception):
    """An error that is no RuntimeError, like Triton's OutOfResources and CompilationError."""


class OneCaseRaises:
    def run(self, bench, found):
        for name in ("first", "second", "third"):
            with found.attempt(name, bench.device):
                if name == "second":
                    raise NoRuntimeError("out of resource: shared memory")
                found.row(name=name)


class Unavailable:
    def run(self, bench, found):
        raise UnavailableError("not on this machine")


def spec(kind, *, seconds=1.0, timeout=60.0):
    return PartSpec(kind.__name__.lower(), "gpu_parts", kind.__name__, seconds, timeout, "")
