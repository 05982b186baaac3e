"""Settings of a service: command line over environment over defaults, read once, frozen."""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

from scalellm.services.common.addresses import bare_host, split_address
from scalellm.services.common.link.dialer import LinkDialer
from scalellm.services.common.logs import LogFormat, tell_errors
from scalellm.services.common.similar_names import did_you_mean
from scalellm.services.common.tls import TlsFiles

Port = Annotated[int, Field(ge=0, le=65535)]
Host = Annotated[str, AfterValidator(bare_host)]

_ENDPOINT = re.compile(r"https?://([^/\s]+)/?")


def settings_config(service: str) -> SettingsConfigDict:
    """Return pydantic's configuration for a service's settings: `--some-name` or `SCALELLM_<SERVICE>_SOME_NAME`."""
    return SettingsConfigDict(
        env_prefix=f"SCALELLM_{service.upper()}_",
        cli_prog_name=f"python -m scalellm.services.{service}",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
    )


class ServiceSettings(BaseSettings):
    """Settings of every service."""

    # pydantic builds a class when it is first used, and so never builds base classes.
    model_config = SettingsConfigDict(defer_build=True)

    host: Host = "127.0.0.1"
    """Address to listen on: a name or an IP address; 0.0.0.0 or :: for all."""
    port: Port = 0
    """Port to listen on; 0 takes a free one."""
    metrics_port: Port | None = None
    """Port of the Prometheus endpoint; 0 takes a free one; unset: no endpoint."""
    metrics_host: Host = "127.0.0.1"
    """Address on which the Prometheus endpoint listens, independent of --host; 0.0.0.0 or :: for all."""
    metrics_tls_cert: Path | None = None
    """PEM file with the certificate of the Prometheus endpoint; unset: plain HTTP. These files are read again when they
    change."""
    metrics_tls_key: Path | None = None
    """PEM file with the private key of --metrics-tls-cert."""
    metrics_tls_ca: Path | None = None
    """PEM file with the authorities for clients of the Prometheus endpoint, which then need a certificate of one of
    them."""
    vllm_metrics: bool = False
    """Also export metrics under vLLM's names, for dashboards, autoscalers and gateways that read those."""
    tls_cert: Path | None = None
    """PEM file with the service's certificate, followed by intermediate ones; unset: plaintext. These files are read
    again when they change."""
    tls_key: Path | None = None
    """PEM file with the private key of --tls-cert."""
    tls_ca: Path | None = None
    """PEM file with the authorities for clients, which then need a certificate of one of them, even for health
    checks."""
    max_streams_per_connection: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1024
    """Most open calls per connection; gRPC clients hold further calls back until others end."""
    max_connections: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Most connections per process; more are closed at once. Unset: as many as its limit of open files allows."""
    max_connection_age_s: Annotated[float, Field(ge=1, le=1e6)] | None = None
    """Approximate seconds after which a client is asked to reconnect, so that clients spread over processes that were
    added; open calls go on. Unset: never."""
    api_keys: Path | None = None
    """TOML file with the accepted API keys, see `scalellm keys`; read again when it changes. Unset: no keys are
    required."""
    link_token_file: Path | None = None
    """File with the secret that the services of a deployment share. It is required for opening a link, and for all
    calls but health checks of an internal service, and is sent on the links that this service opens."""
    announce: Path | None = None
    """Write host:port to this file once the service answers (and metrics=host:port on the next line)."""
    drain_limit_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """Seconds that running requests have to finish after SIGTERM. An executor's remaining requests go on elsewhere."""
    stall_limit_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds without progress, while there is work, after which the service reports that it is unhealthy, services
    linked to it consider it dead, and an executor restarts its engine. Must be longer than the longest step."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe level that is logged."""
    log_format: LogFormat = "text"
    """text: lines for people. json: one object per line, for collectors."""
    otlp_endpoint: str | None = None
    """OpenTelemetry collector to which traces are sent by OTLP/gRPC, such as http://127.0.0.1:4317; https:// for
    TLS."""
    trace_file: Path | None = None
    """File to which traces are appended, as lines of OTLP's JSON; services may share it."""

    @field_validator("otlp_endpoint")
    @classmethod
    def _check_endpoint(cls, value: str | None) -> str | None:
        if value is not None:
            must = "must be http://host:port or https://host:port"
            if (endpoint := _ENDPOINT.fullmatch(value)) is None:
                raise ValueError(must)
            try:
                split_address(endpoint[1])
            except ValueError as error:
                raise ValueError(f"{must}: {error}") from None
        return value

    @property
    def is_tracing(self) -> bool:
        """True if spans are recorded."""
        return self.otlp_endpoint is not None or self.trace_file is not None

    @property
    def connection_options(self) -> tuple[tuple[str, int], ...]:
        """The limits on connections, as gRPC's options."""
        options = [("grpc.max_concurrent_streams", self.max_streams_per_connection)]
        if self.max_connections is not None:
            options.append(("grpc.max_allowed_incoming_connections", self.max_connections))
        if self.max_connection_age_s is not None:
            options.append(("grpc.max_connection_age_ms", int(self.max_connection_age_s * 1e3)))
        return tuple(options)

    @property
    def tls_files(self) -> TlsFiles:
        """The TLS files of the listener."""
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_ca)

    @property
    def metrics_tls_files(self) -> TlsFiles:
        """The TLS files of the Prometheus endpoint."""
        return TlsFiles(self.metrics_tls_cert, self.metrics_tls_key, self.metrics_tls_ca, option="--metrics-tls")


