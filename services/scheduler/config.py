"""The settings of the scheduler service."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from scalellm.services.common.addresses import split_addresses
from scalellm.services.common.settings import LinkedSettings, LinkingSettings, Port, settings_config
from scalellm.services.scheduler.pools import PoolPolicy


class SchedulerSettings(LinkedSettings, LinkingSettings):
    """Settings of the scheduler."""

    model_config = settings_config("scheduler")

    port: Port = 50052
    """Port to listen on; 0 takes a free one."""
    executors: str = ""
    """Executors, host:port,host:port,...; a name with several addresses stands for all of them. AddExecutor adds
    more."""
    redis_url: str | None = Field(default=None, repr=False)
    """Redis that keeps session affinity across restarts: redis://..., unix://... or redis+sentinel://...; unset: it is
    kept in memory only."""
    session_ttl_s: Annotated[float, Field(ge=1)] = 3600.0
    """Seconds after its last request for which a session's executor is remembered in Redis."""
    max_queued_requests: Annotated[int, Field(ge=1)] = 4096
    """Requests that may wait for admission; more are refused with RESOURCE_EXHAUSTED."""
    max_queued_tokens: Annotated[int, Field(ge=1)] = 4_194_304
    """Prompt tokens that may wait for admission; more are refused with RESOURCE_EXHAUSTED."""
    executor_grace_s: Annotated[float, Field(ge=0)] = 30.0
    """Seconds for which requests wait while no executor answers; long enough for a supervisor to restart one."""
    engine_restart_limit_s: Annotated[float, Field(ge=0)] = 120.0
    """Seconds for which requests wait while an executor answers but none is ready; long enough to load its model."""
    pool_policy: PoolPolicy = "measured"
    """Choice among executors with different numbers of devices for new requests. measured: those with the lowest
    predicted time to the last token. fixed: those with most devices below 64 requests, those with fewest from 64 on.
    off: any."""
    executor_resolve_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds between look-ups of executors' host names."""
    max_executor_deaths: Annotated[int, Field(ge=1)] = 2
    """Engine deaths in a row, without a token in between, after which a request counts as their cause and is ended."""
    session_wait_s: Annotated[float, Field(ge=0)] = 0.25
    """Seconds that a request waits for its session's executor while only others would take it."""
    deadline_backstop_s: Annotated[float, Field(gt=0)] = 1.0
    """Seconds past its deadline after which the scheduler ends a request if its executor has not."""

    @field_validator("executors")
    @classmethod
    def _check_executors(cls, value: str) -> str:
        split_addresses(value)
        return value

    @property
    def executor_addresses(self) -> tuple[str, ...]:
        """The addresses in `executors`."""
        return split_addresses(self.executors)
