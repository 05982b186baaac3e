"""The parts of the command line that need no process."""

import json
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from unittest.mock import MagicMock

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from scalellm.cli.context import CliContext, CliError, Environment, ExitCode, explain
from scalellm.cli.generation import Generation, logprob_entries
from scalellm.cli.latency import rows
from scalellm.cli.main import app
from scalellm.cli.status_table import engine_lines, fitting_table, status_table
from scalellm.client import ClientError, Credentials
from scalellm.launcher import (
    Instance,
    InstanceStatus,
    LauncherError,
    NotRunningError,
    ServiceStatus,
    State,
    UpOptions,
)
from scalellm.launcher.instance import ServiceRecord
from scalellm.launcher.plan import check_ports, listeners, service_command, service_environment
from scalellm.launcher.processes import last_error
from scalellm.launcher.redis_server import shown
from scalellm.services.common.errors import StatusError
from scalellm.services.common.served_models import ServedModel, read_models
from scalellm.v1.common_pb2 import LatencyBreakdown, TokenLogprobs
from scalellm.v1.generation_pb2 import GenerateRequest, GenerateResponse, PromptLogprobs

DURATION = st.integers(0, 10**13)


@given(st.lists(DURATION, min_size=4, max_size=4), DURATION)
def test_shown_parts_add_up_to_the_shown_total(parts: list[int], beyond: int) -> None:
    names = ("tokenize_ns", "queue_ns", "prefill_ns", "decode_ns")
    latency = LatencyBreakdown(**dict(zip(names, parts, strict=True)))
    measured = sum(parts) + beyond
    values = [value for _, _, value in rows(latency, measured)]
    assert all(value >= 0 for value in values)
    assert round(sum(round(value * 100) for value in values)) == round(measured / 10_000)


def test_logprobs_are_split_per_token() -> None:
    message = TokenLogprobs(logprobs=[-1, -2], num_top=1, top_token_ids=[7, 8], top_logprobs=[-0.5, -0.25])
    assert logprob_entries(message) == [
        {"logprob": -1.0, "top": [{"token_id": 7, "logprob": -0.5}]},
        {"logprob": -2.0, "top": [{"token_id": 8, "logprob": -0.25}]},
    ]


def test_parts_of_a_prompt_are_put_together() -> None:
    """The first token has no alternatives: what fills their places is not shown."""
    first = TokenLogprobs(logprobs=[0, -2], num_top=1, top_token_ids=[0, 8], top_logprobs=[0, -0.5])
    second = TokenLogprobs(logprobs=[-3], num_top=1, top_token_ids=[9], top_logprobs=[-0.25])
    stream = MagicMock()
    stream.generate.return_value.__enter__.return_value = [
        GenerateResponse(prompt_logprobs=PromptLogprobs(token_ids=[4, 5], logprobs=first)),
        GenerateResponse(prompt_logprobs=PromptLogprobs(token_ids=[6], logprobs=second, offset=2)),
    ]
    generation = Generation()
    generation.run(stream, GenerateRequest(), lambda text: None)
    assert generation.to_json()["prompt_logprobs"] == [
        {"token_id": 4, "logprob": 0.0},
        {"token_id": 5, "logprob": -2.0, "top": [{"token_id": 8, "logprob": -0.5}]},
        {"token_id": 6, "logprob": -3.0, "top": [{"token_id": 9, "logprob": -0.25}]},
    ]


@pytest.mark.parametrize("arguments", [[], ["generate"], ["up"], ["models"], ["chat"], ["tokenize"], ["run"]])
def test_help_explains_itself(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, [*arguments, "--help"])
    assert result.exit_code == 0
    assert "Usage: " in result.stdout
    assert "\x1b" not in result.stdout


def test_wrong_usage_exits_with_2() -> None:
    assert CliRunner().invoke(app, ["generate", "--nonsense"]).exit_code == 2
    assert CliRunner().invoke(app, ["up", "--executors", "0"]).exit_code == 2
    assert CliRunner().invoke(app, ["up", "--host", "[::1"]).exit_code == 2


def test_environment_defaults_and_overrides() -> None:
    plain = Environment.read({"HOME": "/home/u", "SCALELLM_HOME": ""})
    assert (plain.home, plain.instance, plain.redis_url) == (Path("/home/u/.cache/scalellm"), "default", "")
    assert Environment.read({"SCALELLM_HOME": "/srv"}).home == Path("/srv")
    assert Environment.read({"HOME": ""}).home.is_absolute()
    assert Environment.read({"SCALELLM_HOME": "~/models"}).home == Path.home() / "models"


