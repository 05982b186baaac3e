"""The executors' side of a request: where it runs, where it ran, and where it should go."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.scheduler.replica_link import ReplicaLink


class ExecutorSide:
    """What placement notes about a request.

    Attributes:
        replica: The executor that has it now; None = none.
        handle: Its handle there.
        dispatches: How often it was sent to an executor.
        deaths: Executors that were lost under it.
        num_resumed: Tokens that the client had when it was sent off last.
        refused_by: Why executors sent it back, by their instance.
        hashes: `block_hashes` of the prompt.
        awaits_session: Whether its session's executor is being looked up.
        session_address: The executor that ran its session last.
        session_wait_until: Until when it waits for that one; None = it does not yet. Monotonic seconds.
    """

    __slots__ = (
        "awaits_session",
        "deaths",
        "dispatches",
        "handle",
        "hashes",
        "num_resumed",
        "refused_by",
        "replica",
        "session_address",
        "session_wait_until",
    )

    def __init__(self) -> None:
        self.replica: ReplicaLink | None = None
        self.handle = 0
        self.dispatches = 0
        self.deaths = 0
        self.num_resumed = 0
        self.refused_by: dict[str, str] = {}
        self.hashes: list[int] = []
        self.awaits_session = False
        self.session_address: str | None = None
        self.session_wait_until: float | None = None
