"""TLS on every listener and link: who is let in, and what happens when certificates are replaced."""

from __future__ import annotations

import asyncio

import grpc
import trustme

from certificates import issue
from line import generate
from scalellm.v1 import common_pb2, generation_pb2
from service_processes import PATIENCE, ServiceProcess, Spawn

FAKE = ("--engine", "fake", "--max-model-len", "2048", "--num-blocks", "256")
LOCAL = [("grpc.use_local_subchannel_pool", 1)]


def request() -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(prompt="Hello", sampling=common_pb2.SamplingParams(max_tokens=4))


async def ask_every_worker(
    tokenizer: ServiceProcess, credentials: grpc.ChannelCredentials, said: str, num_workers: int = 2
) -> None:
    """Ask until each worker has logged `said`: the kernel chooses who gets a connection, with which it looks at the
    files."""
    async with asyncio.timeout(PATIENCE):
        while tokenizer.log.read_text().count(said) < num_workers:
            assert await ask(tokenizer.address, credentials) is grpc.StatusCode.OK


async def ask(address: str, credentials: grpc.ChannelCredentials) -> grpc.StatusCode | None:
    async with grpc.aio.secure_channel(address, credentials, options=LOCAL) as channel:
        return (await generate(channel, request(), timeout=PATIENCE)).code


async def test_the_whole_line_on_mutual_tls_and_a_new_authority_without_a_restart(
    spawn: Spawn, model_dir, tmp_path
) -> None:
    ok, unavailable = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE
    public, inner = trustme.CA(), trustme.CA()
    model = str(model_dir("smollm2-135m-instruct"))
    edge = issue(tmp_path / "edge", public)
    # Named, not addressed: the name is told with --link-tls-name.
    core = issue(tmp_path / "core", inner, "line.internal")
    listens = core.flags(mutual=True)
    links = [*core.flags("link-tls"), "--link-tls-name", "line.internal"]
    executor = spawn("executor", "--model", model, *FAKE, *listens)
    scheduler = spawn("scheduler", "--executors", executor.address, *listens, *links)
    tokenizer = spawn(
        "tokenizer", "--scheduler", scheduler.address, "--model", model, "--workers", "2", *edge.flags(), *links
    )
    outsider = issue(tmp_path / "outsider", trustme.CA())
    assert await ask(tokenizer.address, edge.channel_credentials(shows_certificate=False)) is ok
    assert await ask(tokenizer.address, outsider.channel_credentials(shows_certificate=False)) is unavailable
    async with grpc.aio.insecure_channel(tokenizer.address, options=LOCAL) as plaintext:
        assert (await generate(plaintext, request(), timeout=PATIENCE)).code is unavailable
    for credentials in (outsider.channel_credentials(), core.channel_credentials(shows_certificate=False)):
        name = [*LOCAL, ("grpc.ssl_target_name_override", "line.internal")]
        async with grpc.aio.secure_channel(scheduler.address, credentials, options=name) as channel:
            call = channel.unary_unary("/scalellm.v1.Scheduler/GetState")(b"", timeout=PATIENCE)
            assert await call.code() is unavailable

    # A connection that stands goes on with the old certificate; a new one gets the new one, from every worker.
    async with grpc.aio.secure_channel(
        tokenizer.address, edge.channel_credentials(shows_certificate=False), options=LOCAL
    ) as standing:
        assert (await generate(standing, request(), timeout=PATIENCE)).code is ok
        old = edge.channel_credentials(shows_certificate=False)
        renewed = issue(tmp_path / "edge", trustme.CA())
        new = renewed.channel_credentials(shows_certificate=False)
        await ask_every_worker(tokenizer, new, f"{renewed.key} again")
        assert await ask(tokenizer.address, old) is unavailable
        renewed.key.write_text("half copied")
        await ask_every_worker(tokenizer, new, "changed, but what was read before stays in use")
        assert (await generate(standing, request(), timeout=PATIENCE)).code is ok


def test_a_service_says_what_is_wrong_with_its_files_and_ends(spawn: Spawn, model_dir, tmp_path) -> None:
    model = str(model_dir("smollm2-135m-instruct"))
    one, other = issue(tmp_path / "one", trustme.CA()), issue(tmp_path / "other", trustme.CA())
    mixed = ("--tls-cert", str(one.cert), "--tls-key", str(other.key))
    broken_links = ("--link-token-file", str(tmp_path / "none"))
    for service in (
        spawn("executor", "--model", model, *FAKE, *mixed, wait=False),
        spawn("scheduler", *mixed, wait=False),
        spawn("tokenizer", "--model", model, "--workers", "1", *mixed, wait=False),
        spawn("tokenizer", "--model", model, "--workers", "1", *broken_links, wait=False),
    ):
        assert service.process.wait(PATIENCE) == 1
        last = service.log.read_text().splitlines()[-1]
        assert last.startswith(("error: --tls-cert, --tls-key: ", "error: --link-token-file: cannot read ")), last
