"""`scalellm up`, `down`, `status` and `run`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from scalellm.cli.config import take_config
from scalellm.cli.context import DEFAULT_INSTANCE, MAX_UINT32, CliContext, ExitCode
from scalellm.cli.generate import run_streaming
from scalellm.cli.generation import Generation
from scalellm.cli.latency import print_breakdown
from scalellm.cli.models import fetch_model, fetch_models
from scalellm.cli.output import write_json, write_line
from scalellm.cli.progress import StageReport
from scalellm.cli.service_environment import service_environment
from scalellm.cli.status_table import engine_lines, fitting_table
from scalellm.launcher import (
    PUBLIC_PORT,
    EngineKind,
    NotRunningError,
    State,
    UpOptions,
    bring_down,
    bring_up,
    check_not_running,
    read_status,
    run_in_foreground,
    running_state,
)
from scalellm.launcher.instance import TOKENIZER
from scalellm.services.common.addresses import bare_host
from scalellm.services.common.model_store import name_of
from scalellm.v1.generation_pb2 import Chat, ChatMessage, GenerateRequest

DEFAULT_MODEL = "smollm2-135m-instruct"

DEFAULT_PROMPT = "What is the capital of France, and what is it known for?"

UP_HELP = """Start Redis, the executors, the scheduler and the tokenizer in the background.

Returns once all of them are healthy. A model of the catalogue is fetched first if it is not here.

What ends on its own is started again, where it was, until `down`; a service that crashes too often is given up
(see: scalellm status). Run again, `up` starts what is missing and leaves the rest as it is.

\b
Examples:
  scalellm up
  scalellm up --model Qwen/Qwen3-0.6B          from the Hugging Face Hub
  scalellm up --model ./my-model --executors 2
  scalellm up --model smollm2-135m-instruct --model big=./my-model    side by side; requests choose by name
  scalellm up --executor fake                  scripted tokens, no weights: for load and fault tests
  scalellm --instance second up --port 0       beside another instance, on free ports
  REDIS_URL=redis://host:6379/0 scalellm up    with your own Redis
  scalellm up --quantization int8 --max-model-len 8192
  SCALELLM_EXECUTOR_NUM_BLOCKS=512 scalellm up with any setting of a service
  scalellm up --foreground                     until Ctrl-C or SIGTERM; exits with 1 when a service is given up
  scalellm up --config scalellm.toml           with a file of settings, see: scalellm config show
"""

SERVE = "serve"
SERVE_HELP = "Start everything in the foreground: the same as `scalellm up --foreground`, with all its options."

DOWN_HELP = """Drain and stop the services.

New requests are refused, running ones get the drain limit to finish; what does not end by then is killed.
"""

STATUS_HELP = """Show every service: process, address, health, load, model, last error.

Exits with 0 when all are healthy, 1 when something is not, 3 when nothing was started.
"""

RUN_HELP = """Answer one prompt with everything that belongs to it, and show where the time went.

Starts the services when they are not running, and then stops them again unless --keep is given.

\b
Examples:
  scalellm run
  scalellm run "Write a haiku about rivers." --keep
