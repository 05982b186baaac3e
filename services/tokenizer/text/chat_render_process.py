"""The process that renders chat templates. It reads requests from stdin and writes answers to stdout, until stdin ends.

The first request contains the template and the limits.
"""

import resource
import signal
import sys
from typing import Any

from scalellm.services.common.json_lines import read_line, write_line
from scalellm.services.tokenizer.text.chat_template import ChatTemplate
from scalellm.services.tokenizer.text.chat_template_error import ChatTemplateError


def main() -> None:
    """Serve until stdin ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    setup = read_line(requests)
    if setup is None:
        return
    # Ctrl-C signals the whole process group, but the parent alone ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], setup["memory_bytes"]))
    try:
        template = ChatTemplate(setup["source"], setup["special_tokens"], max_chars=setup["max_chars"])
    except ChatTemplateError as error:
        write_line(answers, {"error": str(error)})
        return
    write_line(answers, {})
    while (request := read_line(requests)) is not None:
        # Of CPU time, as a template is not slower where the machine is busy. The default action of SIGPROF ends the
        # process whatever it is doing, also inside one long call of a C function; the parent knows the signal.
        signal.setitimer(signal.ITIMER_PROF, setup["time_limit"])
        answer = _render(template, request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_line(answers, answer)


def _render(template: ChatTemplate, request: dict[str, Any]) -> dict[str, Any]:
    try:
        text = template.render(request.pop("messages"), **request)
    except ChatTemplateError as error:
        return {"error": str(error)}
    except (MemoryError, OverflowError):
        return {"error": "the chat template needs more memory than the limit"}
    return {"text": text}


if __name__ == "__main__":
    main()
