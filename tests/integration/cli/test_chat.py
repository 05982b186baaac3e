"""`scalellm chat` on a terminal of its own and in a pipe, against a scripted server."""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli_processes import ESCAPE, RunCli, StartCli, finish, read_to_end
from scalellm.v1.generation_pb2 import ChatMessage
from service_processes import PATIENCE


def test_history_without_control_characters(cli: StartCli, fake_server: Any) -> None:
    fake_server.sessions["s1"] = [ChatMessage(role="user", content=f"a {ESCAPE}[2Jb")]
    master, slave = os.openpty()
    environment = {"TERM": "dumb", "NO_COLOR": "1"}
    streams = {"stdin": slave, "stdout": slave, "stderr": slave}
    process = cli("chat", "--session", "s1", address=fake_server.address, env=environment, **streams)
    os.close(slave)
    os.write(master, b"/history\n/exit\n")
    received = read_to_end(master)
    assert process.wait(PATIENCE) == 0
    assert b"user: a [2Jb" in received


def test_chat_in_a_pipe_keeps_one_session(cli: StartCli, fake_server: Any) -> None:
    process = cli("chat", "--system", "be brief", address=fake_server.address, stdin=subprocess.PIPE)
    assert finish(process, "first turn\n\nsecond turn\n") == (0, "first turn \nsecond turn \n", "")
    first, second = fake_server.requests
    assert first.session_id == second.session_id
    assert [message.role for message in first.chat.messages] == ["system", "user"]
    assert [message.content for message in second.chat.messages] == ["second turn"]


def test_the_model_of_a_chat_is_the_one_that_is_named_or_that_the_session_began_with(
    run_cli: RunCli, fake_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chat(*options: str) -> tuple[str, float | None]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("a turn\n"))
        code, _, err = run_cli("chat", *options, address=fake_server.address)
        assert (code, err) == (0, "")
        sampling = fake_server.requests[-1].sampling
        return fake_server.requests[-1].model, sampling.temperature if sampling.HasField("temperature") else None

    assert chat() == ("", pytest.approx(0.7)), "the default model has no temperature of its own"
    assert chat("--session", "trip") == ("", pytest.approx(0.7)), "a new one"
    assert chat("--session", "trip") == ("second", None)
    assert chat("--model", "second") == ("second", None)
    assert chat("--model", "fake", "--session", "trip") == ("fake", pytest.approx(0.7)), "the server refuses"
    fake_server.models.remove("second")
    assert chat("--session", "trip") == ("", pytest.approx(0.7)), "there is no choice"


