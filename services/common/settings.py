"""Settings of a service: command line over environment over defaults, read once, frozen."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict

Port = Annotated[int, Field(ge=0, le=65535)]


def settings_config(service: str) -> SettingsConfigDict:
    """The way every service reads its settings: `--some-name` or `SCALELLM_<SERVICE>_SOME_NAME`."""
    return SettingsConfigDict(
        env_prefix=f"SCALELLM_{service.upper()}_",
        cli_prog_name=f"python -m services.{service}",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
    )


class ServiceSettings(BaseSettings):
    """What every service can be told."""

    model_config = SettingsConfigDict(use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 0
    """Port to listen on; 0 takes a free one."""
    metrics_port: Port | None = None
    """Port of the Prometheus endpoint; 0 takes a free one; unset: no endpoint."""
    announce: Path | None = None
    """Write host:port to this file once the service answers (and metrics=host:port on the next line)."""
    drain_limit_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """On SIGTERM, seconds that running requests are given to finish."""
    stall_limit_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds without progress, while there is work, after which the service calls itself unhealthy."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is logged."""


SettingsT = TypeVar("SettingsT", bound=BaseSettings)


def load_settings(cls: type[SettingsT], argv: Sequence[str] | None = None) -> SettingsT:
    """Read the settings of a service, or say in one line per mistake what is wrong with them and exit with 2."""
    try:
        return CliApp.run(cls, cli_args=list(sys.argv[1:] if argv is None else argv))
    except ValidationError as error:
        prefix = cls.model_config.get("env_prefix", "")
        for item in error.errors():
            name = ".".join(str(part) for part in item["loc"])
            flag = name.replace("_", "-")
            print(f"error: --{flag} ({prefix}{name.upper()}): {item['msg']}, got {item['input']!r}", file=sys.stderr)
        raise SystemExit(2) from None
