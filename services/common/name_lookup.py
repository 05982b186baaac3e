"""Periodic look-ups of services' names."""

from __future__ import annotations

import logging

from scalellm.services.common.addresses import look_up

_log = logging.getLogger(__name__)


class NameLookup:
    """Looks names up, and logs a failure once until its name can be looked up again.

    Args:
        kind: The kind of service that the names stand for, for log lines.

    Attributes:
        errors: By name, the reason why the last look-up failed.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self.errors: dict[str, str] = {}

    async def look_up(self, name: str) -> frozenset[str] | None:
        """Return the addresses of a name, see the function `look_up`; None if that fails."""
        try:
            addresses = await look_up(name)
        except (OSError, UnicodeError) as error:  # the latter: not a host name at all
            if name not in self.errors:
                _log.warning("cannot look up %s %s, keeping what is known: %s", self._kind, name, error)
            self.errors[name] = f"cannot look up {name}: {error}"
            return None
        self.errors.pop(name, None)
        return addresses
