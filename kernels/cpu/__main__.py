"""Builds the C++ kernels into the package, for images: containers then start without compiling.

python -m scalellm.kernels.cpu [LEVEL...]
"""

import argparse
import os

from scalellm.kernels.cpu.building import LEVELS, SHIPPED, build_levels


def main() -> None:
    """Build levels of instructions, and print what was built. There are levels for x86-64 only."""
    by_name = {level.name: level for level in LEVELS}
    parser = argparse.ArgumentParser(
        "python -m scalellm.kernels.cpu", description="Build the C++ kernels into the package."
    )
    parser.add_argument("levels", nargs="*", metavar="LEVEL", help=f"of {', '.join(by_name)}; default: all of them")
    names = parser.parse_args().levels or list(by_name)
    if unknown := [name for name in names if name not in by_name]:
        parser.error(f"LEVEL {unknown[0]!r}: must be one of {', '.join(by_name)}")
    if os.uname().machine != "x86_64":
        print("there are no levels for this kind of CPU: kernels are compiled at the first start")
        return
    for path in build_levels(SHIPPED, [by_name[name] for name in names]):
        print(f"built {path.name}: {path.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