class LinkedSettings(ServiceSettings):
    """Settings of a service that gets its work from other services."""

    lease_s: Annotated[float, Field(ge=0.1, le=3600)] = 30.0
    """Seconds without a sign of life after which the requests of a client service are ended, because it hangs or its
    connection is dead. Clients send one six times within that time."""


class LinkingSettings(ServiceSettings):
    """Settings of a service that sends work to other services."""

    link_tls_ca: Path | None = None
    """PEM file with the authorities of the services that this one connects to; unset: plaintext."""
    link_tls_cert: Path | None = None
    """PEM file with this service's certificate as a client of these services, if they require one."""
    link_tls_key: Path | None = None
    """PEM file with the private key of --link-tls-cert."""
    link_tls_name: str = ""
    """Name that these services' certificates must have; default: for a scheduler, its host as it is listed; for an
    executor, its IP address, even if it is listed under a name."""

    @property
    def dialer(self) -> LinkDialer:
        """The dialer that opens links with these settings."""
        files = TlsFiles(self.link_tls_cert, self.link_tls_key, self.link_tls_ca, option="--link-tls")
        return LinkDialer(files, self.link_tls_name, self.link_token_file)


SettingsT = TypeVar("SettingsT", bound=BaseSettings)


def describe(cls: type[BaseSettings]) -> None:
    """Set each setting's description, which `--help` and the reference pages show, to the docstring below it.

    Pydantic's `use_attribute_docstrings` does the same whenever a class is made, but reading the source took a tenth of
    the CPU time of a service's start.
    """
    for base in reversed(cls.__mro__[: cls.__mro__.index(BaseSettings)]):
        (definition,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(definition, ast.ClassDef)
        for statement, next_one in pairwise(definition.body):
            match statement, next_one:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    cls.model_fields[name].description = inspect.cleandoc(text)


def load_settings(cls: type[SettingsT], argv: Sequence[str] | None = None) -> SettingsT:
    """Read the settings of a service. If they are invalid, print one line per error and exit with 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    prefix = cls.model_config.get("env_prefix", "")
    if not {"-h", "--help"}.isdisjoint(arguments):
        describe(cls)
    try:
        _check_variables(cls, prefix)
        return CliApp.run(cls, cli_args=arguments, cli_exit_on_error=False)
    except SettingsError as error:
        errors = [f"{error}; --help lists all options".removeprefix("error parsing CLI: ")]
    except ValidationError as error:
        errors = []
        for item in error.errors():
            name = ".".join(str(part) for part in item["loc"])
            flag = name.replace("_", "-")
            errors.append(f"--{flag} ({prefix}{name.upper()}): {item['msg']}, got {item['input']!r}")
    tell_errors(prefix.removeprefix("SCALELLM_").rstrip("_").lower(), _log_format(cls, arguments), errors)
    raise SystemExit(2) from None


def _check_variables(cls: type[BaseSettings], prefix: str) -> None:
    """Raise SettingsError for an environment variable with the service's prefix that is not a setting, as it is
    misspelt.
    """
    known = {f"{prefix}{name.upper()}" for name in cls.model_fields}
    for name in sorted(os.environ):
        if name.upper().startswith(prefix) and name.upper() not in known:
            raise SettingsError(f"{name} is not a setting of this service{did_you_mean(name, known)}")


def _log_format(cls: type[BaseSettings], arguments: list[str]) -> LogFormat:
    """Return the log format of a service whose settings are invalid, from its arguments and environment."""

    class LogSettings(BaseSettings):
        model_config = SettingsConfigDict(
            env_prefix=cls.model_config.get("env_prefix", ""),
            cli_kebab_case=True,
            cli_ignore_unknown_args=True,
            cli_exit_on_error=False,
            extra="ignore",
        )
        log_format: LogFormat = "text"

    try:
        return CliApp.run(LogSettings, cli_args=arguments).log_format
    except (SettingsError, ValidationError):
        return "text"
