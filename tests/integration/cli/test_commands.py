"""The real command as a process against a scripted server: pipes, signals, exit codes, messages."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli_processes import ESCAPE, RunCli, StartCli, finish, read_to_end
from scalellm.v1.generation_pb2 import ON_DISCONNECT_KEEP, ChatMessage
from service_processes import PATIENCE


def test_generate_goes_on_when_the_server_is_lost(cli: StartCli, fake_server: Any) -> None:
    code, out, err = finish(cli("generate", "--keep", "moving on and on", address=fake_server.address))
    assert (code, out, err) == (0, "moving on and on \n", "")
    assert fake_server.requests[0].on_disconnect == ON_DISCONNECT_KEEP
    assert len(fake_server.resumed) == 3


def test_generate_in_a_pipe_is_plain_text(cli: StartCli, fake_server: Any) -> None:
    code, out, err = finish(cli("generate", "two words", address=fake_server.address))
    assert (code, out, err) == (0, "two words \n", "")


def test_prompt_from_standard_input(cli: StartCli, fake_server: Any) -> None:
    process = cli("generate", address=fake_server.address, stdin=subprocess.PIPE)
    assert finish(process, "from a pipe\n") == (0, "from a pipe \n", "")
    assert fake_server.requests[0].prompt == "from a pipe"


def test_every_option_reaches_the_server(run_cli: RunCli, fake_server: Any) -> None:
    options = (
        "--max-tokens 5 --min-tokens 2 --temperature 0 --top-k 3 --top-p 0.5 --min-p 0.25 --presence-penalty -1 "
        "--frequency-penalty 1 --repetition-penalty 1.5 --logit-bias 4=-2.5 --logit-bias 5=1 --seed 9 --n 2 --stop a "
        "--stop \\n --include-stop --stop-token-id 6 --ignore-eos --logprobs 0 --prompt-logprobs 1 --priority -3 "
        "--request-id me --json"
    )
    code, out, err = run_cli("generate", "hi there", *options.split(), address=fake_server.address)
    assert code == 0, err
    (request,) = fake_server.requests
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.top_k, sampling.seed, sampling.n) == (5, 2, 3, 9, 2)
    assert sampling.HasField("temperature")
    assert sampling.temperature == 0
    assert (sampling.top_p, sampling.min_p, sampling.repetition_penalty) == (0.5, 0.25, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1, 1)
    assert [(entry.token_id, entry.bias) for entry in sampling.logit_bias] == [(4, -2.5), (5, 1.0)]
    assert (list(sampling.stop_token_ids), sampling.ignore_eos) == ([6], True)
    assert (sampling.HasField("logprobs"), sampling.logprobs, sampling.prompt_logprobs) == (True, 0, 1)
    assert (list(request.stop), request.include_stop) == (["a", "\n"], True)
    assert (request.priority, request.request_id) == (-3, "me")
    document = json.loads(out)
    assert [sample["text"] for sample in document["samples"]] == ["hi there ", "hi there "]
    assert document["samples"][0]["finish_reason"] == "stop"
    assert document["usage"]["prompt_tokens"] == 3
    assert document["latency"]["total_ns"] == 5_000_000


def test_calls_of_tools_are_shown(
    run_cli: RunCli, fake_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {}}}]))
    asked = ("generate", "--chat", "rain?", "--tools", str(file))
    assert run_cli(*asked, address=fake_server.address)[:2] == (0, 'I look.\nweather {"city": "Rome"}\n')
    code, out, err = run_cli(*asked, "--tool-choice", "weather", "--json", address=fake_server.address)
    assert code == 0, err
    (sample,) = json.loads(out)["samples"]
    assert (sample["text"], sample["reasoning"]) == ("I look.", "Hm.")
    assert sample["tool_calls"] == [{"id": "c1", "name": "weather", "arguments": '{"city": "Rome"}'}]
    assert [list(request.chat.tool_choice.names) for request in fake_server.requests] == [[], ["weather"]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("rain?\n"))
    code, out, _ = run_cli("chat", "--tools", str(file), address=fake_server.address)
    assert (code, out) == (0, 'I look.\nweather {"city": "Rome"}\n')


def test_options_left_out_stay_unset(run_cli: RunCli, fake_server: Any) -> None:
    run_cli("generate", "hi", address=fake_server.address)
    assert fake_server.requests[0].sampling.ListFields() == []


def test_show_latency_adds_up(run_cli: RunCli, fake_server: Any) -> None:
    code, out, err = run_cli("generate", "a", "--show-latency", address=fake_server.address)
    assert (code, out) == (0, "a \n")
    rows = [line.split() for line in err.splitlines()]
    values = {row[0]: float(row[1]) for row in rows if len(row) > 2 and re.fullmatch(r"\d+\.\d\d", row[1])}
    total = values.pop("total")
    assert round(sum(values.values()), 2) == total
    assert (values["prefill"], values["decode"]) == (1.5, 2.0)


@pytest.mark.parametrize(
    ("prompt", "options", "code", "message"),
    [
        ("bad", "", 2, "error: sampling.top_p: must be in (0, 1], got 7\n"),
        ("busy", "", 5, "error: queue full: 64 requests wait; try again in 2.0 s\n"),
        ("slow", "--timeout 0.3", 4, "allow more with --timeout\n"),
        ("x", "--top-k -1", 2, "--top-k: -1 is out of range"),
        ("x", "--logit-bias a=1", 2, "--logit-bias: 'a=1' is not ID=VALUE"),
        ("x", "--session s", 2, "--system and --session need --chat"),
        ("x", "--logprobs 3", 2, "--logprobs and --prompt-logprobs need --json"),
        ("x", "--tools tools.json", 2, "--tools needs --chat"),
        ("x", "--chat --tool-choice none", 2, "--tool-choice needs --tools"),
        ("x", "--regex a --choice b", 2, "--regex and --choice exclude each other"),
        ("x", "--json-schema /does/not/exist", 2, "--json-schema: /does/not/exist cannot be read: No such file"),
        ("", "", 2, "the prompt is empty"),
    ],
)
def test_failures(run_cli: RunCli, fake_server: Any, prompt: str, options: str, code: int, message: str) -> None:
    status, out, err = run_cli("generate", prompt, *options.split(), address=fake_server.address)
    assert (status, out) == (code, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("generate", "x", "--timeout", "1e11"), "--timeout: must be above 0 and at most 3000000000 s, got 1e+11"),
        (("generate", "x", "--timeout", "nan"), "--timeout: must be above 0"),
        (("chat", "--timeout", "-1"), "--timeout: must be above 0"),
        (("chat", "--max-tokens", "4294967296"), "should be less than or equal to 4294967295"),
        (("run", "--max-tokens", "4294967296"), "should be less than or equal to 4294967295"),
        (("generate", "x", "--stop", "\udcff"), r"the argument '\udcff' is not UTF-8"),
        (("run", "\udcff"), r"the argument '\udcff' is not UTF-8"),
    ],
)
def test_wrong_input_is_told(run_cli: RunCli, fake_server: Any, command: tuple[str, ...], message: str) -> None:
    code, out, err = run_cli(*command, address=fake_server.address)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())


def test_chat_in_a_pipe_names_the_line_that_is_not_utf8(cli: StartCli, fake_server: Any) -> None:
    process = cli("chat", address=fake_server.address, stdin=subprocess.PIPE, errors="surrogateescape")
    code, out, err = finish(process, "hello\n\udcff\n")
    assert (code, out) == (2, "hello \n")
    assert err == "error: line 2 of standard input is not UTF-8\n"


def test_full_disk_is_one_line(cli: StartCli, fake_server: Any) -> None:
    with open("/dev/full", "w") as full:
        for command in (("generate", "hello"), ("version",), ("models", "list")):
            code, _, err = finish(cli(*command, address=fake_server.address, stdout=full))
            assert (code, err) == (1, "error: [Errno 28] No space left on device\n")


def test_closed_streams(cli: StartCli, fake_server: Any) -> None:
    def shell(line: str) -> tuple[int, str, str]:
        environment = {
            **os.environ,
            "SCALELLM_ADDRESS": fake_server.address,
            "CLI": f"{sys.executable} -m scalellm.cli.main",
        }
        process = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        return process.returncode, process.stdout, process.stderr

    assert shell("$CLI generate hello >&-") == (0, "", "")
    assert shell("$CLI generate hello 2>&-") == (0, "hello \n", "")
    assert shell("$CLI generate <&-") == (2, "", "error: the prompt is empty\n")
    assert shell("$CLI chat <&-") == (0, "", "")


@pytest.mark.parametrize("command", [("models", "list"), ("version",)])
def test_nobody_reads_the_output(cli: StartCli, command: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code, _, err = finish(cli(*command, stdout=writer))
    os.close(writer)
    assert (code, err) == (141, "")


def test_no_server(run_cli: RunCli) -> None:
    for command in (("generate", "x"), ("chat",), ("tokenize", "x")):
        code, out, err = run_cli(*command, address="127.0.0.1:1")
        assert (code, out) == (3, "")
        assert err == "error: no ScaleLLM server answers at 127.0.0.1:1; start it with: scalellm up\n"


def test_nothing_started(run_cli: RunCli, tmp_path: Path) -> None:
    code, _, err = run_cli("status")
    assert (code, err) == (3, "error: not running (instance 'default'); start it with: scalellm up\n")
    code, _, err = run_cli("--instance", "second", "status")
    assert (code, err) == (3, "error: not running (instance 'second'); start it with: scalellm --instance second up\n")
    assert run_cli("down") == (0, "", "not running (instance 'default'): nothing to stop\n")
    assert list(tmp_path.iterdir()) == []


def test_unknown_model(run_cli: RunCli) -> None:
    code, _, err = run_cli("up", "--model", "no-such-model")
    assert code == 2
    assert err.startswith("error: no model 'no-such-model': it is neither a known name (")
    assert err.count("\n") == 1


def test_redis_that_does_not_answer(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").touch()
    model = str(tmp_path / "weights.gguf")
    code, _, err = run_cli("up", "--port", "0", "--model", model, REDIS_URL="redis://127.0.0.1:1")
    assert code == 1
    assert "error: REDIS_URL: redis://127.0.0.1:1 cannot be used: Redis cannot be reached: " in err
    assert "unset it to use an embedded one" in err


def test_interrupt_cancels_the_request(cli: StartCli, fake_server: Any) -> None:
    process = cli("generate", "forever", address=fake_server.address)
    assert process.stdout is not None
    process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    assert fake_server.cancelled.wait(PATIENCE)
    code, _, err = finish(process)
    assert (code, err) == (130, "")


def test_termination_cancels_the_request(cli: StartCli, fake_server: Any) -> None:
    process = cli("generate", "forever", address=fake_server.address)
    assert process.stdout is not None
    process.stdout.read(3)
    process.terminate()
    assert fake_server.cancelled.wait(PATIENCE)
    assert finish(process)[0] == 143


def test_closed_pipe_is_quiet_and_cancels(cli: StartCli, fake_server: Any) -> None:
    process = cli("generate", "forever", address=fake_server.address)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(3)
    process.stdout.close()
    assert fake_server.cancelled.wait(PATIENCE)
    assert process.wait(PATIENCE) == 141
    assert process.stderr.read() == ""


def on_terminal(cli: StartCli, *arguments: str, **options: Any) -> str:
    """Run a command whose output is a terminal, and return what it writes."""
    master, slave = os.openpty()
    process = cli(*arguments, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, **options)
    os.close(slave)
    received = read_to_end(master)
    process.wait(PATIENCE)
    return received.decode()


def test_no_color(cli: StartCli) -> None:
    coloured = {"TERM": "xterm-256color", "NO_COLOR": ""}
    assert f"{ESCAPE}[1;31m" in on_terminal(cli, "status", env=coloured)
    plain = on_terminal(cli, "status", env={**coloured, "NO_COLOR": "1"})
    assert "31m" not in plain
    assert "not running" in plain


def test_control_characters_do_not_reach_a_terminal(cli: StartCli, fake_server: Any) -> None:
    prompt = f"a {ESCAPE}[2Jb\x07"
    environment = {"TERM": "xterm", "NO_COLOR": "1"}
    shown = on_terminal(cli, "generate", prompt, address=fake_server.address, env=environment)
    assert shown == "a [2Jb \r\n"
    assert finish(cli("generate", prompt, address=fake_server.address))[1] == f"{prompt} \n"


def test_sessions(run_cli: RunCli, fake_server: Any) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        return run_cli("sessions", *arguments, address=fake_server.address)

    assert run("list") == (0, "", "there are no sessions; scalellm chat begins one\n")
    fake_server.sessions["s1"] = [ChatMessage(role="user", content="Hi"), ChatMessage(role="assistant", content="Ho")]
    code, out, _ = run("list")
    assert (code, [line.split()[:3] for line in out.splitlines()]) == (0, [["id", "turns", "tokens"], ["s1", "1", "9"]])
    assert [entry["session_id"] for entry in json.loads(run("list", "--json")[1])] == ["s1"]
    assert run("show", "s1")[:2] == (0, "user: Hi\nassistant: Ho\n")
    assert json.loads(run("show", "s1", "--json")[1])["messages"][1] == {"role": "assistant", "content": "Ho"}
    assert run("delete", "s1") == (0, "", "s1: deleted\n")
    code, _, err = run("show", "s1")
    assert (code, "unknown or expired" in err) == (1, True)


def test_version(run_cli: RunCli) -> None:
    assert run_cli("--version") == run_cli("version")


def test_the_shell_can_complete_commands_and_options(cli: StartCli) -> None:
    def complete(words: str) -> list[str]:
        asked = {"_SCALELLM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return finish(cli(env=asked))[1].split()

    assert complete("scalellm se") == ["serve", "sessions"]
    assert complete("scalellm up --quant") == ["--quantization"]


def test_a_model_that_is_none_is_wrong_usage(run_cli: RunCli) -> None:
    for arguments in (("up", "--model", "gpt-9"), ("models", "pull", "gpt-9"), ("models", "rm", "gpt-9")):
        code, out, err = run_cli(*arguments)
        assert (code, out) == (2, "")
        assert "gpt-9" in err


def test_a_server_with_a_certificate_of_a_public_authority(cli: StartCli, secured_server: Any) -> None:
    identity, address = secured_server.identity, secured_server.server.address
    shown = ("--tls-cert", str(identity.cert), "--tls-key", str(identity.key))
    public = {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(identity.ca), "SCALELLM_API_KEY": "slm-secret"}
    by_option = cli("--tls", *shown, "generate", "yes", address=address, env=public)
    by_variable = cli(*shown, "generate", "yes", address=address, env={**public, "SCALELLM_TLS": "true"})
    without = cli(*shown, "generate", "yes", address=address, env=public)
    assert finish(by_option) == finish(by_variable) == (0, "yes \n", "")
    code, _, err = finish(without)
    assert (code, "neither --tls nor --tls-ca is given: a certificate is shown over TLS only" in err) == (1, True), err


def test_tokenize(run_cli: RunCli, fake_server: Any) -> None:
    def run(*arguments: str) -> str:
        code, out, err = run_cli("tokenize", *arguments, address=fake_server.address)
        assert (code, err) == (0, "")
        return out

    assert run("ab") == "97\t'a'\n98\t'b'\n"
    assert run("ab", "--ids") == "97 98\n"
    assert json.loads(run("ab", "--json")) == {"token_ids": [97, 98], "tokens": ["a", "b"]}
    assert run("97, 98", "--decode") == "ab\n"


def test_a_model_is_chosen_by_name(run_cli: RunCli, fake_server: Any) -> None:
    for options in ((), ("--model", "second")):
        for command in (("generate",), ("tokenize",), ("tokenize", "--decode"), ("tokenize", "--chat")):
            code, _, err = run_cli(*command, "97", *options, address=fake_server.address)
            assert (code, err) == (0, "")
    assert [request.model for request in fake_server.requests] == ["", "second"]
    assert fake_server.chosen == [""] * 4 + ["second"] * 4, "with --chat there is a call for the template, too"


def test_models_list_in_a_pipe_is_one_line_per_model(run_cli: RunCli) -> None:
    code, out, _ = run_cli("models", "list")
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", "gemma3-270m", "smollm2-135m-instruct"]
    code, out, _ = run_cli("models", "list", "--json")
    assert {model["name"]: model["path"] for model in json.loads(out)} == {
        "gemma3-270m": None,
        "smollm2-135m-instruct": None,
    }
