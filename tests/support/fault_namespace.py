"""A place of its own in the network for one process, on a cable that can be pulled: neither end is told anything."""

from __future__ import annotations

import secrets
import subprocess
from types import TracebackType

_NETWORK = "10.231.{}.{}"
"""A network of four addresses for each namespace, used by nobody else on a machine that runs tests."""


class Namespace:
    """A network namespace, and a pair of virtual interfaces from there to the machine's own network.

    A pulled cable is what the kernel makes of it: packets are lost, TCP sends them again after ever longer pauses, and
    no connection closes. Use it as a context manager.

    Attributes:
        outside: Address of this machine as the namespace sees it.
        inside: Address of the namespace as this machine sees it.
        prefix: Command that runs another one in the namespace, as the same process.
    """

    def __init__(self) -> None:
        number = secrets.randbelow(2**14)
        third, fourth = number // 64, number % 64 * 4
        self.outside, self.inside = _NETWORK.format(third, fourth + 1), _NETWORK.format(third, fourth + 2)
        self._name = f"scalellm-{number}"
        self._ours, self._theirs = f"slm-{number}-a", f"slm-{number}-b"
        self.prefix = ("ip", "netns", "exec", self._name)

    def __enter__(self) -> Namespace:
        _ip("netns", "add", self._name)
        try:
            _ip("link", "add", self._ours, "type", "veth", "peer", "name", self._theirs, "netns", self._name)
            _ip("addr", "add", f"{self.outside}/30", "dev", self._ours)
            self._inside("addr", "add", f"{self.inside}/30", "dev", self._theirs)
            _ip("link", "set", self._ours, "up")
            self._inside("link", "set", "lo", "up")
            self.mend()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def pull(self) -> None:
        """From now on nothing gets through."""
        self._inside("link", "set", self._theirs, "down")

    def mend(self) -> None:
        """From now on packets get through again."""
        self._inside("link", "set", self._theirs, "up")

    def _inside(self, *arguments: str) -> None:
        _ip("-n", self._name, *arguments)

    def _remove(self) -> None:
        subprocess.run(["ip", "link", "delete", self._ours], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "delete", self._name], capture_output=True, check=False)


def why_no_namespace() -> str:
    """Return the reason why no namespace can be made here; empty if one can."""
    try:
        with Namespace():
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.decode().strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        return f"a network namespace takes root and iproute2: {said}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, check=True)
