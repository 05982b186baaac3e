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
        charged_tokens: Prompt tokens by which it has reduced that executor's credit.
        is_recalled: True if that executor was asked to give it back.
        num_charged: Output tokens already charged to its tenant's account.
        dispatches: Number of times that it was sent to an executor.
        deaths: Engines that were lost under it in a row, without a token in between.
        deaths_in_all: Engines that were lost under it.
        died_on: Instance id of the engine that was lost under it last.
        num_resumed: Output tokens that the client had when the request was last dispatched.
        refused_by: Error messages of the executors that refused it, by instance id.
        hashes: `block_hashes` of the prompt.
        awaits_session: True if its session's executor is being looked up.
        session_address: The executor that ran its session last.
        session_wait_until: Monotonic seconds until which it waits for that executor; None = the wait has not begun.
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
