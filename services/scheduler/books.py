"""Counts of requests and tokens by how they ended."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import grpc

from scalellm.services.common.histogram import WAIT_SECONDS, Histogram
from scalellm.services.common.link import LinkTraffic

_OK = grpc.StatusCode.OK.value[0]
_ENDED_BY_CLIENT = (grpc.StatusCode.CANCELLED.value[0], grpc.StatusCode.DEADLINE_EXCEEDED.value[0])


def outcome_of(code: int) -> str:
    """Return the outcome of a google.rpc.Code: finished, cancelled (by the client or the deadline) or rejected."""
    if code == _OK:
        return "finished"
    return "cancelled" if code in _ENDED_BY_CLIENT else "rejected"


@dataclass
class Books:
    """Counts since start. They add up at every moment: accepted = finished + cancelled + rejected + open, where open
    requests are queued, running or being moved.

    Attributes:
        accepted: Submits that came.
        ended: Requests that ended, by google.rpc.Code.
        dispatched: Submits sent to executors.
        resubmitted: Requests moved from an executor that was lost or gave them back.
        recalled: Requests taken back from an executor so that another tenant got a row.
        prompt_tokens: Prompt tokens of the accepted requests.
        tokens_received: Tokens that came from executors.
        tokens_sent: Tokens that went to clients.
        tokens_dropped: Tokens of ended requests, and repeated tokens that the client already has. When no frame is
            under way, tokens_received = tokens_sent + tokens_dropped.
        queue_time: Seconds in the admission queue until the first dispatch.
        client_traffic: Messages and bytes on the links of clients.
    """

    accepted: int = 0
    ended: dict[int, int] = field(default_factory=lambda: {code.value[0]: 0 for code in grpc.StatusCode})
    dispatched: int = 0
    resubmitted: int = 0
    recalled: int = 0
    prompt_tokens: int = 0
    tokens_received: int = 0
    tokens_sent: int = 0
    tokens_dropped: int = 0
    queue_time: Histogram = field(default_factory=lambda: Histogram(WAIT_SECONDS))
    client_traffic: LinkTraffic = field(default_factory=LinkTraffic)

    @property
    def finished(self) -> int:
        """Requests that ended with OK."""
        return self.ended[_OK]

    @property
    def cancelled(self) -> int:
        """Requests that their client or their deadline ended."""
        return sum(self.ended[code] for code in _ENDED_BY_CLIENT)

    @property
    def rejected(self) -> int:
        """Requests that were refused or failed."""
        return sum(self.ended.values()) - self.finished - self.cancelled

    @property
    def num_open(self) -> int:
        """Requests that have not ended: queued, running, or being moved between executors."""
        return self.accepted - sum(self.ended.values())

    @classmethod
    def total(cls, all_books: Iterable[Books]) -> Books:
        """Return the sums of several Books."""
        total = cls()
        for books in all_books:
            for name in _COUNTS:
                setattr(total, name, getattr(total, name) + getattr(books, name))
            for code, count in books.ended.items():
                total.ended[code] = total.ended.get(code, 0) + count
            total.queue_time.add(books.queue_time)
            total.client_traffic.add(books.client_traffic)
        return total

    def count_end(self, code: int) -> None:
        """Count a request that ended with this google.rpc.Code."""
        self.ended[code] = self.ended.get(code, 0) + 1


_COUNTS = tuple(each.name for each in fields(Books) if each.type == "int")
