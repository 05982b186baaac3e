"""Settings of the services that `scalellm up` starts: from a TOML file and the environment, and which there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from scalellm.cli.context import CliError, ExitCode
from scalellm.services.common.similar_names import did_you_mean

if TYPE_CHECKING:
    from scalellm.services.common.settings import ServiceSettings

_MANAGED = frozenset({"host", "port", "http_port", "metrics_port", "announce", "model", "model_name", "home", "engine"})
"""Settings that `up` gives to services itself, by options of its own."""

_COMMAND_LINE = (
    *("HOME", "INSTANCE", "ADDRESS", "API_KEY", "TLS", "KEEP_ENVIRONMENT", "SERVICE_LOG"),
    *(f"{prefix}TLS_{end}" for prefix in ("", "METRICS_", "HEALTH_") for end in ("CA", "CERT", "KEY", "NAME")),
)
_COMPOSE = (
    *("LISTEN", "HTTP_LISTEN", "MODEL", "MODELS", "EXECUTORS", "TAG", "PIDS", "GPU", "STOP_GRACE"),
    *("SECRETS", "EDGE_NAME", "SECOND_MODEL", "SECOND_EXECUTORS"),
    *(f"MEMORY_{name}" for name in ("TOKENIZER", "SCHEDULER", "EXECUTOR", "REDIS", "MODELS", "PROMETHEUS", "GRAFANA")),
    *(f"{name}_IMAGE" for name in ("PYTHON", "REDIS", "PROMETHEUS", "GRAFANA")),
    *(f"{name}_{what}" for name in ("PROMETHEUS", "GRAFANA") for what in ("LISTEN", "PASSWORD")),
)
"""Variables of compose.yaml and the files beside it: set in the same shell, they are no mistake."""

_TESTS = "SCALELLM_TEST_"


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a service.

    Attributes:
        service: The service.
        name: As in the TOML file.
        variable: The environment variable that sets it.
        text: Its description.
        default: As in the TOML file; None: none.
        is_secret: Its value is not to be shown.
    """

    service: str
    name: str
    variable: str
    text: str
    default: Any
    is_secret: bool