"""


def _setting(help_text: str, metavar: str) -> Any:
    return typer.Option(help=help_text, metavar=metavar, show_default=False)


_MODEL = "A name from `models list`, org/name of the Hub, a folder or .gguf"


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("run", help=RUN_HELP, short_help="Start everything, answer one prompt, stop.")(run)
    app.command("up", help=UP_HELP, short_help="Start the services in the background.")(up)
    app.command(SERVE, help=SERVE_HELP, short_help="Start the services in the foreground.")(up)
    app.command("down", help=DOWN_HELP)(down)
    app.command("status", help=STATUS_HELP, short_help="Show health, load and last error of every service.")(status)


def _check_host(value: str) -> str:
    try:
        return bare_host(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def up(
    ctx: typer.Context,
    *,
    model: Annotated[
        list[str],
        typer.Option(
            metavar="NAME|PATH",
            help=f"{_MODEL}. Repeatable: several, the first one the default; NAME=MODEL names one.",
            default_factory=lambda: [DEFAULT_MODEL],
            show_default=DEFAULT_MODEL,
        ),
    ],
    executors: Annotated[int, typer.Option(min=1, max=64, help="Number of executors of each model.")] = 1,
    executor: Annotated[EngineKind, typer.Option(help="Kind of engine in the executors.")] = EngineKind.MODEL,
    host: Annotated[
        str, typer.Option(callback=_check_host, help="Address on which clients are served; 0.0.0.0 or :: for all.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port for clients; 0: free ones for all services.")
    ] = PUBLIC_PORT,
    http_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Port for clients that speak HTTP; 0: a free one. Default: 8000; a free one with another --port.",
            show_default=False,
        ),
    ] = None,
    served_model_name: Annotated[str, _setting("Name by which clients know the model, if it is one.", "NAME")] = "",
    aliases: Annotated[Path | None, _setting("TOML file of names that stand for models, by weights.", "FILE")] = None,
    api_key: Annotated[str, _setting("Key that clients have to show; SCALELLM_API_KEY shows it.", "KEY")] = "",
    quantization: Annotated[
        str | None, _setting("Form of the weights: none, keep (as the file has it), int8, ...", "KIND")
    ] = None,
    speculation: Annotated[str | None, _setting("Guess tokens and check them: auto, off.", "KIND")] = None,
    dtype: Annotated[str | None, _setting("Type of activations: float32, bfloat16, float16.", "TYPE")] = None,
    kv_cache_dtype: Annotated[str | None, _setting("Type of cached keys and values: int8, fp8, ...", "TYPE")] = None,
    max_model_len: Annotated[int | None, _setting("Longest prompt plus output, in tokens.", "TOKENS")] = None,
    max_num_seqs: Annotated[int | None, _setting("Sequences that run at once.", "NUMBER")] = None,
    tensor_parallel: Annotated[int | None, _setting("GPUs that hold each executor's model together.", "RANKS")] = None,
    expert_parallel: Annotated[int | None, _setting("Groups of them among which experts go.", "GROUPS")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            is_eager=True,
            callback=take_config,
            help="TOML file with these options and all settings of the services: see `scalellm config show`.",
        ),
    ] = None,
    scheduler_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port of the scheduler. Default: 50052.", show_default=False)
    ] = None,
    executor_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port of the first executor. Default: 50061.", show_default=False),
    ] = None,
    drain_limit: Annotated[float, typer.Option(min=0, help="Seconds for running requests on `down`.")] = 30.0,
    start_limit: Annotated[float, typer.Option(min=1, help="Seconds for a service to become healthy.")] = 600.0,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Restarts of a service that crashes, in ten minutes; then it is given up.")
    ] = 5,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="json: one object per line, for collectors.")
    ] = "text",
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Show all logs, and end with the services: for systemd and containers.")
    ] = False,
) -> None:
    """Start everything."""
    context = CliContext.of(ctx)
    given = {"quantization": quantization, "speculation": speculation, "dtype": dtype, "kv_cache_dtype": kv_cache_dtype}
    given |= {"max_model_len": max_model_len, "max_num_seqs": max_num_seqs}  # type: ignore[dict-item]
    given |= {"tensor_parallel": tensor_parallel, "expert_parallel": expert_parallel}  # type: ignore[dict-item]
    given["aliases"] = str(aliases.absolute()) if aliases is not None else None
    environment = service_environment(ctx, context, given, api_key)
    check_not_running(context.instance)
    options = UpOptions(
        models=fetch_models(context, model, served_model_name),
        home=context.environment.home,
        environment=environment,
        redis_url=context.environment.redis_url,
        host=host,
        port=port,
        http_port=http_port,
        scheduler_port=scheduler_port,
        executor_port=executor_port,
        executors=executors,
        engine=executor,
        drain_limit=drain_limit,
        start_limit=start_limit,
        max_restarts=max_restarts,
        log_format=log_format,
    )
    if foreground or ctx.info_name == SERVE:
        number = run_in_foreground(context.instance, options, write_line, context.environment.variables, log_format)
        if number:
            raise typer.Exit(128 + number)
        return
    state = _bring_up(context, options)
    write_line(f"ScaleLLM serves {state.model} at {state.public_address}{_http(state.http_address)}")
    if context.instance.name == DEFAULT_INSTANCE:
        context.note("try: scalellm chat (make chat)    stop: scalellm down (make down)")
    else:
        context.note(f"try: {context.command('chat')}    stop: {context.command('down')}")
    if state.http_address:
        scheme = "https" if context.environment.variables.get("SCALELLM_TOKENIZER_TLS_CERT") else "http"
        context.note(f"in a browser: {scheme}://{state.http_address}/")


def down(
    ctx: typer.Context,
    limit: Annotated[
        float | None,
        typer.Option("--timeout", min=0, metavar="SECONDS", help="For each service. Default: the drain limit + 5."),
    ] = None,
) -> None:
    """Stop everything."""
    context = CliContext.of(ctx)
    try:
        code = _bring_down(context, limit)
    except NotRunningError as error:
        context.note(f"{error}: nothing to stop")
        return
    write_line("stopped")
    raise typer.Exit(code)


def status(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show everything."""
    context = CliContext.of(ctx)
    found = read_status(context.instance, context.environment.variables)
    if as_json:
        write_json(asdict(found))
    else:
        where = f"{found.address or '(not serving)'}{_http(found.http_address)}"
        context.out.print(f"{found.model} at {where}", soft_wrap=True)
        context.table(fitting_table(context.out, found.services))
        for line in engine_lines(found):
            context.out.print(Text(line), soft_wrap=True)
        for service in found.services:
            if restarts := str(service.restarts):
                context.out.print(Text(f"{service.name}: {restarts}"), soft_wrap=True)
            if service.last_error:
                context.out.print(Text(f"{service.name}: {service.last_error}"), soft_wrap=True)
                if service.log:
                    context.out.print(Text(f"  log: {service.log}"), soft_wrap=True)
    if not found.supervised:
        context.warn("nobody supervises: what ends is not started again; put that right with: scalellm up")
    if not found.healthy:
        context.error("not healthy; start what is missing with: scalellm up")
        raise typer.Exit(ExitCode.FAILED)


