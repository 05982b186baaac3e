"""Chooses the requests that are taken back from an executor so that another tenant gets a row."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from scalellm.services.scheduler.books import Books
from scalellm.services.scheduler.replica_link import ReplicaLink
from scalellm.services.scheduler.request import Request
from scalellm.services.scheduler.token_service import OUTPUT_COST, TokenService

_MIN_TOKENS = 4
"""Least number of tokens that a request emits after its dispatch before its row may be taken."""

_LEAD = 256 * OUTPUT_COST
"""Least lead, in cost of tokens served, of a tenant that loses a row to another, so that rows do not oscillate."""


class RowRecall:
    """Chooses the rows that are taken from one tenant for another.

    Of the tenants that were served more than a waiting one, the one that holds most rows, relative to its weight, gives
    it rows, if it afterwards still holds at least as many as the other one. So rows move until they are shared equally
    and no further, and a tenant that got its share of tokens with fewer rows takes none.

    Args:
        service: The tenants' accounts.
        books: Counts the requests that are taken back.
    """

    def __init__(self, service: TokenService, books: Books) -> None:
        self._service = service
        self._books = books

    def take(
        self, request: Request, givers: Iterable[bytes], replicas: Collection[ReplicaLink]
    ) -> tuple[ReplicaLink, list[Request]] | None:
        """Choose an executor for a request that none would take, and the running requests in whose place it is sent
        there; subtract their rows from their tenant's.

        Of the giving tenant's requests, the least urgent and then the newest are taken, so that its older ones end
        first. Returns None if the request has to wait.

        Args:
            request: The request that waits.
            givers: The tenants, `TokenService.by_rows`.
            replicas: The executors that take requests.
        """
        taker = self._service[request.tenant]
        for tenant in givers:
            giver = self._service[tenant]
            if tenant == request.tenant or giver.rows_per_weight(-1) < taker.rows_per_weight(request.num_rows):
                return None  # those that come after it hold no more rows
            if taker.served + _LEAD / taker.weight > giver.served:
                continue
            if (found := self._find_rows_of(tenant, request, replicas)) is not None:
                for victim in found[1]:
                    self._service.take_rows(victim)
                self._books.recalled += len(found[1])
                return found
        return None

    def _find_rows_of(
        self, tenant: bytes, request: Request, replicas: Collection[ReplicaLink]
    ) -> tuple[ReplicaLink, list[Request]] | None:
        giver, taker = self._service[tenant], self._service[request.tenant]
        best: tuple[ReplicaLink, list[Request]] | None = None
        for replica in replicas:
            if replica.takes_moves and not replica.is_suspect and _can_run(request, replica):
                victims = self._victims(request, replica, tenant)
                if not victims or giver.rows_per_weight(-_rows(victims)) < taker.rows_per_weight(request.num_rows):
                    continue
                if best is None or len(victims) < len(best[1]):
                    best = (replica, victims)
        return best

    def _victims(self, request: Request, replica: ReplicaLink, tenant: bytes) -> list[Request]:
        """Return the requests of one tenant that have to leave an executor to make room; empty if that would
        not help.
        """
        candidates = [
            other
            for other in replica.running.values()
            if other.tenant == tenant and other.priority >= request.priority and not other.executor.is_recalled
        ]
        candidates.sort(key=lambda other: (-other.priority, -other.arrival))
        victims: list[Request] = []
        if replica.lacks_room(request):
            for other in candidates:
                if _rows(victims) >= request.num_rows:
                    break
                if other.num_new_tokens >= _MIN_TOKENS:
                    victims.append(other)
            if _rows(victims) < request.num_rows:
                return []
        # Requests that wait there hold the prompt tokens that the new request needs credit for.
        short = replica.num_tokens_short
        for other in candidates:
            if short <= 0:
                break
            if not other.num_new_tokens:
                victims.append(other)
                short -= other.executor.charged_tokens
        return victims if short <= 0 else []


def _rows(requests: Sequence[Request]) -> int:
    return sum(request.executor.num_rows for request in requests)


def _can_run(request: Request, replica: ReplicaLink) -> bool:
    return (
        request.max_len <= replica.max_model_len
        and replica.instance_id not in request.executor.refused_by
        and replica.can_run(request)
    )
