"""The executors' side of a request: where it runs, where it ran, and where it should go."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scalellm.services.scheduler.replica_link import ReplicaLink


class ExecutorSide:
    """The part of a request that belongs to placement.

    Attributes:
        replica: The executor that has it now; None = none.
        handle: Its handle there.
        num_rows: Rows that it holds there, one for each sample that has not ended.
        charged_tokens: Tokens that it took of that executor's credit.
        is_recalled: True if that one was asked to give it back.
        num_charged: Output tokens that its tenant's account knows of.
        dispatches: Number of times that it was sent to an executor.
        deaths: Engines that were lost under it in a row, without a token in between.
        deaths_in_all: Engines that were lost under it.
        died_on: The last one of these.
        num_resumed: Tokens that the client had when it was sent off last.
        refused_by: Errors of the executors that sent it back, by their instance.
        hashes: `block_hashes` of the prompt.
        awaits_session: True if its session's executor is being looked up.
        session_address: The executor that ran its session last.
        session_wait_until: Until when it waits for that one; None = it does not yet. Monotonic seconds.
    """

    __slots__ = (
        "awaits_session",
        "charged_tokens",
        "deaths",
        "deaths_in_all",
        "died_on",
        "dispatches",
        "handle",
        "hashes",
        "is_recalled",
        "num_charged",
        "num_resumed",
        "num_rows",
        "refused_by",
        "replica",
        "session_address",
        "session_wait_until",
    )

    def __init__(self) -> None:
        self.replica: ReplicaLink | None = None
        self.handle = 0
        self.num_rows = 0
        self.charged_tokens = 0
        self.is_recalled = False
        self.num_charged = 0
        self.dispatches = 0
        self.deaths = 0
        self.deaths_in_all = 0
        self.died_on = ""
        self.num_resumed = 0
        self.refused_by: dict[str, str] = {}
        self.hashes: list[int] = []
        self.awaits_session = False
        self.session_address: str | None = None
        self.session_wait_until: float | None = None
