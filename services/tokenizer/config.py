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
    """Serve HTTP, too: OpenAI's API and its like, by the same keys."""
    http_port: Port = 8000
    """Port for HTTP; 0 takes a free one."""
    http_strict: bool = False
    """Refuse fields of HTTP requests that are not known, which are otherwise left alone."""
    http_metrics: bool = False
    """Serve /metrics on the HTTP port, too: to everybody who reaches it, or with keys to those of admins. Needs
    --metrics-port."""
    playground: bool = True
    """Serve web pages on the HTTP port: / to try the model, /live for what the services do just now (GET /v1/fleet, for
    everybody who reaches the port, or with keys for admins)."""
    http_cors_origins: str = ""
    """Origins whose web pages may call by HTTP, with commas in between, such as https://chat.example.org; * for all.
    Unset: none."""
    scheduler: str = "127.0.0.1:50052"
    """Schedulers, host:port,host:port,...; a name with several addresses stands for all."""
    scheduler_resolve_s: Annotated[float, Field(gt=0)] = 2.0
    """Seconds between look-ups of scheduler names that are not plain addresses."""
    scheduler_outage_s: Annotated[float, Field(ge=0, le=1e6)] = 60.0
    """Seconds for which a running request whose scheduler was lost waits for one, before it ends UNAVAILABLE."""
    model: str = "smollm2-135m-instruct"
    """A name from `scalellm models list`, a pulled repository of the Hugging Face Hub (org/name, org/name:Q4_K_M),
    a directory with a model, or a .gguf file; only its tokenizer is read. Several, with commas in between, are served
    side by side, the first one where a request names none; NAME=MODEL gives one the name that its executors have."""
    model_name: str = ""
    """Name under which the model is served, if it is one; default: its own, or that of the directory or file."""
    aliases: Path | None = None
    """TOML file with names that stand for models, several of which share the requests of one name by weights, such as
    chat = {small = 95, small-next = 5}; read again when it changes. Unset: there are none."""
    generation_config: Literal["auto", "none"] = "auto"
    """auto: how tokens are drawn, where a request does not say, is what the model's generation_config.json says.
    none: temperature 1 and nothing else, whatever the model."""
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
    """Seconds after its last turn for which a session is kept."""
    max_session_bytes: Annotated[int, Field(ge=1, le=2**53)] = 128 * 2**20
    """Most bytes that the sessions of one tenant hold in Redis, unless its limits (session_bytes) say otherwise;
    default: half of the Redis that `scalellm up` and Compose start."""
    kept_ttl_s: Annotated[float, Field(ge=1, le=1e9)] = 600.0
    """Seconds for which an answer that was begun with ON_DISCONNECT_KEEP can be resumed after its last token."""
    max_kept_bytes: Annotated[int, Field(ge=1, le=2**53)] = 32 * 2**20
    """Most bytes that the kept answers of one tenant hold in Redis, unless its limits (kept_bytes) say otherwise."""
    salt_secret: str = Field(default="", repr=False)
    """Key from which the tenants' prefix-cache salts are derived. All edges of one line need the same, or their
    requests share no cached prefixes; unset: a constant, which keeps tenants apart but is known to readers of the
    source."""
    log_requests: bool = False
    """Log a line at the end of every request: status, tokens, latency, executor. Unset: only of failed ones."""
    log_prompts: bool = False
    """Add the prompt to those lines, up to 4096 characters of it. Whoever can read the log can then read what users
    write; needs --log-requests."""
    trace_sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of requests that are traced, of those that come without a traceparent: whoever sends one has decided."""

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
        """The origins whose pages may call."""
        return tuple(filter(None, (origin.strip() for origin in self.http_cors_origins.split(","))))

    @property
    def scheduler_addresses(self) -> tuple[str, ...]:
        """The entries of `scheduler`."""
        return split_addresses(self.scheduler)

    @property
    def served_models(self) -> tuple[ServedModel, ...]:
        """The models, the default first."""
        return read_models(self.model, self.model_name)

    @property
    def served_name(self) -> str:
        """The name of the default model, as clients see it."""
        return self.served_models[0].name
