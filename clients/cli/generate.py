"""`scalellm generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from scalellm.cli.answer_view import AnswerView, calls_of
from scalellm.cli.context import CliContext, CliError, ExitCode, ModelOption, check_timeout
from scalellm.cli.generation import Generation
from scalellm.cli.latency import print_breakdown
from scalellm.cli.output import write_json, write_text
from scalellm.cli.sampling_options import help_of, with_sampling_options
from scalellm.cli.shape import read_shape
from scalellm.cli.text import read_text
from scalellm.cli.tools import CHOICE_HELP, TOOLS_HELP, offer_tools
from scalellm.services.common.field_rules import MAX_STRUCTURE_BYTES, REQUEST, STRUCTURE_LISTS
from scalellm.v1.common_pb2 import SamplingParams
from scalellm.v1.generation_pb2 import (
    ON_DISCONNECT_KEEP,
    OUTPUT_TEXT_AND_TOKEN_IDS,
    ChatMessage,
    DeltaPart,
    GenerateRequest,
    SessionOutcome,
)

HELP = """Generate text, streaming.

PROMPT is continued as it stands; with --chat it is a message that the model answers. Without PROMPT, it is
read from standard input (less its last line break).

\b
Examples:
  scalellm generate "Once upon a time" --max-tokens 64
  scalellm generate --chat "Name three primes." --temperature 0 --show-latency
  scalellm generate "Q: 6*7? A:" --stop "\\n" --n 3 --seed 1
  scalellm generate --chat "Is water wet?" --choice yes --choice no
  scalellm generate --chat "Who wrote Faust?" --json-schema author.json --max-tokens 64
  scalellm generate --chat "Is it raining in Rome?" --tools tools.json --tool-choice required
  echo "The sky is" | scalellm generate --json | jq -r '.samples[0].text'