def test_status_on_a_terminal_of_80_columns() -> None:
    load = {"running": 12, "queued": 345, "executors_ready": 2, "executors": 2}
    service = ServiceStatus("executor-0", "executor", "not serving", "127.0.0.1:50061", pid=1234567, load=load)
    console = Console(file=StringIO(), width=80)
    service = replace(service, uptime_s=36000.0, memory_bytes=2**34, model="m")
    console.print(status_table((service,), left_out=("compute",)))
    head, row = console.file.getvalue().splitlines()[:2]
    assert [word for word in head.split() if word in ("service", "health", "pid", "up", "memory")] == [
        *("service", "health", "pid", "up", "memory")
    ]
    assert row.startswith("executor-0  not serving  1234567  127.0.0")
    assert "10:00:00  16384 MiB" in row


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "x" * 65])
def test_instance_names_cannot_leave_their_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(LauncherError, match="instance name"):
        Instance(tmp_path, name)


def test_address_comes_from_the_option_then_the_environment_then_the_instance(tmp_path: Path) -> None:
    def context(address: str) -> CliContext:
        environment = Environment(tmp_path, "default", address, "", {})
        return CliContext(environment, None, None)  # type: ignore[arg-type]

    assert context("").address("") == "127.0.0.1:50051"
    record = ServiceRecord("tokenizer", "tokenizer", 1, 0.0, "log", address="127.0.0.1:7")
    instance = Instance(tmp_path)
    with instance.locked():
        instance.save(State("m", "", 1.0, (record,)))
    assert context("").address("") == "127.0.0.1:7"
    assert context("h:1").address("") == "h:1"
    assert context("h:1").address("h:2") == "h:2"
    with pytest.raises(NotRunningError, match="instance 'other'"):
        context("").with_instance("other").address("")
    context("[::1]:1").connect("").close()
    for address, said in (
        ("::1:1", "an IPv6 address stands in brackets"),
        ("localhost", "'localhost' is not host:port"),
    ):
        with pytest.raises(CliError, match=f"SCALELLM_ADDRESS.*{said}"):
            context(address).connect("")


def test_two_launchers_exclude_each_other(tmp_path: Path) -> None:
    instance = Instance(tmp_path)
    with instance.locked(), pytest.raises(LauncherError, match="another scalellm"), Instance(tmp_path).locked():
        pass
    with instance.locked():
        instance.remove(keep_logs=False)
    with instance.locked():
        assert instance.folder.exists()


def test_unreadable_state_says_what_to_do(tmp_path: Path) -> None:
    instance = Instance(tmp_path)
    with instance.locked():
        (instance.folder / "state.json").write_text('{"model": 1}')
    with pytest.raises(LauncherError, match=r"cannot read .*state\.json"):
        instance.load()


@pytest.mark.parametrize("home", ["/proc/none", "/dev/null"])
def test_a_home_that_cannot_be_made(home: str) -> None:
    instance = Instance(Path(home))
    assert instance.load() is None
    with pytest.raises(LauncherError, match=f"cannot write to {home}/run/default: .*; set SCALELLM_HOME"):  # noqa: SIM117
        with instance.locked():
            pass


def options(tmp_path: Path, **changes: object) -> UpOptions:
    values = {"models": {"m": tmp_path}, "home": tmp_path, "environment": {"A": "b"}, **changes}
    return UpOptions(**values)  # type: ignore[arg-type]


def test_ports(tmp_path: Path) -> None:
    fixed = listeners(options(tmp_path, executors=2))
    assert [(name, at.port, at.metrics_port) for name, at in fixed.items()] == [
        ("executor-0", 50061, 9161),
        ("executor-1", 50062, 9162),
        ("scheduler", 50052, 9152),
        ("tokenizer", 50051, 9151),
    ]
    free = listeners(options(tmp_path, executors=2, port=0))
    assert {(at.port, at.metrics_port) for at in free.values()} == {(0, 0)}
    moved = listeners(options(tmp_path, executors=2, port=6000, executor_port=7000, host="0.0.0.0"))
    assert [(at.host, at.port) for at in moved.values()] == [
        ("127.0.0.1", 7000),
        ("127.0.0.1", 7001),
        ("127.0.0.1", 50052),
        ("0.0.0.0", 6000),
    ]


def test_executors_and_tokenizer_of_several_models(tmp_path: Path) -> None:
    """Each executor has one of them, and says its name as the tokenizer knows it."""
    models = {"one": tmp_path / "1", "two": tmp_path / "2"}
    chosen = UpOptions.from_message(json.loads(json.dumps(options(tmp_path, models=models, executors=2).to_message())))
    plan = listeners(chosen)
    assert list(plan) == ["executor-0", "executor-1", "executor-2", "executor-3", "scheduler", "tokenizer"]

    def served(name: str) -> tuple[ServedModel, ...]:
        command = service_command(chosen, name, name.split("-")[0], plan[name], tmp_path / "announce", "127.0.0.1:1")
        values = dict(pairwise(command))
        return read_models(values["--model"], values.get("--model-name", ""))

    one, two = (ServedModel(name, str(path)) for name, path in models.items())
    assert [served(name) for name in plan if name != "scheduler"] == [(one,), (one,), (two,), (two,), (one, two)]
    swapped = options(tmp_path, models=dict(reversed(models.items())), executors=2)
    assert swapped.asked["models"] != chosen.asked["models"], "which one is the default tells instances apart"


