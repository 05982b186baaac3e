"""The accounts for fairness between tenants: tokens that each has been served, and rows that it holds."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from scalellm.services.scheduler.request import Request

OUTPUT_COST = 4
"""Cost of an output token, in prompt tokens: it takes a row of a step, which computes hundreds of prompt tokens."""

_IDLE_CREDIT = 4096
"""Most prompt tokens that a tenant without waiting requests may be behind those that wait: enough for a short request
or two."""


@dataclass(slots=True, eq=False)
class TenantAccount:
    """The account of one tenant.

    Attributes:
        weight: Its share of the service in relation to others.
        served: Cost of the tokens it was served, divided by its weight. Only differences between tenants mean anything.
        num_open: Its requests that have not ended.
        num_rows: Rows that its requests hold, or wait for, on executors.
    """

    weight: float = 1.0
    served: float = 0.0
    num_open: int = 0
    num_rows: int = 0

    def charge(self, cost: int) -> None:
        """Count a cost as served to the tenant."""
        self.served += cost / self.weight

    def rows_per_weight(self, more: int = 0) -> float:
        """Return the tenant's rows plus `more`, divided by its weight."""
        return (self.num_rows + more) / self.weight


class TokenService:
    """The accounts of all tenants: a virtual token counter (Sheng et al. 2024, "Fairness in Serving LLMs").

    The tenant that was served least goes first. A tenant without waiting requests starts from the count of the least
    served one that waits, less a small credit, so that it gains nothing from the time in which it asked for little. If
    none waits, it starts from the count of the one whose request was dispatched last.
    """

    def __init__(self) -> None:
        self._active: dict[bytes, TenantAccount] = {}
        self._idle: dict[bytes, TenantAccount] = {}
        self._last = TenantAccount()

    @property
    def num_active(self) -> int:
        """Number of tenants with requests that have not ended."""
        return len(self._active)

    def __contains__(self, tenant: bytes) -> bool:
        return tenant in self._active

    def __getitem__(self, tenant: bytes) -> TenantAccount:
        return self._active[tenant]

    def served(self, tenant: bytes) -> float:
        """Return the cost of the tokens that an active tenant has been served, divided by its weight."""
        return self._active[tenant].served

    def weight(self, tenant: bytes) -> float:
        """Return the weight of an active tenant."""
        return self._active[tenant].weight

    def enter(self, tenant: bytes, weight: float = 1.0, waiting: Collection[bytes] = ()) -> None:
        """Count a request of a tenant that arrived, and open the tenant's account if it was idle.

        Args:
            tenant: The tenant.
            weight: Its share of the service in relation to others.
            waiting: The tenants with requests in the queue.
        """
        account = self._active.get(tenant)
        if account is None:
            account = self._active[tenant] = self._idle.pop(tenant, TenantAccount())
        if tenant not in waiting:
            least = min((self._active[other].served for other in waiting), default=self._last.served)
            account.served = max(account.served, least - _IDLE_CREDIT / weight)
            self._forget_paid(least)
        account.weight = weight
        account.num_open += 1

    def leave(self, tenant: bytes) -> None:
        """Count a request of a tenant that ended, and close the account after its last one."""
        account = self._active[tenant]
        account.num_open -= 1
        if not account.num_open:
            del self._active[tenant]
            self._idle[tenant] = account
            if not self._active:
                self._idle.clear()  # with no active tenant there is nobody to compare them with
                self._last = TenantAccount()

    def by_rows(self) -> list[bytes]:
        """Return the active tenants, those that hold most rows relative to their weights first."""
        return sorted(self._active, key=lambda tenant: -self._active[tenant].rows_per_weight())

    def goes_ahead(self, request: Request) -> bool:
        """True if a request may pass waiting requests of equal priority on its executor, since other tenants
        hold more.
        """
        if len(self._active) < 2:
            return False
        rows = self._active[request.tenant].rows_per_weight(request.num_rows)
        return any(account.rows_per_weight() >= rows for account in self._active.values())

    def on_dispatch(self, request: Request, *, is_first: bool) -> None:
        """Count the rows of a dispatched request, and at the first dispatch its prompt tokens."""
        account = self._active[request.tenant]
        account.num_rows += request.executor.num_rows
        self._last = account
        if is_first:
            account.charge(request.executor.charged_tokens)

    def charge_outputs(self, requests: Iterable[Request]) -> None:
        """Charge the tenants for their requests' new output tokens. Called only while tenants compete, as it costs
        time.
        """
        for request in requests:
            executor = request.executor
            if num_new := request.client.progress.num_tokens - executor.num_charged:
                executor.num_charged += num_new
                self._active[request.tenant].charge(num_new * OUTPUT_COST)

    def take_rows(self, request: Request) -> None:
        """Subtract the rows of a request that leaves its executor, or was asked to, from its tenant's."""
        self._active[request.tenant].num_rows -= request.executor.num_rows
        request.executor.num_rows = 0

    def take_ended_rows(self, request: Request) -> None:
        """Subtract the rows of a request's samples that have ended, while the others run, from its tenant's."""
        if (ended := request.executor.num_rows - request.num_rows) > 0:
            self._active[request.tenant].num_rows -= ended
            request.executor.num_rows -= ended

    def settle(self, request: Request) -> None:
        """Settle a request that is no longer on an executor: charge its output tokens and subtract its rows."""
        self.charge_outputs((request,))
        self.take_rows(request)

    def _forget_paid(self, least: float) -> None:
        """Once there are many idle accounts, drop those that would start anew anyway; least: count of the
        least served.
        """
        if len(self._idle) > 64 + 2 * len(self._active):
            self._idle = {
                tenant: account
                for tenant, account in self._idle.items()
                if account.served > least - _IDLE_CREDIT / account.weight
            }
