"""The options that say how tokens are drawn: one for each field of the table that holds one value."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from scalellm.services.common.field_rules import SAMPLING, NumberRule


def with_sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options, as its argument `sampling`: the values that were set, by name.

    They stand in its help where `sampling` stands among its arguments.
    """

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        values = {name: arguments.pop(name) for name in SAMPLING}
        command(**arguments, sampling={name: value for name, value in values.items() if value is not None})

    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name == "sampling":
            parameters.extend(map(_parameter, SAMPLING.values()))
        else:
            parameters.append(parameter.replace(annotation=hints[name]))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def help_of(rule: NumberRule) -> str:
    """Return what an option's help says: what the field does, its range and its default."""
    default = ", unless the model has its own" if rule.is_model_default else ""
    return f"{rule.meaning} {rule.limits[:1].upper()}{rule.limits[1:]}{default}."


def _parameter(rule: NumberRule) -> inspect.Parameter:
    option = f"--{rule.name.replace('_', '-')}"
    names = (option, f"-{rule.name}") if len(rule.name) == 1 else (option,)
    metavar = None if rule.kind is bool else "NUMBER"
    shown = typer.Option(*names, help=help_of(rule), metavar=metavar, show_default=False)
    return inspect.Parameter(
        rule.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[rule.kind | None, shown]
    )
