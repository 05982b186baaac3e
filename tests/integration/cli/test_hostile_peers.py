"""Every command against peers whose every string would drive, deceive or break the terminal that shows it."""

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hostile_text import HOSTILE, harmful_in
from scalellm.launcher import Instance, UpOptions, bring_up
from service_processes import PATIENCE

StartCli = Callable[..., subprocess.Popen[str]]
RunCli = Callable[..., tuple[int, str, str]]

# Nothing but text is expected on such a terminal, so that what is there besides came from the peer.
DUMB = {"TERM": "dumb", "NO_COLOR": "1"}


def on_terminal(cli: StartCli, *arguments: str, typed: str = "", **options: Any) -> str:
    """Output of the command when all its streams are a terminal; line ends as the command wrote them."""
    master, slave = os.openpty()
    process = cli(*arguments, stdin=slave, stdout=slave, stderr=slave, env=DUMB, **options)
    os.close(slave)
    os.write(master, typed.encode())
    received = b""
    try:
        while block := os.read(master, 4096):
            received += block
    except OSError:  # the other side is closed
        pass
    os.close(master)
    process.wait(PATIENCE)
    text = received.decode().replace("\r\n", "\n")
    assert "Traceback" not in text
    assert "31mB" in text, "the peer's text is there, and harmless"
    return text


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "x", "--show-latency"),
        ("generate", "x", "--n", "2"),
        ("generate", "x", "--json"),
        ("generate", "bad"),
        ("tokenize", "x"),
        ("tokenize", "x", "--json"),
        ("tokenize", "120", "--decode"),
        ("tokenize", "120", "--decode", "--json"),
    ],
)
def test_no_command_shows_what_a_terminal_obeys(cli: StartCli, hostile_server: Any, command: tuple[str, ...]) -> None:
    assert harmful_in(on_terminal(cli, *command, address=hostile_server.address)) == []


def test_chat_shows_nothing_that_a_terminal_obeys(cli: StartCli, hostile_server: Any) -> None:
    typed = "hello\n/history\n/latency\nagain\n/exit\n"
    shown = on_terminal(cli, "chat", "--session", "s", typed=typed, address=hostile_server.address)
    assert harmful_in(shown) == []


def test_a_message_is_one_line_whatever_the_server_says(run_cli: RunCli, hostile_server: Any) -> None:
    code, _, err = run_cli("generate", "bad", address=hostile_server.address)
    assert (code, err.count("\n")) == (2, 1)
    assert harmful_in(err) == []


def test_pipes_get_exactly_what_the_server_sent(run_cli: RunCli, hostile_server: Any) -> None:
    def out(*arguments: str) -> str:
        code, written, err = run_cli(*arguments, address=hostile_server.address)
        assert code == 0, err
        assert harmful_in(err) == []
        return written

    assert out("generate", "x") == f"{HOSTILE}\n"
    assert out("tokenize", "120", "--decode") == f"{HOSTILE}\n"
    document = out("generate", "x", "--json")
    assert harmful_in(document) == []
    assert json.loads(document)["samples"][0]["text"] == HOSTILE
    assert json.loads(document)["samples"][0]["finish_reason"] == "99"


def test_status_of_hostile_services(
    cli: StartCli, run_cli: RunCli, instance: Instance, up_options: Callable[..., UpOptions]
) -> None:
    hostile = dict.fromkeys(("executor", "scheduler", "tokenizer"), "hostile")

    class Report:
        def __init__(self) -> None:
            self.begin = self.waiting = self.done = lambda *_: None

    bring_up(instance, up_options(hostile), Report())
    assert harmful_in(on_terminal(cli, "status")) == []
    _, out, err = run_cli("status")
    assert harmful_in(out + err) == []
    _, out, _ = run_cli("status", "--json")
    assert harmful_in(out) == []
    services = {service["kind"]: service for service in json.loads(out)["services"]}
    assert services["executor"]["model"] == services["tokenizer"]["model"] == HOSTILE


@pytest.fixture
def hostile_metrics() -> Iterator[str]:
    label = HOSTILE.replace("\n", "\\n")

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f'scalellm_build_info{{service="{label}"}} 1\n'.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_top_of_a_hostile_endpoint(cli: StartCli, hostile_metrics: str) -> None:
    shown = on_terminal(cli, "top", "--once", "--interval", "0.1", "--metrics", hostile_metrics)
    assert harmful_in(shown) == []