def test_chat_on_a_terminal(cli: StartCli, fake_server: Any) -> None:
    master, slave = os.openpty()
    process = cli("chat", "--session", "s1", address=fake_server.address, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    os.write(master, b"hello there\n/history\n/nonsense\n/new\n/help\n/exit\n")
    received = read_to_end(master)
    assert process.wait(PATIENCE) == 0
    text = received.decode()
    assert "fake, session s1" in text
    assert "user: " in text
    assert "unknown command /nonsense" in text
    assert "a new conversation, session chat-" in text
    assert "/latency" in text
    assert len(fake_server.requests) == 1


def test_interrupt_at_the_prompt_leaves_a_clean_line_and_the_session(cli: StartCli, fake_server: Any) -> None:
    master, slave = os.openpty()
    process = cli("chat", "--session", "s1", address=fake_server.address, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    os.write(master, b"hello\n")
    received = b""
    while received.count(b"> ") < 2:
        received += os.read(master, 4096)
    process.send_signal(signal.SIGINT)
    try:
        while True:
            # Between showing the prompt and waiting for a key, input() does not see a signal: its user presses again.
            while not select.select([master], [], [], 2.0)[0]:
                process.send_signal(signal.SIGINT)
            received += os.read(master, 4096)
    except OSError:
        pass
    os.close(master)
    assert process.wait(PATIENCE) == 130
    *_, prompt, last = received.decode().rstrip().split("\n")
    assert "> " in prompt
    assert last.endswith("continue with: scalellm chat --session s1\x1b[0m")


def test_interrupt_in_chat_stops_the_answer_and_stays(cli: StartCli, fake_server: Any) -> None:
    master, slave = os.openpty()
    process = cli("chat", address=fake_server.address, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    os.write(master, b"forever\n")
    received = b""
    while b"on and" not in received:
        received += os.read(master, 4096)
    process.send_signal(signal.SIGINT)
    assert fake_server.cancelled.wait(PATIENCE)
    while b"what was said is kept" not in received:
        received += os.read(master, 4096)
    os.write(master, b"and then?\n/exit\n")
    read_to_end(master)
    assert process.wait(PATIENCE) == 0
    roles = [(message.role, message.content.split(" ")[0]) for message in fake_server.requests[1].chat.messages]
    assert roles == [("user", "forever"), ("assistant", "on"), ("user", "and")]


class Talk:
    """A chat on a terminal of its own."""

    def __init__(self, cli: StartCli, fake_server: Any, *arguments: str, **variables: str) -> None:
        self._master, slave = os.openpty()
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        environment = {"TERM": "xterm", "NO_COLOR": "1", **variables}
        self._process = cli("chat", *arguments, address=fake_server.address, env=environment, **streams)
        os.close(slave)

    def say(self, text: str) -> None:
        os.write(self._master, text.encode())

    def end(self) -> str:
        self.say("/exit\r")
        received = read_to_end(self._master).decode()
        assert self._process.wait(PATIENCE) == 0
        return received


def questions(fake_server: Any) -> list[str]:
    return [request.chat.messages[-1].content for request in fake_server.requests]


def test_what_is_pasted_is_one_message_and_so_is_a_block(cli: StartCli, fake_server: Any) -> None:
    talk = Talk(cli, fake_server)
    talk.say(f"{ESCAPE}[200~one\ntwo\nthree{ESCAPE}[201~\r")
    talk.say('"""four\rfive\r"""\r')
    talk.say('"""six"""\r')
    talk.end()
    assert questions(fake_server) == ["one\ntwo\nthree", "four\nfive", "six"]


def test_lines_of_earlier_chats_are_remembered(cli: StartCli, fake_server: Any, tmp_path: Path) -> None:
    talk = Talk(cli, fake_server)
    talk.say("remember me\r")
    talk.end()
    assert (tmp_path / "chat_history").stat().st_mode & 0o777 == 0o600
    talk = Talk(cli, fake_server)
    talk.say(f"{ESCAPE}[A{ESCAPE}[A\r")  # up: /exit, then what was said before it
    talk.end()
    assert questions(fake_server) == ["remember me", "remember me"]


def test_settings_system_and_retry(cli: StartCli, fake_server: Any) -> None:
    talk = Talk(cli, fake_server, "--session", "s1")
    for line in (
        "first",
        "/set temperature 0.2",
        "/set seed 7",
        "/set colour red",
        "/set top_k 1.5",
        "second",
        "/retry",
    ):
        talk.say(f"{line}\r")
    for line in ("/set seed default", "/set", "/system Be brief.", "third", "/retry"):
        talk.say(f"{line}\r")
    shown = talk.end()
    assert questions(fake_server) == ["first", "second", "second", "third", "third"]
    first, second, again, third, last = fake_server.requests
    assert (first.sampling.temperature, first.sampling.max_tokens) == (pytest.approx(0.7), 512)
    for request in (second, again):
        assert (request.sampling.temperature, request.sampling.seed) == (pytest.approx(0.2), 7)
        assert request.session_id == "s1"
    assert [message.content for message in fake_server.sessions["s1"]] == ["first", "first", "second", "second"]
    assert "no setting 'colour'; there are: max_tokens, " in shown
    assert "top_k: '1.5' is not a whole number" in shown
    assert "temperature 0.2" in shown
    assert not last.sampling.HasField("seed")
    for request in (third, last):
        assert [message.role for message in request.chat.messages] == ["system", "user"]
    assert set(fake_server.sessions) == {"s1", third.session_id}


def test_an_answer_on_a_terminal_is_broken_between_words(cli: StartCli, fake_server: Any) -> None:
    talk = Talk(cli, fake_server, COLUMNS="40")
    talk.say("several words that are much too long for one line of this terminal\r")
    assert "several words that are much too long for\r\none line of this terminal" in talk.end()


def tools_file(folder: Path) -> str:
    path = folder / "tools.json"
    path.write_text('[{"type": "function", "function": {"name": "weather"}}]')
    return str(path)


def test_results_of_functions_are_asked_for(cli: StartCli, fake_server: Any, tmp_path: Path) -> None:
    talk = Talk(cli, fake_server, "--session", "s1", "--tools", tools_file(tmp_path))
    for line in ("Rome Paris", "", "sunny", "/set temperature 0.2", '"""rain\rand wind"""', "/retry", "Oslo", "/skip"):
        talk.say(f"{line}\r")
    talk.say("Bern\r")
    shown = talk.end()
    first, results, again, other, last = (request.chat.messages for request in fake_server.requests)
    assert [message.content for message in first] == ["Rome Paris"]
    for messages in (results, again):
        said = [(message.role, message.tool_call_id, message.content) for message in messages]
        assert said == [("tool", "c1", "sunny"), ("tool", "c2", "rain\nand wind")]
    assert [(message.role, message.content) for message in (*other, *last)] == [("user", "Oslo"), ("user", "Bern")]
    assert all(request.chat.tools for request in fake_server.requests)
    assert [message.role for message in fake_server.sessions["s1"][:5]] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
    for prompt in ("result of weather (c1)> ", "result of weather (c2)> "):
        assert prompt in shown


def test_a_session_that_waits_for_a_result_goes_on_with_it(
    cli: StartCli, run_cli: RunCli, fake_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--session", "s1", "--tools", tools_file(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Rome\nand then?\n"))
    code, out, err = run_cli("chat", *options, address=fake_server.address)
    assert (code, "weather" in out) == (1, True)
    told = "line 2: the model waits for the result of weather (c1), which can be given on a terminal only"
    assert told in " ".join(err.split())
    assert len(fake_server.requests) == 1, "the line is not taken for a message"
    talk = Talk(cli, fake_server, *options)
    talk.say("sunny\r")
    talk.end()
    (result,) = fake_server.requests[1].chat.messages
    assert (result.role, result.tool_call_id, result.content) == ("tool", "c1", "sunny")