"""


def _option(help_text: str, metavar: str = "NUMBER", *names: str) -> Any:
    return typer.Option(*names, help=help_text, metavar=metavar, show_default=False)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("generate", help=HELP)(generate)


@with_sampling_options
def generate(
    ctx: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="The text; - or nothing: standard input.")] = None,
    *,
    model: ModelOption = "",
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message to answer.")] = False,
    system: Annotated[str | None, _option("Instructions for the model; needs --chat.", "TEXT")] = None,
    session: Annotated[str | None, _option("Continue this conversation; needs --chat.", "ID")] = None,
    sampling: Mapping[str, Any],
    logit_bias: Annotated[list[str] | None, _option("Add VALUE to a token's logit; repeatable.", "ID=VALUE")] = None,
    stop: Annotated[list[str] | None, _option("End at this text; repeatable. \\n is a line break.", "TEXT")] = None,
    include_stop: Annotated[bool, typer.Option("--include-stop", help="Keep the stop text.")] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Go on where the answer was, if the connection or the server is lost.")
    ] = False,
    stop_token_id: Annotated[list[int] | None, _option("End at this token; repeatable.", "ID")] = None,
    json_schema: Annotated[
        Path | None, _option(f"Write JSON of this schema; at most {MAX_STRUCTURE_BYTES} bytes.", "FILE")
    ] = None,
    regex: Annotated[str | None, _option("Write a text that this expression matches as a whole.", "REGEX")] = None,
    choice: Annotated[
        list[str] | None,
        _option(f"Write one of these texts; repeatable, {STRUCTURE_LISTS['choice.texts'].limits}.", "TEXT"),
    ] = None,
    tools: Annotated[Path | None, _option(f"{TOOLS_HELP} Needs --chat.", "FILE")] = None,
    tool_choice: Annotated[str | None, _option(f"{CHOICE_HELP} Needs --tools.", "CHOICE")] = None,
    priority: Annotated[int | None, _option(help_of(REQUEST["priority"]))] = None,
    request_id: Annotated[str | None, _option("Name of the request in logs.", "ID")] = None,
    timeout: Annotated[float | None, _option("Deadline of the request.", "SECONDS")] = None,
    show_latency: Annotated[bool, typer.Option("--show-latency", help="Show where the time went.")] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON document at the end; --logprobs and --prompt-logprobs need it."),
    ] = False,
    address: Annotated[str, _option("Server to call.", "HOST:PORT")] = "",
) -> None:
    """One request."""
    if not chat and (system is not None or session is not None):
        raise CliError("--system and --session need --chat", ExitCode.USAGE)
    if not chat and tools is not None:
        raise CliError("--tools needs --chat", ExitCode.USAGE)
    if not as_json and not sampling.keys().isdisjoint(("logprobs", "prompt_logprobs")):
        raise CliError("--logprobs and --prompt-logprobs need --json", ExitCode.USAGE)
    context = CliContext.of(ctx)
    request = GenerateRequest(model=model)
    _fill(request.sampling, sampling)
    _fill(request, {"priority": priority, "request_id": request_id, "session_id": session})
    for text in logit_bias or ():
        _add_logit_bias(request.sampling, text)
    for token_id in stop_token_id or ():
        _guard("stop-token-id", token_id, lambda id_=token_id: request.sampling.stop_token_ids.append(id_))
    request.stop.extend(text.replace("\\n", "\n") for text in stop or ())
    if include_stop:
        request.include_stop = True
    if keep:
        request.on_disconnect = ON_DISCONNECT_KEEP
    if as_json:
        request.output = OUTPUT_TEXT_AND_TOKEN_IDS
    if (shape := read_shape(json_schema, regex, choice or ())) is not None:
        request.structured_output.CopyFrom(shape)
    offer_tools(request.chat, tools, tool_choice)
    check_timeout(timeout)
    text = read_text(prompt, "prompt")
    if chat:
        roles = [("system", system)] if system is not None else []
        messages = [ChatMessage(role=role, content=content) for role, content in (*roles, ("user", text))]
        request.chat.messages.extend(messages)
    else:
        request.prompt = text

    generation = Generation()
    is_streamed = not as_json and sampling.get("n", 1) == 1
    with context.connect(address) as client:
        view = AnswerView(write_text, lambda text: None)
        show = view.show if is_streamed and request.chat.tools else None
        run_streaming(client, request, generation, is_streamed=is_streamed, timeout=timeout, show=show)
    if as_json:
        try:
            document = generation.to_json()
        except ValueError as error:
            raise CliError(f"the server's answer contradicts itself: {error}") from None
        write_json(document)
    elif not is_streamed:
        for index, sample in sorted(generation.samples.items()):
            write_text(f"--- sample {index}\n{sample.text}{calls_of(sample.calls)}\n")
    warn_about_session(context, generation)
    if show_latency:
        print_breakdown(context.err, generation.finished, generation.measured_ns)


def run_streaming(
    client: Any,
    request: GenerateRequest,
    generation: Generation,
    *,
    is_streamed: bool,
    timeout: float | None,
    write: Callable[[str], None] = write_text,
    show: Callable[[DeltaPart], None] | None = None,
) -> None:
    """Run it, writing the text as it comes; a line that was begun is ended, however it goes.

    `show`, if there is one, gets what is told of reasoning, text and calls.
    """
    begun = False

    def on_text(text: str) -> None:
        nonlocal begun
        if is_streamed:
            begun = True
            write(text)

    def on_part(part: DeltaPart) -> None:
        nonlocal begun
        begun = True
        assert show is not None
        show(part)

    try:
        generation.run(client, request, on_text, timeout=timeout, on_part=on_part if show is not None else None)
    except BrokenPipeError:
        begun = False
        raise
    finally:
        if begun:
            write("\n")


def warn_about_session(context: CliContext, generation: Generation) -> None:
    """Say when a turn was answered but not stored."""
    outcome = generation.finished.session
    if outcome == SessionOutcome.SESSION_OUTCOME_CONFLICT:
        context.warn("another turn of this session was stored meanwhile; this one is not part of it")
    elif outcome == SessionOutcome.SESSION_OUTCOME_UNAVAILABLE:
        context.warn("the session store cannot be reached; this turn is not stored")
    elif outcome == SessionOutcome.SESSION_OUTCOME_FULL:
        context.warn(
            "your sessions hold as much as they may; this turn is not stored: delete some, or wait for their end"
        )


def _fill(message: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if value is not None:
            _guard(name.replace("_", "-"), value, lambda name=name, value=value: setattr(message, name, value))


def _add_logit_bias(sampling: SamplingParams, text: str) -> None:
    id_, _, value = text.partition("=")
    try:
        sampling.logit_bias.add(token_id=int(id_), bias=float(value))
    except ValueError:
        raise CliError(f"--logit-bias: {text!r} is not ID=VALUE, such as 42=-5", ExitCode.USAGE) from None


def _guard(option: str, value: Any, assign: Any) -> None:
    """Assign; what does not fit the field's type is wrong input and not a crash."""
    try:
        assign()
    except ValueError:
        raise CliError(f"--{option}: {value} is out of range", ExitCode.USAGE) from None