def _http(address: str) -> str:
    return f", HTTP at {address}" if address else ""


def run(
    ctx: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The prompt.")] = DEFAULT_PROMPT,
    *,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PATH",
            help=f"{_MODEL}; where several are served already, one of them.",
            show_default=DEFAULT_MODEL,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=MAX_UINT32, help="Most tokens of the answer.")] = 128,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the services running.")] = False,
) -> None:
    """Start what is needed, answer, stop what was started."""
    context = CliContext.of(ctx)
    state = running_state(context.instance)
    started = state is None
    if state is None:
        name, path = fetch_model(context, model or DEFAULT_MODEL)
        environment = context.environment
        options = UpOptions(
            models={name: path},
            home=environment.home,
            environment=environment.variables,
            redis_url=environment.redis_url,
        )
        state = _bring_up(context, options)
    try:
        _answer(context, state, prompt, max_tokens, model or "")
    finally:
        if started and not keep:
            context.err.print()
            _bring_down(context, None)
    if keep:
        context.note(f"the services are running; stop them with: {context.command('down')}")
    elif started:
        context.note("to keep them running: scalellm up (make up), then scalellm chat (make chat)")


def _answer(context: CliContext, state: State, prompt: str, max_tokens: int, model: str) -> None:
    """Answer a prompt; `model` chooses where there is a choice, empty: the default."""
    with context.connect(state.public_address) as client:
        request = GenerateRequest()
        info = client.info()
        if model and len(info.models) > 1:
            request.model = name_of(model)
            info = client.info(request.model)
        request.sampling.max_tokens = max_tokens
        request.sampling.temperature = 0
        if info.has_chat_template:
            request.chat.CopyFrom(Chat(messages=[ChatMessage(role="user", content=prompt)]))
        else:
            request.prompt = prompt
        context.err.print()
        context.err.print(Text(f"> {prompt}", style="bold"), soft_wrap=True)
        generation = Generation()
        run_streaming(client, request, generation, is_streamed=True, timeout=None)
        print_breakdown(context.err, generation.finished, generation.measured_ns)
    for line in engine_lines(read_status(context.instance, context.environment.variables)):
        context.note(line)


def _bring_up(context: CliContext, options: UpOptions) -> State:
    report = StageReport(context.err)
    try:
        return bring_up(context.instance, options, report)
    finally:
        report.stop()


def _bring_down(context: CliContext, limit: float | None) -> ExitCode:
    state = context.instance.load()
    patience = limit if limit is not None else state.drain_limit if state is not None else 0.0

    def on_stopping(name: str) -> None:
        # The first one is where the time goes: what runs in the others came through it.
        waits = f", once what runs has ended or {patience:g} s have passed" if name == TOKENIZER else ""
        context.note(f"{name:<12}stopping{waits}")

    result = bring_down(context.instance, on_stopping, limit)
    if result.crashed:
        context.warn(f"{', '.join(result.crashed)} had crashed before")
    if result.restarted:
        context.warn(f"{', '.join(result.restarted)} had crashed and been started again")
    if result.killed:
        context.warn(f"{', '.join(result.killed)} did not end in time and was killed")
    if result.logs:
        context.warn(f"the logs are kept in {result.logs}")
    return ExitCode.FAILED if result.killed else ExitCode.OK
