"""The common part of `python -m scalellm.services.<name>`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from typing import NoReturn, TypeVar

import uvloop

from scalellm.services.common.access import warn_if_exposed
from scalellm.services.common.lifecycle import StartError
from scalellm.services.common.logs import configure_logging, tell_errors
from scalellm.services.common.settings import ServiceSettings, load_settings

SettingsT = TypeVar("SettingsT", bound=ServiceSettings)


def run_service(
    name: str, settings_class: type[SettingsT], serve: Callable[[SettingsT], Coroutine[None, None, None]]
) -> NoReturn:
    """Read the settings, serve until a signal, and exit: with 0 after a drain, with 1 and one line if it
    cannot start.
    """
    settings = load_settings(settings_class)
    configure_logging(name, settings)
    warn_if_exposed(settings)
    try:
        uvloop.run(serve(settings))
    except StartError as error:
        tell_errors(name, settings.log_format, [str(error)])
        sys.exit(1)
    sys.exit(0)
