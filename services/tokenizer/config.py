"""Settings of the tokenizer service."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from scalellm.services.common.addresses import split_addresses
from scalellm.services.common.served_models import ServedModel, read_models
from scalellm.services.common.settings import LinkingSettings, Port, settings_config


def _default_workers() -> int:
    # Scheduler, executor and clients want cores, too.
    return max(1, min(8, len(os.sched_getaffinity(0)) // 2))


class TokenizerSettings(LinkingSettings):
    """Settings of the tokenizer service, which takes prompts and chats, streams text back and keeps sessions."""

    model_config = settings_config("tokenizer")

    port: Port = 50051
    """Port to listen on; 0 takes a free one."""
    http: bool = True
    """Also serve HTTP: the APIs of OpenAI and Anthropic, with the same keys."""
    http_port: Port = 8000
    """Port for HTTP; 0 takes a free one."""
    http_strict: bool = False
    """Refuse unknown fields of HTTP requests, which are otherwise ignored."""
    http_metrics: bool = False
    """Also serve /metrics on the HTTP port: to everybody who reaches it, or, if there are keys, to admins. Needs
    --metrics-port."""
    playground: bool = True
    """Serve web pages on the HTTP port: / to try the model, /live for the current state of the services (GET /v1/fleet,
    for everybody who reaches the port, or, if there are keys, for admins)."""
    http_cors_origins: str = ""
    """Origins whose web pages may call the HTTP port, comma-separated, such as https://chat.example.org; * for all.
    Unset: none."""
    scheduler: str = "127.0.0.1:50052"
    """Schedulers, host:port,host:port,...; a name with several addresses stands for all of them."""
    scheduler_resolve_s: Annotated[float, Field(gt=0)] = 2.0
    """Seconds between look-ups of schedulers' host names."""
    scheduler_outage_s: Annotated[float, Field(ge=0, le=1e6)] = 60.0
    """Seconds for which a running request that lost its scheduler waits for one before it ends with UNAVAILABLE."""
    model: str = "smollm2-135m-instruct"
    """A name from `scalellm models list`, a pulled repository of the Hugging Face Hub (org/name, org/name:Q4_K_M),
    a directory with a model, or a .gguf file; only its tokenizer is read. Several may be given, comma-separated; the
    first one is the default. NAME=MODEL sets the name of a model, which must be the same as at its executors."""
    model_name: str = ""
    """Name under which the model is served, if there is only one; default: its own, or that of the directory or
    file."""
    aliases: Path | None = None
    """TOML file with aliases of models; several models share the requests of an alias by weights, such as
    chat = {small = 95, small-next = 5}. Read again when it changes. Unset: there are no aliases."""
    generation_config: Literal["auto", "none"] = "auto"
    """Defaults of sampling parameters that a request does not set. auto: those of the model's generation_config.json.
    none: temperature 1 without filters or penalties, for all models."""
    home: Path = Path.home() / ".cache" / "scalellm"
    """Folder into which `scalellm models pull` puts models."""
    workers: Annotated[int, Field(ge=1, le=256)] = Field(default_factory=_default_workers)
    """Processes that share the port; default: half the cores, at most 8."""
    max_worker_restarts: Annotated[int, Field(ge=0)] = 3
    """Crashes of one worker within a minute after which the service gives up."""
    redis_url: str | None = Field(default=None, repr=False)
    """Redis that keeps sessions: redis://host:port/db, unix://path or redis+sentinel://host,host/name; unset: no
    sessions."""
    session_ttl_s: Annotated[float, Field(ge=1, le=1e9)] = 3600.0
    """Seconds for which a session is kept after its last turn."""
    max_session_bytes: Annotated[int, Field(ge=1, le=2**53)] = 128 * 2**20
    """Most bytes of one tenant's sessions in Redis, unless the tenant has a limit of its own (session_bytes);
    default: half of the Redis that `scalellm up` and Compose start."""
    kept_ttl_s: Annotated[float, Field(ge=1, le=1e9)] = 600.0
    """Seconds for which an answer that was begun with ON_DISCONNECT_KEEP can be resumed after its last token."""
    max_kept_bytes: Annotated[int, Field(ge=1, le=2**53)] = 32 * 2**20
    """Most bytes of one tenant's kept answers in Redis, unless the tenant has a limit of its own (kept_bytes)."""
    salt_secret: str = Field(default="", repr=False)
    """Key from which the tenants' prefix-cache salts are derived. All tokenizer services of a deployment need the same,
    or their requests share no cached prefixes; unset: a public constant, which separates tenants but is no secret."""
    log_requests: bool = False
    """Log a line at the end of every request: status, tokens, latency, executor. Unset: only for failures of the
    service."""
    log_prompts: bool = False
    """Add the prompt to those lines, up to 4096 characters of it, so that everybody who can read the log can read
    users' prompts; needs --log-requests."""
    trace_sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of traced requests, among those without a traceparent. A traceparent decides by itself."""

    @field_validator("log_prompts")
    @classmethod
    def _check_log_prompts(cls, value: bool, info: ValidationInfo) -> bool:
        if value and not info.data.get("log_requests"):
            raise ValueError("needs --log-requests: it adds the prompts to those log lines")
        return value

    @field_validator("http_metrics")
    @classmethod
    def _check_http_metrics(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("metrics_port") is None:
            raise ValueError("needs --metrics-port, without which nothing is counted")
        return value

    @field_validator("model_name")
    @classmethod
    def _check_models(cls, value: str, info: ValidationInfo) -> str:
        read_models(info.data["model"], value)
        return value

    @field_validator("scheduler")
    @classmethod
    def _check_schedulers(cls, value: str) -> str:
        if not split_addresses(value):
            raise ValueError("must name a scheduler as host:port")
        return value

    @property
    def cors_origins(self) -> tuple[str, ...]:
        """The entries of `http_cors_origins`."""
        return tuple(filter(None, (origin.strip() for origin in self.http_cors_origins.split(","))))

    @property
    def scheduler_addresses(self) -> tuple[str, ...]:
        """The addresses in `scheduler`."""
        return split_addresses(self.scheduler)

    @property
    def served_models(self) -> tuple[ServedModel, ...]:
        """The models, the default first."""
        return read_models(self.model, self.model_name)

    @property
    def served_name(self) -> str:
        """The name of the default model, as clients see it."""
        return self.served_models[0].name
