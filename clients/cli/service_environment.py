"""Environment variables that `scalellm up` gives to the services."""

from __future__ import annotations

from collections.abc import Mapping

import typer

from scalellm.cli.config import variables_of
from scalellm.cli.context import CliContext, CliError, ExitCode
from scalellm.cli.service_settings import check_values, check_variables
from scalellm.services.common.new_file import write_new

_API_KEYS = "SCALELLM_TOKENIZER_API_KEYS"
_SETTING_OPTIONS = {
    "aliases": "SCALELLM_TOKENIZER_ALIASES",
    "quantization": "SCALELLM_EXECUTOR_QUANTIZATION",
    "speculation": "SCALELLM_EXECUTOR_SPECULATION",
    "dtype": "SCALELLM_EXECUTOR_DTYPE",
    "kv_cache_dtype": "SCALELLM_EXECUTOR_KV_CACHE_DTYPE",
    "max_model_len": "SCALELLM_EXECUTOR_MAX_MODEL_LEN",
    "max_num_seqs": "SCALELLM_EXECUTOR_MAX_NUM_SEQS",
    "tensor_parallel": "SCALELLM_EXECUTOR_TENSOR_PARALLEL",
    "expert_parallel": "SCALELLM_EXECUTOR_EXPERT_PARALLEL",
}
"""Settings of services that `up` takes as options; the others it takes from a file or the environment."""


def service_environment(
    ctx: typer.Context, context: CliContext, given: Mapping[str, str | int | None], api_key: str
) -> dict[str, str]:
    """Return the variables of the services: those of a file, of the environment, and of options of `up`.

    Args:
        ctx: Context of `up`; knows the file.
        context: The invocation.
        given: Options of `up` that are settings of services, by name; None: not given.
        api_key: A key that clients have to show, which is put into a file; empty: none.

    Raises CliError.
    """
    variables = context.environment.variables
    check_variables(variables)
    chosen = {_SETTING_OPTIONS[name]: str(value) for name, value in given.items() if value is not None}
    names = {_SETTING_OPTIONS[name]: f"--{name.replace('_', '-')}" for name in given}
    environment = {**variables_of(ctx), **variables, **chosen}
    check_values(environment, {name: names[name] for name in chosen})
    if api_key:
        from scalellm.services.common.api_keys import (  # only here: importing it takes a while
            DEFAULT_TENANT,
            Role,
            key_entry,
        )

        if environment.get(_API_KEYS):
            raise CliError(f"--api-key: {_API_KEYS} names a file of keys already; add one there", ExitCode.USAGE)
        path = context.environment.home / "keys" / f"{context.instance.name}.toml"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_new(path, key_entry(api_key, DEFAULT_TENANT.name, Role.USER))
        environment[_API_KEYS] = str(path)
    return environment
