"""The account of fairness between tenants: tokens that each has been served, and what it holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from scalellm.services.scheduler.request import Request

OUTPUT_COST = 4
"""Cost of an output token, in prompt tokens: it takes a row of a step, which computes hundreds of prompt tokens."""

_IDLE_CREDIT = 4096
"""Most prompt tokens by which a returning tenant may begin behind the others: enough for a short request or two."""


@dataclass(slots=True, eq=False)
class TenantAccount:
    """One tenant.

    Attributes:
        weight: Its share of the service in relation to others.
        served: Cost of what it was served, divided by its weight. Only differences between tenants mean anything.
        num_open: Its requests that have not ended.
        num_rows: Rows of executors that they hold, or wait for on an executor.
    """

    weight: float = 1.0
    served: float = 0.0
    num_open: int = 0
    num_rows: int = 0

    def charge(self, cost: int) -> None:
        """Count a cost as served to the tenant."""
        self.served += cost / self.weight

    def rows_per_weight(self, more: int = 0) -> float:
        """Rows that it holds, and `more`, in relation to what it should."""
        return (self.num_rows + more) / self.weight


class TokenService:
    """The accounts of all tenants: a virtual token counter (Sheng et al. 2024, "Fairness in Serving LLMs").

    Who was served least goes first. A tenant that was away begins with what the least served one has, but for a little
    credit: it is owed nothing for the time in which it wanted nothing.
    """

    def __init__(self) -> None:
        self._active: dict[bytes, TenantAccount] = {}
        self._idle: dict[bytes, TenantAccount] = {}

    @property
    def num_active(self) -> int:
        """Tenants with requests that have not ended."""
        return len(self._active)

    def __contains__(self, tenant: bytes) -> bool:
        return tenant in self._active

    def __getitem__(self, tenant: bytes) -> TenantAccount:
        return self._active[tenant]

    def served(self, tenant: bytes) -> float:
        """Tokens that an active tenant has been served, divided by its weight."""
        return self._active[tenant].served

    def weight(self, tenant: bytes) -> float:
        """The share of an active tenant in relation to others."""
        return self._active[tenant].weight

    def enter(self, tenant: bytes, weight: float = 1.0) -> None:
        """A request came."""
        account = self._active.get(tenant)
        if account is None:
            account = self._idle.pop(tenant, None) or TenantAccount()
            if self._active:
                least = min(other.served for other in self._active.values())
                account.served = max(account.served, least - _IDLE_CREDIT / weight)
                self._forget_paid(least)
            self._active[tenant] = account
        account.weight = weight
        account.num_open += 1

    def leave(self, tenant: bytes) -> None:
        """A request ended."""
        account = self._active[tenant]
        account.num_open -= 1
        if not account.num_open:
            del self._active[tenant]
            self._idle[tenant] = account
            if not self._active:
                self._idle.clear()  # nobody is compared with anybody

    def richest(self) -> tuple[bytes, TenantAccount]:
        """The active tenant that holds most rows in relation to what it should."""
        return max(self._active.items(), key=lambda item: item[1].rows_per_weight())

    def goes_ahead(self, request: Request) -> bool:
        """True if a request may pass those of its priority that wait on an executor, of tenants that hold more."""
        if len(self._active) < 2:
            return False
        own, most = self._active[request.tenant], self.richest()[1]
        return own.rows_per_weight(request.num_rows) <= most.rows_per_weight()

    def on_dispatch(self, request: Request, *, is_first: bool) -> None:
        """A request was sent to an executor. Its prompt counts once, however often it moves."""
        account = self._active[request.tenant]
        account.num_rows += request.executor.num_rows
        if is_first:
            account.charge(request.executor.charged_tokens)

    def charge_outputs(self, requests: Iterable[Request]) -> None:
        """Count what requests emitted by now: only while tenants are compared, since each costs something."""
        for request in requests:
            executor = request.executor
            if num_new := request.client.progress.num_tokens - executor.num_charged:
                executor.num_charged += num_new
                self._active[request.tenant].charge(num_new * OUTPUT_COST)

    def take_rows(self, request: Request) -> None:
        """The rows of a request are its tenant's no more: it leaves its executor, or was asked to."""
        self._active[request.tenant].num_rows -= request.executor.num_rows
        request.executor.num_rows = 0

    def settle(self, request: Request) -> None:
        """A request is on no executor any more."""
        self.charge_outputs((request,))
        self.take_rows(request)

    def _forget_paid(self, least: float) -> None:
        """Forget those who would begin anew anyway, once they are many; least: what the least served tenant had."""
        if len(self._idle) > 64 + 2 * len(self._active):
            self._idle = {
                tenant: account
                for tenant, account in self._idle.items()
                if account.served > least - _IDLE_CREDIT / account.weight
            }
