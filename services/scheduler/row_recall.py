"""Chooses the requests that are taken back from an executor so that another tenant gets a row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scalellm.services.scheduler.replica_link import ReplicaLink
from scalellm.services.scheduler.request import Request
from scalellm.services.scheduler.token_service import OUTPUT_COST, TenantAccount, TokenService

_MIN_TOKENS = 4
"""Least number of tokens that a request emits after its dispatch before its row may be taken."""

_LEAD = 256 * OUTPUT_COST
"""Least lead, in cost of tokens served, of a tenant that loses a row to another, so that rows do not oscillate."""


class RowRecall:
    """Chooses the rows that are taken from one tenant for another.

    The tenant that holds most rows, relative to its weight, gives rows to a waiting tenant if it was served more and
    afterwards still holds at least as many rows as the other one. So rows move until they are shared equally and no
    further, and a tenant that got its share of tokens with fewer rows takes none.

    Args:
        service: The tenants' accounts.
    """

    def __init__(self, service: TokenService) -> None:
        self._service = service

    def find(self, request: Request, replicas: Iterable[ReplicaLink]) -> tuple[ReplicaLink, list[Request]] | None:
        """Choose an executor for a request that none would take, and the running requests to take back from it.

        Of the giving tenant's requests, the least urgent and then the newest are taken, so that its older ones end
        first. Returns None if the request has to wait.
        """
        tenant, giver = self._service.richest()
        taker = self._service[request.tenant]
        if tenant == request.tenant or not self.may_take(request, giver):
            return None
        best: tuple[ReplicaLink, list[Request]] | None = None
        for replica in replicas:
            if replica.takes_moves and not replica.is_suspect and _can_run(request, replica):
                victims = self._victims(request, replica, tenant)
                if not victims or giver.rows_per_weight(-_rows(victims)) < taker.rows_per_weight(request.num_rows):
                    continue
                if best is None or len(victims) < len(best[1]):
                    best = (replica, victims)
        return best

    def may_take(self, request: Request, giver: TenantAccount) -> bool:
        """True if a request's tenant is far enough behind `giver` in rows and in tokens served."""
        taker = self._service[request.tenant]
        return (
            giver.rows_per_weight(-1) >= taker.rows_per_weight(request.num_rows)
            and taker.served + _LEAD / taker.weight <= giver.served
        )

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