def all_settings() -> list[Setting]:
    """Return the settings of all services, without those that options of `up` set."""
    from scalellm.services.common.settings import describe  # only here, as the services

    services = _services()
    for settings in services.values():
        describe(settings)
    return [
        Setting(
            service,
            name,
            f"SCALELLM_{service.upper()}_{name.upper()}",
            " ".join((field.description or "").split()),
            None if field.is_required() else field.get_default(call_default_factory=True),
            not field.repr,
        )
        for service, settings in services.items()
        for name, field in settings.model_fields.items()
        if name not in _MANAGED
    ]


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what a file sets: options of `up` by name, and variables of the services. Raises CliError.

    An empty text sets nothing, as an empty variable does.
    """
    # Only here, as the services: importing them takes longer than most commands.
    from scalellm.services.common.reload import ConfigFileError
    from scalellm.services.common.toml_file import read_toml

    try:
        document = read_toml(path, "--config", dict)
    except ConfigFileError as error:
        raise CliError(str(error), ExitCode.USAGE) from None
    known = {(setting.service, setting.name): setting.variable for setting in all_settings()}
    options: dict[str, Any] = {}
    variables: dict[str, str] = {}
    for table, values in document.items():
        if table not in ("up", *_services()) or not isinstance(values, Mapping):
            raise CliError(f"--config: {path}: {_unknown(table, ('up', *_services()), 'a table')}", ExitCode.USAGE)
        for key, value in values.items():
            name = key.replace("-", "_")
            if table == "up":
                if value != "":
                    options[name] = value
            elif (table, name) in known:
                if value != "":
                    variables[known[table, name]] = _text(value, f"{path}: {table}.{key}")
            else:
                names = [name for service, name in known if service == table]
                raise CliError(f"--config: {path}: {table}.{_unknown(key, names, 'a setting')}", ExitCode.USAGE)
    return options, variables


def check_options(given: Mapping[str, Any], known: Mapping[str, Any], path: Path) -> None:
    """Raise CliError for an option of `up` in a file that there is not."""
    for name in given:
        if name not in known:
            raise CliError(f"--config: {path}: up.{_unknown(name, known, 'an option of scalellm up')}", ExitCode.USAGE)


def check_variables(variables: Mapping[str, str]) -> None:
    """Raise CliError for a SCALELLM_ variable that nothing reads: most likely it is another one, misspelt."""
    known = [f"SCALELLM_{name}" for name in (*_COMMAND_LINE, *_COMPOSE)]
    for service, settings in _services().items():
        known += [f"SCALELLM_{service.upper()}_{name.upper()}" for name in settings.model_fields]
    for name in sorted(variables):
        if name.startswith("SCALELLM_") and name not in known and not name.startswith(_TESTS):
            raise CliError(_unknown(name, known, "a variable that anything reads"), ExitCode.USAGE)


def check_values(variables: Mapping[str, str], sources: Mapping[str, str]) -> None:
    """Raise CliError for a value that a service would refuse, before anything is started.

    Args:
        variables: Variables that are set.
        sources: Name of each variable that was set by an option.
    """
    from pydantic import TypeAdapter, ValidationError  # only here: importing it takes longer than most commands

    for service, settings in _services().items():
        for name, field in settings.model_fields.items():
            variable = f"SCALELLM_{service.upper()}_{name.upper()}"
            if not (value := variables.get(variable)):
                continue
            kind: Any = field.annotation
            try:
                TypeAdapter(Annotated[kind, *field.metadata] if field.metadata else kind).validate_python(value)
            except ValidationError as error:
                got = f", got {value!r}" if field.repr else ""
                told = f"{sources.get(variable, variable)}: {error.errors()[0]['msg']}{got}"
                raise CliError(told, ExitCode.USAGE) from None


def option_lines(params: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the table of `up`: its options, those that a file gives set, the others as comments."""
    yield "# What is set to an empty text is not set."
    yield ""
    yield "# Options of `scalellm up`; those on its command line go before these."
    yield "[up]"
    for name, param in params.items():
        yield f"# {getattr(param, 'help', None) or ''}".rstrip()
        default = param.default() if callable(param.default) else param.default
        yield f"{name} = {_toml(given[name])}" if name in given else f"# {name} = {_toml(default)}"


def document(variables: Mapping[str, str], sources: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of a TOML file with all settings: those of `variables` set, the others as comments.

    Args:
        variables: Variables that are set.
        sources: Source of each of them.
    """
    service = ""
    for setting in all_settings():
        if setting.service != service:
            service = setting.service
            yield ""
            yield f"[{service}]"
        yield f"# {setting.text}"
        if setting.variable not in variables:
            yield f"# {setting.name} = {_toml(setting.default)}"
        elif setting.is_secret:
            yield f"# {setting.name} is set ({sources[setting.variable]}) and not shown"
        else:
            yield f"{setting.name} = {_toml(variables[setting.variable])}  # {sources[setting.variable]}"


def _services() -> Mapping[str, type[ServiceSettings]]:
    # Only where they are needed: they take a while to import.
    from scalellm.services.executor.config import ExecutorSettings
    from scalellm.services.scheduler.config import SchedulerSettings
    from scalellm.services.tokenizer.config import TokenizerSettings

    return {"executor": ExecutorSettings, "scheduler": SchedulerSettings, "tokenizer": TokenizerSettings}


def _unknown(name: str, known: Any, what: str) -> str:
    hint = did_you_mean(name, known) or "; `scalellm config show` lists those there are"
    return f"{name} is not {what}{hint}"


def _text(value: Any, where: str) -> str:
    """The value of a variable. Raises CliError."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise CliError(f"--config: {where}: must be a text, a number, true or false", ExitCode.USAGE)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, Mapping):
        value = ",".join(f"{name}={form}" for name, form in value.items())
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if value is None:
        value = ""
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
