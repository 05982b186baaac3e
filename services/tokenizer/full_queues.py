"""What schedulers said of their queues: that these have no room for a tenant, for a moment."""

from __future__ import annotations

from scalellm.v1 import link_pb2
from services.common.errors import StatusError


class FullQueues:
    """Spares schedulers the requests that they have just said they would refuse.

    Which tenant has no room, and for how long that holds, is the scheduler's alone to say; nothing is concluded from it
    for other tenants or other schedulers.
    """

    def __init__(self) -> None:
        self._full: dict[bytes, dict[str, tuple[int, link_pb2.LinkStatus]]] = {}

    def note(self, tenant: bytes, scheduler: str, finish: link_pb2.Finish, now: int) -> None:
        """A scheduler refused a request.

        Args:
            tenant: Of the request, as schedulers know it.
            scheduler: The scheduler's address.
            finish: What it said.
            now: Monotonic nanoseconds.
        """
        if finish.tenant_full_ns:
            status = link_pb2.LinkStatus()
            status.CopyFrom(finish.status)
            self._full.setdefault(tenant, {})[scheduler] = (now + finish.tenant_full_ns, status)

    def forget(self, scheduler: str) -> None:
        """A scheduler was lost: whatever takes its place has a queue of its own."""
        for full in self._full.values():
            full.pop(scheduler, None)

    def check_room(self, tenant: bytes, schedulers: list[str], now: int) -> None:
        """Raise the refusal of a new request of a tenant, where each of the schedulers would refuse it."""
        full = self._full.get(tenant)
        if full is None:
            return
        for scheduler, (until, _) in tuple(full.items()):
            if until <= now:
                del full[scheduler]
        if not full:
            del self._full[tenant]
        elif schedulers and all(scheduler in full for scheduler in schedulers):
            _, status = min((full[scheduler] for scheduler in schedulers), key=lambda entry: entry[0])
            raise StatusError.from_link(status)