@pytest.mark.parametrize(("name", "path"), [("a,b", "/x"), ("a=b", "/x"), ("a", "/x,y")])
def test_models_that_cannot_be_listed_are_refused_where_there_are_several(name: str, path: str) -> None:
    assert UpOptions({name: Path(path)}, Path(), {}).model == name
    with pytest.raises(LauncherError, match="--model: names of several models have no comma and no ="):
        UpOptions({name: Path(path), "other": Path("/z")}, Path(), {})


def test_ports_end_at_65535(tmp_path: Path) -> None:
    plan = listeners(options(tmp_path, executors=2, port=0, executor_port=65535))
    with pytest.raises(
        LauncherError, match=r"port 65536 \(executor-1\) is above 65535; choose a lower --executor-port"
    ):
        check_ports(plan)


def test_redis_password_is_in_no_command_and_no_message(tmp_path: Path) -> None:
    url = "redis://user:secret@host:6379/1"
    chosen = options(tmp_path, redis_url=url)
    for name, at in listeners(chosen).items():
        kind = name.split("-")[0]
        command = service_command(chosen, name, kind, at, tmp_path / "announce", "127.0.0.1:1")
        assert "secret" not in " ".join(command)
        told = {value for key, value in service_environment(chosen, kind, url).items() if key.endswith("REDIS_URL")}
        assert told == ({url} if kind != "executor" else set())
    assert shown(url) == "redis://***@host:6379/1"


def test_last_error_prefers_what_the_service_said_itself(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("12:00 INFO x: fine\nerror: too little memory; set --num-blocks\n")
    assert last_error(str(log)) == "too little memory; set --num-blocks"
    log.write_text("Traceback (most recent call last):\n  File\nValueError: bad\n")
    assert last_error(str(log)) == "ValueError: bad"
    with log.open("a") as more:
        more.write("12:01 INFO x: serving the next one\n")
    assert last_error(str(log)) == "ValueError: bad"
    log.write_text("12:00 INFO x: fine\n")
    assert last_error(str(log)) == ""
    assert last_error(str(tmp_path / "none")) == ""


TLS = Credentials("", Path("ca.pem"))


class Failure(grpc.RpcError):
    """A call that failed, with or without a status of the server's own."""

    def __init__(self, message: str, metadata: tuple[tuple[str, bytes], ...] = ()) -> None:
        self._message = message
        self._metadata = metadata

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return self._message

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self._metadata


def test_who_is_not_there() -> None:
    def explained(message: str, *metadata: tuple[str, bytes]) -> tuple[str, ExitCode]:
        return explain(ClientError.from_rpc(Failure(message, metadata), "h:1"))

    nobody = ("no ScaleLLM server answers at h:1; check the address, and that it runs", ExitCode.NOT_RUNNING)
    assert explained("failed to connect to all addresses; last error: Connection refused") == nobody
    assert explained("errors resolving h:1: [field:hostname lookup error:address lookup failed for h:1]") == nobody
    broke = "the connection to h:1 broke (Socket closed); try again"
    assert explained("Socket closed") == (broke, ExitCode.BUSY)
    refused = explained("Stream removed (RST_STREAM (Received RST_STREAM with error code 7))")
    full = "h:1 keeps no more calls of one connection open (--max-streams-per-connection); this one was not begun"
    assert refused == (f"{full}, try again", ExitCode.BUSY)
    # What a server says of a connection of its own is not about the connection to it.
    relayed = "the scheduler cannot be reached: h:2: failed to connect to all addresses"
    status = StatusError.unavailable(relayed, retry_after=1.0).to_rpc_status()
    expected = (f"{relayed}; try again in 1.0 s", ExitCode.BUSY)
    assert explained(relayed, ("grpc-status-details-bin", status.SerializeToString())) == expected


@pytest.mark.parametrize(
    ("shown", "happened", "advice", "code"),
    [
        (
            Credentials(),
            "Socket closed",
            "does it expect TLS? Give --tls-ca, or --tls for a public authority",
            ExitCode.BUSY,
        ),
        (
            TLS,
            "Tls handshake failed (TSI_PROTOCOL_FAILURE): error:100000f7:SSL:WRONG_VERSION_NUMBER: x",
            "its certificate is not of an authority in ca.pem (--tls-ca), or it speaks no TLS",
            ExitCode.USAGE,
        ),
        (TLS, "Hostname Verification Check failed.", "its certificate is for another name", ExitCode.USAGE),
        (
            TLS,
            "Socket closed",
            "does it ask clients for a certificate? Give --tls-cert and --tls-key",
            ExitCode.USAGE,
        ),
        (
            replace(TLS, tls_cert=Path("me.pem"), tls_key=Path("me.key")),
            "Connection reset by peer",
            "does it trust the authority of me.pem (--tls-cert)?",
            ExitCode.USAGE,
        ),
    ],
)
def test_who_is_there_and_does_not_talk(shown: Credentials, happened: str, advice: str, code: ExitCode) -> None:
    failure = Failure(f"failed to connect to all addresses; last error: UNAVAILABLE: ipv4:127.0.0.1:1: {happened}", ())
    text = f"h:1 is there, but no connection came about: {advice}"
    assert explain(ClientError.from_rpc(failure, "h:1", shown)) == (text, code)


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (70, "service health pid load"),
        (80, "service health pid up load"),
        (100, "service health pid address up load"),
        (200, "service health pid address up memory load model compute"),
    ],
)
def test_status_leaves_columns_out_before_it_folds_lines(width: int, columns: str) -> None:
    load = {"running": 0, "waiting": 0, "free_blocks": 8038, "total_blocks": 8038}
    plain = ServiceStatus("executor-0", "executor", "not serving", "127.0.0.1:50061", pid=13654, load=load)
    service = replace(plain, uptime_s=9.0, memory_bytes=2**30, model="smollm2-135m-instruct")
    out = StringIO()
    console = Console(width=width, file=out, force_terminal=True, color_system=None)
    console.print(fitting_table(console, (service,)))
    head, row = out.getvalue().splitlines()
    assert head.split() == columns.split()
    assert "not serving" in row
    assert "0 running, 0 waiting, 0/8038 blocks" in row


