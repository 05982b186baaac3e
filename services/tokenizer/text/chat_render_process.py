"""The process that renders chat templates: reads a request from stdin, writes the answer to stdout, until stdin ends.

Frames are a 4-byte little-endian length and JSON. The first request holds the template and the limits.
"""

import json
import resource
import signal
import struct
import sys
from typing import IO, Any

from services.tokenizer.text.chat_template import ChatTemplate, ChatTemplateError

LENGTH = struct.Struct("<I")


def main() -> None:
    """Serve until stdin ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    setup = _read(requests)
    if setup is None:
        return
    # Ctrl-C reaches the whole process group; the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], setup["memory_bytes"]))
    try:
        template = ChatTemplate(setup["source"], setup["special_tokens"], max_chars=setup["max_chars"])
    except ChatTemplateError as error:
        _write(answers, {"error": str(error)})
        return
    _write(answers, {})
    while (request := _read(requests)) is not None:
        # The parent kills a render that takes too long. Should it be gone, the kernel does: the default action of
        # SIGALRM ends the process whatever it is doing, also inside one long call of a C function.
        signal.setitimer(signal.ITIMER_REAL, setup["time_limit"] + 1.0)
        _write(answers, _render(template, request))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _render(template: ChatTemplate, request: dict[str, Any]) -> dict[str, Any]:
    try:
        text = template.render(request["messages"], add_generation_prompt=request["add_generation_prompt"])
    except ChatTemplateError as error:
        return {"error": str(error)}
    except (MemoryError, OverflowError):
        return {"error": "the chat template needs more memory than the limit"}
    return {"text": text}


def _read(stream: IO[bytes]) -> dict[str, Any] | None:
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    value: dict[str, Any] = json.loads(stream.read(LENGTH.unpack(header)[0]))
    return value


def _write(stream: IO[bytes], value: dict[str, Any]) -> None:
    data = json.dumps(value).encode("ascii")
    stream.write(LENGTH.pack(len(data)) + data)
    stream.flush()


if __name__ == "__main__":
    main()
