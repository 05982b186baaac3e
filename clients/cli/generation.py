"""Runs one generation: prints it as it comes, keeps what the commands report afterwards."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from google.protobuf.message import Message

from scalellm.client import Client, ClientError, GenerationStream
from scalellm.v1.common_pb2 import FinishReason, TokenLogprobs
from scalellm.v1.generation_pb2 import (
    Delta,
    DeltaPart,
    Finished,
    GenerateRequest,
    PromptLogprobs,
    SessionOutcome,
    Started,
    ToolCallDelta,
)


class Sample:
    """One sample as received so far."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[dict[str, Any]] = []
        self.reasoning = ""
        self.calls: list[ToolCallDelta] = []
        """Complete ones, and what there is of the last one."""

    def add(self, delta: Delta) -> None:
        """Take in one delta."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.HasField("logprobs"):
            self.logprobs += logprob_entries(delta.logprobs)
        for part in delta.parts:
            self.reasoning += part.reasoning
            if part.HasField("tool_call"):
                self._add_call(part.tool_call)

    def _add_call(self, call: ToolCallDelta) -> None:
        if call.id:
            self.calls.append(call)
        elif self.calls:
            self.calls[-1].arguments += call.arguments


@contextlib.contextmanager
def _ctrl_c_closes(stream: GenerationStream) -> Iterator[None]:
    """Let Ctrl-C close the stream, and raise KeyboardInterrupt when the block has ended because of that.

    An exception that a signal raises inside gRPC can leave a lock taken, after which no call of the channel ever ends.
    The second Ctrl-C raises KeyboardInterrupt where the program is, for a stream that cannot be closed.
    """
    heard = threading.Event()

    def close(number: int, frame: FrameType | None) -> None:
        if heard.is_set():
            signal.default_int_handler(number, frame)
        heard.set()
        threading.Thread(target=stream.close, daemon=True).start()  # may wait for a lock that this thread holds

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, as for a job in the background
        yield
        return
    signal.signal(signal.SIGINT, close)
    try:
        yield
    except ClientError:
        if not heard.is_set():
            raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if heard.is_set():
        raise KeyboardInterrupt


class Generation:
    """One request and its answer.

    `measured_ns` is what the client measured from sending the request to the last message.
    """

    def __init__(self) -> None:
        self.started = Started()
        self.finished = Finished()
        self.prompt: list[dict[str, Any]] = []
        self.samples: dict[int, Sample] = {}
        self.measured_ns = 0

    def run(
        self,
        client: Client,
        request: GenerateRequest,
        on_text: Callable[[str], None],
        *,
        timeout: float | None = None,
        on_part: Callable[[DeltaPart], None] | None = None,
    ) -> None:
        """Send the request and take in the answer; `on_text` gets each new piece of text. Raises ClientError.

        `on_part`, if there is one, gets what is told of reasoning, text and calls in place of that.

        Any exception, Ctrl-C included, cancels the request down to the executor.
        """
        begun = time.monotonic_ns()
        try:
            self._run(client, request, on_text, on_part, timeout, begun)
        except BaseException:
            if self.started.resumable:  # it would go on without us
                with contextlib.suppress(ClientError):
                    client.cancel(self.started.request_id)
            raise

    def _run(
        self,
        client: Client,
        request: GenerateRequest,
        on_text: Callable[[str], None],
        on_part: Callable[[DeltaPart], None] | None,
        timeout: float | None,
        begun: int,
    ) -> None:
        with client.generate(request, timeout=timeout) as stream, _ctrl_c_closes(stream):
            for response in stream:
                match response.WhichOneof("event"):
                    case "started":
                        self.started = response.started
                    case "delta":
                        self.samples.setdefault(response.delta.index, Sample()).add(response.delta)
                        if on_part is not None and response.delta.parts:
                            for part in response.delta.parts:
                                on_part(part)
                        elif response.delta.text:
                            on_text(response.delta.text)
                    case "prompt_logprobs":
                        self.prompt += prompt_entries(response.prompt_logprobs)
                    case "finished":
                        self.finished = response.finished
                        self.measured_ns = time.monotonic_ns() - begun

    def to_json(self) -> dict[str, Any]:
        """Return the document that `generate --json` prints."""
        document: dict[str, Any] = {
            "request_id": self.started.request_id,
            "model": self.started.model,
            "seed": self.started.seed,
            "samples": [self._sample_json(finish.index) for finish in self.finished.samples],
            "usage": _numbers(self.finished.usage),
            "latency": {**_numbers(self.finished.latency), "client_total_ns": self.measured_ns},
        }
        if self.finished.session:
            document["session"] = _short(SessionOutcome, self.finished.session, "SESSION_OUTCOME_")
        if self.prompt:
            document["prompt_logprobs"] = self.prompt
        return document

    def _sample_json(self, index: int) -> dict[str, Any]:
        sample = self.samples.get(index, Sample())
        finish = next(finish for finish in self.finished.samples if finish.index == index)
        document: dict[str, Any] = {
            "index": index,
            "text": sample.text,
            "finish_reason": _short(FinishReason, finish.reason, "FINISH_REASON_"),
        }
        if (matched := finish.WhichOneof("matched")) is not None:
            document[matched] = getattr(finish, matched)
        if sample.reasoning:
            document["reasoning"] = sample.reasoning
        if sample.calls:
            document["tool_calls"] = [
                {"id": call.id, "name": call.name, "arguments": call.arguments} for call in sample.calls
            ]
        if sample.token_ids:
            document["token_ids"] = sample.token_ids
        if sample.logprobs:
            document["logprobs"] = sample.logprobs
        return document


def logprob_entries(logprobs: TokenLogprobs) -> list[dict[str, Any]]:
    """One entry per token: its log-probability and the most likely alternatives."""
    top = logprobs.num_top
    entries = []
    for position, value in enumerate(logprobs.logprobs):
        ids = logprobs.top_token_ids[position * top : (position + 1) * top]
        values = logprobs.top_logprobs[position * top : (position + 1) * top]
        alternatives = [{"token_id": id_, "logprob": logprob} for id_, logprob in zip(ids, values, strict=True)]
        entries.append({"logprob": value, **({"top": alternatives} if top else {})})
    return entries


def prompt_entries(part: PromptLogprobs) -> list[dict[str, Any]]:
    """One entry per token of the prompt; the first one is alone: nothing was likely before it."""
    entries = [
        {"token_id": token_id, **entry}
        for token_id, entry in zip(part.token_ids, logprob_entries(part.logprobs), strict=True)
    ]
    if part.offset == 0:
        for entry in entries[:1]:
            entry.pop("top", None)
    return entries


def _numbers(message: Message) -> dict[str, Any]:
    """All scalar fields, those that are 0 included; numbers stay numbers, which protobuf's own JSON does not do."""
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}


def _short(enum: Any, value: int, prefix: str) -> str:
    """The name of an enum's value; its number where a newer server has values that are not known here."""
    if value not in enum.values():
        return str(value)
    name: str = enum.Name(value)
    return name.removeprefix(prefix).lower()