def test_weights_and_speculation_are_told_by_model_where_there_are_several() -> None:
    def lines(*held: tuple[str, str, str]) -> list[str]:
        plain = ServiceStatus("executor-0", "executor", "serving", "h:1")
        services = tuple(replace(plain, model=name, weights=form, speculation=state) for name, form, state in held)
        return engine_lines(InstanceStatus("default", "m", "h:2", "", True, True, services))

    one = ("m", "bfloat16, 257 MiB", "on")
    assert lines(one, one, ("", "", ""), ("m", "", "off")) == ["weights: bfloat16, 257 MiB", "speculation: on"]
    assert lines(("m", "int8, 9 MiB", "off"), ("n", "int8, 9 MiB", "idle"), ("n", "int8, 9 MiB", "")) == [
        "weights of m: int8, 9 MiB",
        "speculation of m: off",
        "weights of n: int8, 9 MiB",
        "speculation of n: idle (no decode step so far was computed in C++ alone, by one rank)",
    ]


def test_instructions_that_are_not_used_are_told_with_the_reason() -> None:
    executor = ServiceStatus("executor-0", "executor", "serving", "h:1", weights="int8, 9 MiB")
    told = replace(executor, instructions="avx512-vnni (not amx: products with bfloat16 weights are wrong)")
    status = InstanceStatus("default", "m", "h:2", "", True, True, (told, replace(told, name="executor-1")))
    assert engine_lines(status) == [
        "weights: int8, 9 MiB",
        "instructions: avx512-vnni (not amx: products with bfloat16 weights are wrong)",
    ]


def test_failed_calls_say_what_to_do() -> None:
    code = grpc.StatusCode
    assert explain(ClientError(code.UNAVAILABLE, "x", unreachable="h:1")) == (
        "no ScaleLLM server answers at h:1; check the address, and that it runs",
        ExitCode.NOT_RUNNING,
    )
    assert explain(ClientError(code.UNAVAILABLE, "no executor is connected", retry_after=1.25)) == (
        "no executor is connected; try again in 1.2 s",
        ExitCode.BUSY,
    )
    assert explain(ClientError(code.RESOURCE_EXHAUSTED, "CLIENT: Sent message larger than max (9 vs. 8)")) == (
        "the request is too large: 9 bytes, at most 8",
        ExitCode.USAGE,
    )
    assert explain(ClientError(code.DEADLINE_EXCEEDED, "Stream removed (Deadline Exceeded)")) == (
        "out of time; allow more with --timeout",
        ExitCode.DEADLINE,
    )
    assert "tokenizer?" in explain(ClientError(code.UNIMPLEMENTED, "Method not found!"))[0]
    assert explain(ClientError(code.INTERNAL, "two\nlines"))[0] == "two lines (INTERNAL)"
