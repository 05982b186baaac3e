"""The command line, the Python client and the Node.js client on the whole line with a real model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import openai
import psutil
import pydantic
import pytest

from scalellm.client import Client
from scalellm.launcher import Instance, read_status
from scalellm.v1.generation_pb2 import Chat, ChatMessage, GenerateRequest
from service_processes import PATIENCE

PARTS = ("session", "tokenize", "admission", "queue", "prefill", "decode", "failover", "detokenize", "network")


@dataclass(frozen=True)
class Line:
    """A running line and how to use it."""

    home: Path
    address: str

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return start_cli(self.home, *arguments)

    def run(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err


def start_cli(home: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "SCALELLM_HOME": str(home), "SCALELLM_ADDRESS": "", "REDIS_URL": ""}
    environment |= {"SCALELLM_TOKENIZER_WORKERS": "1"}
    command = [sys.executable, "-m", "scalellm.cli.main", *arguments]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **pipes)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, model_dir: Callable[[str], Path]) -> Iterator[Line]:
    home = tmp_path_factory.mktemp("home")
    model = model_dir("smollm2-135m-instruct")
    process = start_cli(home, "up", "--port", "0", "--model", str(model))
    out, err = process.communicate(timeout=4 * PATIENCE)
    assert process.returncode == 0, err
    line = Line(home, read_status(Instance(home)).address)
    pids = [service.pid for service in read_status(Instance(home)).services]
    try:
        yield line
    finally:
        code, out, err = line.run("down")
    assert (code, out) == (0, "stopped\n"), err
    assert not [pid for pid in pids if is_running(pid)]
    assert list((home / "run").iterdir()) == []


def test_status_is_healthy(line: Line) -> None:
    deadline = time.monotonic() + PATIENCE
    while (answer := line.run("status", "--json"))[0]:  # each service is given two seconds to answer
        assert time.monotonic() < deadline, answer
    _, out, _ = answer
    status = json.loads(out)
    assert status["address"] == line.address
    assert [service["kind"] for service in status["services"]] == ["redis", "executor", "scheduler", "tokenizer"]
    assert {service["health"] for service in status["services"]} == {"serving"}


def test_generate_reports_a_breakdown_that_adds_up(line: Line) -> None:
    code, out, err = line.run(
        "generate", "The capital of France is", "--temperature", "0", "--max-tokens", "6", "--json"
    )
    assert code == 0, err
    document = json.loads(out)
    assert document["samples"][0]["text"].startswith(" Paris")
    assert document["usage"]["completion_tokens"] == 6
    latency = document["latency"]
    assert sum(latency[f"{part}_ns"] for part in PARTS) == latency["total_ns"]
    assert latency["total_ns"] <= latency["client_total_ns"]


def test_node_streams_the_same_completion(line: Line, node: Callable[..., subprocess.Popen[str]]) -> None:
    process = node("generate.mjs", "The capital of France is", line.address, "6")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    _, same, _ = line.run("generate", "The capital of France is", "--temperature", "0", "--max-tokens", "6")
    assert out == same
    assert err.startswith("LENGTH: 5 + 6 tokens")


def test_a_deadline_in_the_far_future_is_none(line: Line, node: Callable[..., subprocess.Popen[str]]) -> None:
    # Other than Python's, this client can say every deadline that gRPC has, up to eleven thousand years.
    script = """
        import { connect, Generation } from "./client.mjs";
        const client = connect(Generation, process.argv[1]);
        const request = { prompt: "x", sampling: { maxTokens: 1 } };
        const call = client.generate(request, { deadline: Date.now() + 3e14 });
        for await (const { event } of call) console.log(event);
        client.close();
    """
    out, err = node("--input-type=module", "-e", script, line.address).communicate(timeout=PATIENCE)
    assert out.split()[-1:] == ["finished"], err


def test_python_client_session(line: Line) -> None:
    with Client(line.address) as client:
        for text in ("My name is Ada.", "What is my name?"):
            request = GenerateRequest(chat=Chat(messages=[ChatMessage(role="user", content=text)]), session_id="s1")
            request.sampling.max_tokens = 4
            request.sampling.temperature = 0
            with client.generate(request, timeout=PATIENCE) as stream:
                last = list(stream)[-1].finished
        assert last.usage.cached_tokens > 0
        assert [message.role for message in client.get_session("s1").messages][-4:] == ["user", "assistant"] * 2
        assert [session.session_id for session in client.list_sessions()] == ["s1"]
        client.fork_session("s1", "s2", num_turns=1)
        assert client.get_session("s2").num_turns == 1
        client.delete_session("s1")
        client.delete_session("s2")
        assert list(client.list_sessions()) == []


class Author(pydantic.BaseModel):
    """Schema of the answer, which the model fills in."""

    model_config = pydantic.ConfigDict(extra="forbid")
    name: Annotated[str, pydantic.Field(max_length=4)]
    born: Annotated[int, pydantic.Field(ge=1000, le=2020)]
    language: Literal["German", "French", "English"]


def test_answers_have_the_shape_that_is_asked_for(line: Line, tmp_path: Path) -> None:
    file = tmp_path / "author.json"
    file.write_text(json.dumps(Author.model_json_schema()))
    hot = ("--chat", "Who wrote Faust?", "--temperature", "2", "--seed", "3", "--max-tokens", "200")
    code, out, err = line.run("generate", *hot, "--json-schema", str(file))
    assert code == 0, err
    Author.model_validate_json(out)
    code, out, err = line.run("generate", *hot, "--choice", "Goethe", "--choice", "Schiller", "--n", "2", "--json")
    assert {sample["text"] for sample in json.loads(out)["samples"]} <= {"Goethe", "Schiller"}, err
    code, out, err = line.run("generate", *hot, "--regex", "(?=a)b")
    assert (code, out) == (2, "")
    assert "structured_output: " in err
    assert "look-ahead" in err


def test_openais_client_parses_answers(line: Line) -> None:
    http = read_status(Instance(line.home)).http_address
    with openai.OpenAI(base_url=f"http://{http}/v1", api_key="none", timeout=PATIENCE) as ai:
        asked: Any = {"model": "smollm2-135m-instruct", "temperature": 2.0, "timeout": PATIENCE}
        messages: Any = [{"role": "user", "content": "Who wrote Faust?"}]
        chat = ai.chat.completions.parse(messages=messages, response_format=Author, max_tokens=200, seed=1, **asked)
        assert isinstance(chat.choices[0].message.parsed, Author)
        response = ai.responses.parse(input="Who wrote Faust?", text_format=Author, max_output_tokens=200, **asked)
        assert isinstance(response.output_parsed, Author)
        no_schema: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"uniqueItems": True}}}
        with pytest.raises(openai.BadRequestError, match=r"response_format\.json_schema\.schema: .*'uniqueItems'"):
            ai.chat.completions.create(messages=messages, response_format=no_schema, **asked)
        cut = ai.chat.completions.create(
            messages=messages, response_format={"type": "json_object"}, max_tokens=1, **asked
        )
        assert cut.choices[0].finish_reason == "length"


def test_interrupt_frees_the_executor(line: Line) -> None:
    process = line.start("generate", "Once upon a time", "--ignore-eos", "--max-tokens", "4000")
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    deadline = time.monotonic() + PATIENCE
    while any(service.load.get("running") for service in read_status(Instance(line.home)).services):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_bad_input_names_the_field_and_the_limit(line: Line) -> None:
    code, _, err = line.run("generate", "x", "--top-p", "7")
    assert code == 2
    assert "top_p" in err
    assert "(0, 1]" in err


def test_second_up_is_refused(line: Line) -> None:
    code, _, err = line.run("up", "--port", "0")
    assert code == 1
    assert err.startswith(f"error: already running at {line.address} ")


def test_interrupted_up_leaves_nothing(line: Line, model_dir: Callable[[str], Path]) -> None:
    model = str(model_dir("smollm2-135m-instruct"))
    process = line.start("--instance", "second", "up", "--port", "0", "--model", model)
    assert process.stderr is not None
    while not process.stderr.readline().startswith("executor-0"):
        pass
    state = Instance(line.home, "second").load()  # its status would take longer to tell than others take to start
    process.send_signal(signal.SIGINT)
    assert state is not None
    pids = [service.pid for service in state.services]
    assert process.wait(PATIENCE) == 130
    assert len(pids) >= 2
    assert not [pid for pid in pids if is_running(pid)]
    assert Instance(line.home, "second").load() is None
    shutil.rmtree(line.home / "run" / "second")  # its logs
