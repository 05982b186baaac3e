"""The layers that a quantised checkpoint has left in full precision."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from scalellm.services.common.model_files import brief, shown
from scalellm.services.executor.model_config.errors import UnsupportedModelError


@dataclass(frozen=True)
class IgnoredLayers:
    """Names of modules, whole or some of their dotted components, or regular expressions after `re:`."""

    patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            try:
                re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
            except (re.error, OverflowError, RecursionError) as error:
                raise UnsupportedModelError(
                    f"quantization_config: {shown(pattern)} is not a regular expression: {brief(error)}"
                ) from error

    def covers(self, names: Iterable[str]) -> bool:
        """Return whether projections that share a matrix are ignored.

        Raises:
            UnsupportedModelError: some are and some are not.
        """
        ignored = {name: any(_matches(pattern, name) for pattern in self.patterns) for name in names}
        if len(set(ignored.values())) > 1:
            first = {is_ignored: name for name, is_ignored in reversed(ignored.items())}
            raise UnsupportedModelError(
                f"quantization_config: {first[True]} is not quantised and {first[False]} is; they must be alike"
            )
        return all(ignored.values())


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return f".{pattern}." in f".{name}."
