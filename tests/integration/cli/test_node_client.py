"""The Node.js client: generated code that is up to date, and an example that streams."""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def test_generated_code_is_up_to_date(node: StartNode, tmp_path: Path) -> None:
    for name in ("buf.gen.yaml", "node_modules"):
        (tmp_path / "clients" / "node").mkdir(parents=True, exist_ok=True)
        (tmp_path / "clients" / "node" / name).symlink_to(NODE_CLIENT / name)
    (tmp_path / "protos").symlink_to(NODE_CLIENT.parents[1] / "protos")
    script = """
        import { execFileSync } from "node:child_process";
        const path = `${process.cwd()}/node_modules/.bin:${process.env.PATH}`;
        const env = { ...process.env, PATH: path };
        execFileSync("buf", ["generate"], { cwd: process.argv[1], env, stdio: "inherit" });
    """
    code, _, err = finish(node("--input-type=module", "-e", script, str(tmp_path / "clients" / "node")))
    assert code == 0, err
    fresh = tmp_path / "clients" / "node" / "gen"
    written = {path.relative_to(fresh): path.read_text() for path in fresh.rglob("*") if path.is_file()}
    committed = NODE_CLIENT / "gen"
    kept = {path.relative_to(committed): path.read_text() for path in committed.rglob("*") if path.is_file()}
    assert written == kept, "run `npm run generate` in clients/node"


def test_lock_names_no_registry() -> None:
    assert "resolved" not in (NODE_CLIENT / "package-lock.json").read_text()
