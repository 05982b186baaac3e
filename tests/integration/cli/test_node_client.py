"""The Node.js client, and its example that streams."""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trustme

from certificates import issue
from hostile_text import harmful_in
from service_processes import PATIENCE

StartNode = Callable[..., subprocess.Popen[str]]
NODE_CLIENT = Path(__file__).parents[3] / "clients" / "node"


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def test_example_streams(node: StartNode, fake_server: Any) -> None:
    code, out, err = finish(node("generate.mjs", "three plain words", fake_server.address, "5"))
    assert (code, out) == (0, "three plain words \n"), err
    assert err == "STOP: 3 + 2 tokens, first after 0.0 ms, all after 5.0 ms\n"
    (request,) = fake_server.requests
    assert (request.prompt, request.sampling.max_tokens) == ("three plain words", 5)
    assert request.sampling.HasField("temperature")


def test_example_says_what_went_wrong(node: StartNode, fake_server: Any) -> None:
    code, _, err = finish(node("generate.mjs", "bad", fake_server.address))
    assert (code, err) == (1, "error: INVALID_ARGUMENT: sampling.top_p: must be in (0, 1], got 7\n")


def localhost(secured_server: Any) -> str:
    """The server's address with a name: Node.js warns of certificates that are checked for a number."""
    return f"localhost:{secured_server.server.address.rpartition(':')[2]}"


def test_key_and_tls(node: StartNode, secured_server: Any, tmp_path: Path) -> None:
    identity, server, address = secured_server.identity, secured_server.server, localhost(secured_server)
    certificate = {"SCALELLM_TLS_CERT": str(identity.cert), "SCALELLM_TLS_KEY": str(identity.key)}
    tls = {"SCALELLM_TLS_CA": str(identity.ca), **certificate}
    key = {"SCALELLM_API_KEY": "slm-secret"}
    other = issue(tmp_path / "other", trustme.CA())
    code, out, err = finish(node("generate.mjs", "three plain words", address, **tls, **key))
    assert (code, out) == (0, "three plain words \n"), err
    guess = {"SCALELLM_API_KEY": "slm-guess"}
    refused = finish(node("generate.mjs", "x", address, **tls, **guess))
    assert refused[:2] == (1, "")
    assert refused[2] == "error: UNAUTHENTICATED: no valid API key\n"
    # Nothing to show, nobody to trust, or no TLS at all: the call does not get through.
    for shown in ({"SCALELLM_TLS_CA": str(identity.ca)}, {**tls, "SCALELLM_TLS_CA": str(other.ca)}, {}):
        code, out, err = finish(node("generate.mjs", "x", address, **shown, **key))
        assert (code, out) == (1, "")
        assert err.startswith("error: UNAVAILABLE: ")
    assert len(server.requests) == 1


def test_public_authorities_are_trusted_by_default(node: StartNode, secured_server: Any) -> None:
    """`tls` without `ca` trusts public authorities, for which this variable puts others."""
    script = """
        import { readFileSync } from "node:fs";
        import { connect, Generation } from "./client.mjs";
        const [address, cert, key] = process.argv.slice(1);
        const tls = { cert: readFileSync(cert), key: readFileSync(key), name: "localhost" };
        const client = connect(Generation, address, { apiKey: "slm-secret", tls });
        const deadline = Date.now() + 60_000;
        for await (const { event, delta } of client.generate({ prompt: "yes" }, { deadline })) {
          if (event === "delta") process.stdout.write(delta.text);
        }
        client.close();
    """
    identity = secured_server.identity
    arguments = ("--input-type=module", "-e", script, localhost(secured_server), str(identity.cert), str(identity.key))
    code, out, err = finish(node(*arguments, GRPC_DEFAULT_SSL_ROOTS_FILE_PATH=str(identity.ca)))
    assert (code, out) == (0, "yes "), err
    assert finish(node(*arguments))[0] != 0


def test_example_shows_nothing_that_a_terminal_obeys(node: StartNode, hostile_server: Any) -> None:
    code, out, err = finish(node("generate.mjs", "bad", hostile_server.address))
    assert (code, out) == (1, "")
    assert "31mB" in err
    assert harmful_in(err.replace("\ufeff", "").replace("\U000e0041", "")) == []


def test_interrupt_cancels_the_request(node: StartNode, fake_server: Any) -> None:
    process = node("generate.mjs", "forever", fake_server.address)
    assert process.stdout is not None
    process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    assert fake_server.cancelled.wait(PATIENCE)
    assert finish(process)[0] == 130


def test_wrong_usage_is_told(node: StartNode) -> None:
    code, _, err = finish(node("generate.mjs", "x", "127.0.0.1:1", "many"))
    assert (code, err) == (2, "usage: node generate.mjs PROMPT [HOST:PORT] [MAX_TOKENS]\n")


def test_closed_pipe_is_quiet_and_cancels(node: StartNode, fake_server: Any) -> None:
    process = node("generate.mjs", "forever", fake_server.address)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(3)
    process.stdout.close()
    assert fake_server.cancelled.wait(PATIENCE)
    assert process.wait(PATIENCE) == 141
    assert process.stderr.read() == ""


def test_lock_names_no_registry() -> None:
    assert "resolved" not in (NODE_CLIENT / "package-lock.json").read_text()
