"""Settings of services on the command line: from a file, the environment and options; what is misspelt is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalellm.cli import main, models, services
from scalellm.cli.service_settings import all_settings, check_values, check_variables
from scalellm.launcher import UpOptions
from scalellm.services.common.api_keys import read_api_keys
from scalellm.services.common.settings import ServiceSettings, load_settings, settings_config
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.scheduler.config import SchedulerSettings
from scalellm.services.tokenizer.config import TokenizerSettings

ROOT = Path(__file__).parents[3]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str, **variables: str) -> tuple[int, str, str]:
        environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], **variables}
        code = main.run(arguments, environment)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[UpOptions]:
    """Options of each `up` that a test calls; nothing is started."""
    options: list[UpOptions] = []

    def bring_up(context: object, given: UpOptions, *rest: Any) -> object:
        options.append(given)
        raise SystemExit(0)

    monkeypatch.setattr(services, "_bring_up", bring_up)
    monkeypatch.setattr(models, "fetch_model", lambda context, name: (name, tmp_path))
    return options


def variables_in(text: str) -> set[str]:
    return set(re.findall(r"\bSCALELLM_[A-Z0-9_]*[A-Z0-9]\b(?![*<{])", text))


def test_every_variable_that_is_documented_is_known() -> None:
    """And with it every one of compose.yaml: a shell that has them set can still start services."""
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*.yaml"), *ROOT.glob("deploy/*.yaml")]
    named = set().union(*(variables_in(path.read_text()) for path in texts))
    prefixes = {name for name in named if any(other.startswith(f"{name}_") for other in named)}
    assert len(named) > 40
    for name in sorted(named - prefixes):
        check_variables({name: "x"})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("SCALELLM_EXECUTR_NUM_BLOCKS", "SCALELLM_EXECUTOR_NUM_BLOCKS"),
        ("SCALELLM_EXECUTOR_NUM_BLOCK", "SCALELLM_EXECUTOR_NUM_BLOCKS"),
        ("SCALELLM_API_KEYS", "SCALELLM_API_KEY"),
        ("SCALELLM_TOKENISER_WORKERS", "SCALELLM_TOKENIZER_WORKERS"),
    ],
)
def test_a_misspelt_variable_is_refused_and_the_nearest_one_named(
    name: str, nearest: str, run: Run, started: list[UpOptions]
) -> None:
    code, _, err = run("up", **{name: "4"})
    assert (code, started) == (2, [])
    assert err == f"error: {name} is not a variable that anything reads; did you mean {nearest}?\n"


def test_a_service_refuses_a_misspelt_variable_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SCALELLM_TOKENIZER_WROKERS", "1")  # another service's
    monkeypatch.setenv("SCALELLM_EXECUTOR_NUM_BLOCKS", "7")
    assert load_settings(ExecutorSettings, []).num_blocks == 7
    monkeypatch.setenv("SCALELLM_EXECUTOR_NUM_BLOKCS", "7")
    with pytest.raises(SystemExit) as ended:
        load_settings(ExecutorSettings, [])
    assert ended.value.code == 2
    told = "SCALELLM_EXECUTOR_NUM_BLOKCS is not a setting of this service; did you mean SCALELLM_EXECUTOR_NUM_BLOCKS?"
    assert told in capsys.readouterr().err


def test_options_go_before_the_environment_and_that_before_the_file(
    run: Run, started: list[UpOptions], tmp_path: Path
) -> None:
    path = tmp_path / "scalellm.toml"
    path.write_text(
        '[up]\nexecutors = 2\nport = 4000\nmax-model-len = 512\nquantization = "int8"\n'
        "[executor]\nnum_blocks = 10\nblock-size = 16\nprefix_cache = false\nmax_num_seqs = 3\n"
        '[tokenizer]\nlog_format = "json"\n'
    )
    environment = {"SCALELLM_EXECUTOR_BLOCK_SIZE": "32", "SCALELLM_EXECUTOR_QUANTIZATION": "int4"}
    code, _, err = run("up", "--config", str(path), "--port", "5000", "--max-num-seqs", "9", **environment)
    assert (code, err) == (0, "")
    (options,) = started
    assert (options.executors, options.port, options.host) == (2, 5000, "127.0.0.1")
    settings = {name: value for name, value in options.environment.items() if name.startswith("SCALELLM_")}
    assert settings == {
        "SCALELLM_EXECUTOR_NUM_BLOCKS": "10",
        "SCALELLM_EXECUTOR_BLOCK_SIZE": "32",
        "SCALELLM_EXECUTOR_PREFIX_CACHE": "false",
        "SCALELLM_EXECUTOR_MAX_NUM_SEQS": "9",
        "SCALELLM_EXECUTOR_MAX_MODEL_LEN": "512",
        "SCALELLM_EXECUTOR_QUANTIZATION": "int8",
        "SCALELLM_TOKENIZER_LOG_FORMAT": "json",
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[up]\nportt = 1", "up.portt is not an option of scalellm up; did you mean port?"),
        ("[executor]\nnum_block = 1", "executor.num_block is not a setting; did you mean num_blocks?"),
        ("[executor]\nmodel = 'x'", "executor.model is not a setting"),
        ("[executer]\nnum_blocks = 1", "executer is not a table; did you mean executor?"),
        ("num_blocks = 1", "num_blocks is not a table"),
        ("[executor]\nnum_blocks = [1]", "executor.num_blocks: must be a text, a number, true or false"),
        ("[executor", "is not TOML: "),
    ],
)
def test_mistakes_in_a_file_are_named(text: str, said: str, run: Run, started: list[UpOptions], tmp_path: Path) -> None:
    path = tmp_path / "scalellm.toml"
    path.write_text(text)
    for command in ("up", "config show"):
        code, _, err = run(*command.split(), "--config", str(path))
        assert (code, started) == (2, [])
        assert err.startswith(f"error: --config: {path}")
        assert said in err


def test_a_value_that_a_service_would_refuse_is_refused_before_anything_starts(
    run: Run, started: list[UpOptions], tmp_path: Path
) -> None:
    code, _, err = run("up", "--kv-cache-dtype", "int9")
    assert (code, err.startswith("error: --kv-cache-dtype: Input should be 'auto', 'float32'")) == (2, True)
    code, _, err = run("up", SCALELLM_EXECUTOR_NUM_BLOCKS="many")
    assert (code, "SCALELLM_EXECUTOR_NUM_BLOCKS: Input should be a valid integer" in err) == (2, True)
    assert started == []
    check_values({"SCALELLM_EXECUTOR_KV_CACHE_MEMORY": "2GiB", "SCALELLM_EXECUTOR_KERNELS": "all=torch"}, {})


def test_a_key_for_clients(run: Run, started: list[UpOptions], tmp_path: Path) -> None:
    assert run("--instance", "mine", "up", "--api-key", "secret")[0] == 0
    file = Path(started[0].environment["SCALELLM_TOKENIZER_API_KEYS"])
    assert file.stat().st_mode & 0o777 == 0o600
    assert "secret" not in file.read_text()
    (principal,) = read_api_keys(file).values()
    assert principal.tenant.name == "default"
    code, _, err = run("up", "--api-key", "secret", SCALELLM_TOKENIZER_API_KEYS="keys.toml")
    assert (code, "--api-key: SCALELLM_TOKENIZER_API_KEYS names a file of keys already" in err) == (2, True)


def test_the_name_that_clients_see(run: Run, started: list[UpOptions]) -> None:
    run("up", "--model", "org/name", "--served-model-name", "mine")
    run("up", "--model", "org/name")
    assert [options.model for options in started] == ["mine", "org/name"]


def test_several_models(run: Run, started: list[UpOptions], tmp_path: Path) -> None:
    path = tmp_path / "scalellm.toml"
    path.write_text('[up]\nmodel = ["org/one", "two=org/two"]\n')
    for arguments in (("--model", "org/one", "--model", "two=org/two"), ("--config", str(path))):
        assert run("up", *arguments)[0] == 0
        assert list(started.pop().models) == ["org/one", "two"]
    path.write_text('[up]\nmodel = "org/one"\n')
    for arguments in (("--config", str(path)), ("--config", str(path), "--model", "mine=org/two"), ()):
        assert run("up", *arguments)[0] == 0
    assert [options.model for options in started] == ["org/one", "mine", "smollm2-135m-instruct"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            "--model a=x --model b=x --served-model-name c",
            "--served-model-name is for one model; with several use --model",
        ),
        ("--model a=x --model a=y", "--model: two models have the name 'a'; give them others: NAME=MODEL"),
        ("--model =x", "--model: must be NAME=MODEL, got '=x'"),
        ("--model a,b=x --model y", "--model: names of several models have no comma and no =, their paths no comma"),
    ],
)
def test_models_that_cannot_be_served_are_refused(options: str, said: str, run: Run, started: list[UpOptions]) -> None:
    code, _, err = run("up", *options.split())
    assert (code in (1, 2), started) == (True, [])
    assert err.startswith(f"error: {said}"), err


def test_config_show_is_a_file_for_up(run: Run, started: list[UpOptions], tmp_path: Path) -> None:
    code, shown, _ = run("config", "show")
    assert (code, tomllib.loads(shown)) == (0, {"up": {}, "executor": {}, "scheduler": {}, "tokenizer": {}})
    assert '\n# num_blocks = ""\n' in shown
    assert '\n# capacity_policy = "max_utilization"\n' in shown
    path = tmp_path / "scalellm.toml"
    path.write_text('[up]\nport = 4000\n[executor]\nnum_blocks = 10\n[tokenizer]\nsalt_secret = "hunter2"\n')
    code, shown, _ = run("config", "show", "--config", str(path), SCALELLM_SCHEDULER_LOG_LEVEL="debug")
    assert "hunter2" not in shown
    assert 'log_level = "debug"  # SCALELLM_SCHEDULER_LOG_LEVEL' in shown
    path.write_text(shown)
    assert run("up", "--config", str(path))[0] == 0
    assert started[0].port == 4000
    assert started[0].environment["SCALELLM_EXECUTOR_NUM_BLOCKS"] == "10"


def test_all_that_config_show_prints_can_be_set_to_what_it_prints(
    run: Run, started: list[UpOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, shown, _ = run("config", "show")
    path = tmp_path / "scalellm.toml"
    path.write_text(re.sub(r"^# (?=[a-z0-9_]+ = )", "", shown, flags=re.MULTILINE))
    tables = tomllib.loads(path.read_text())
    assert sum(len(table) for name, table in tables.items() if name != "up") == len(all_settings())
    assert run("up")[0] == run("up", "--config", str(path))[0] == 0
    plain, full = started
    variables = {name: full.environment.pop(name) for name in set(full.environment) - set(plain.environment)}
    assert full == plain
    every: tuple[type[ServiceSettings], ...] = (ExecutorSettings, SchedulerSettings, TokenizerSettings)
    defaults = [load_settings(settings, []) for settings in every]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert [load_settings(settings, []) for settings in every] == defaults


def test_serve_is_up_in_the_foreground(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    served: list[UpOptions] = []
    monkeypatch.setattr(services, "run_in_foreground", lambda instance, options, *rest: served.append(options) or 0)
    monkeypatch.setattr(models, "fetch_model", lambda context, name: (name, tmp_path))
    for command in ("serve", "up --foreground"):
        assert run(*command.split(), "--model", "org/name", "--http-port", "8001")[0] == 0
    assert served[0] == served[1]
    assert (served[0].model, served[0].http_port) == ("org/name", 8001)


def test_all_of_it_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scalellm.cli.main", "up", "--quantization", "int9"]
    environment = {**os.environ, "SCALELLM_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --quantization: Input should be 'auto', 'none', 'keep'")


class Lamp(ServiceSettings):
    model_config = settings_config("lamp")

    colour: str = "white"
    """Colour of its
    light."""


def test_help_describes_each_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_settings(Lamp, ["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--colour str Colour of its light. (default: white)" in told
    assert "Port of the Prometheus endpoint; 0 takes a free one" in told
    assert all(setting.text for setting in all_settings())
