"""Each method, as each caller, over each transport: who gets in is written down here once more, and independently."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import trustme

from certificates import issue
from scalellm.services.common.access import METHODS, Access
from scalellm.services.common.api_keys import Role, key_entry, new_key
from scalellm.services.common.lifecycle import GrpcService
from scalellm.services.common.tls import TlsFiles, server_credentials
from service_processes import PATIENCE

OK, DENIED = grpc.StatusCode.OK, grpc.StatusCode.PERMISSION_DENIED
UNKNOWN, CUT_OFF = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE

CALLERS = ("no key", "wrong key", "user's key", "other tenant's key", "admin key", "link token")
EXPECTED = {
    "Health": (OK, OK, OK, OK, OK, OK),
    "ExternalScaler": (OK, OK, OK, OK, OK, OK),
    "ServerReflection": (UNKNOWN, UNKNOWN, OK, OK, OK, OK),
    "Generation": (UNKNOWN, UNKNOWN, OK, OK, OK, DENIED),
    "Tokenizer": (UNKNOWN, UNKNOWN, OK, OK, OK, DENIED),
    "Sessions": (UNKNOWN, UNKNOWN, OK, OK, OK, DENIED),
    "Scheduler": (UNKNOWN, UNKNOWN, DENIED, DENIED, OK, OK),
    "Executor": (UNKNOWN, UNKNOWN, DENIED, DENIED, OK, OK),
    "links": (UNKNOWN, UNKNOWN, DENIED, DENIED, DENIED, OK),
    "unheard of": (UNKNOWN, UNKNOWN, DENIED, DENIED, DENIED, DENIED),
}
UNHEARD = ("/scalellm.v1.Generation/Other", "/scalellm.v2.Generation/Generate", "/x", "/scalellm.v1.Scheduler/Connect/")


def row_of(method: str) -> str:
    if method in UNHEARD:
        return "unheard of"
    service, name = method.removeprefix("/").split("/")
    return "links" if name in ("Connect", "Execute") else service.rpartition(".")[2]


class Everything(grpc.GenericRpcHandler):
    """Serves every method, of whatever shape, with no answer and OK."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def answer(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
            async for _ in requests:
                pass

        return grpc.stream_stream_rpc_method_handler(answer)


@asynccontextmanager
async def serving(access: Access, tls: TlsFiles):
    service = GrpcService(
        "127.0.0.1",
        0,
        services=[],
        is_ready=lambda: True,
        credentials=server_credentials(tls),
        interceptors=access.interceptors,
    )
    service.server.add_generic_rpc_handlers((Everything(),))
    await service.start()
    try:
        yield service.address
    finally:
        await service.stop(0)


async def code_of(channel: grpc.aio.Channel, method: str, secret: str) -> grpc.StatusCode:
    metadata = (("authorization", f"Bearer {secret}"),) if secret else ()
    # Its one message leaves with the call: one that is written while the call is refused makes its status INTERNAL.
    call = channel.unary_stream(method)(b"", metadata=metadata, timeout=PATIENCE)
    try:
        if await call.read() is grpc.aio.EOF:
            return await call.code()
    except grpc.aio.AioRpcError as error:
        return error.code()
    call.cancel()  # an answer, of a call that may go on for ever
    return OK


@pytest.mark.parametrize("transport", ["plaintext", "tls", "mtls"])
async def test_who_may_call_what(transport: str, tmp_path: Path) -> None:
    keys = [new_key() for _ in range(3)]
    roles = (("acme", Role.USER), ("other", Role.USER), ("ops", Role.ADMIN))
    key_file, token_file = tmp_path / "keys.toml", tmp_path / "token"
    key_file.write_text("".join(key_entry(key, *role) for key, role in zip(keys, roles, strict=True)))
    token_file.write_text(token := secrets.token_hex(32))
    callers = dict(zip(CALLERS, ("", new_key(), *keys, token), strict=True))
    own, stranger = issue(tmp_path / "own", trustme.CA()), issue(tmp_path / "stranger", trustme.CA())
    tls = (
        TlsFiles() if transport == "plaintext" else TlsFiles(own.cert, own.key, own.ca if transport == "mtls" else None)
    )
    checked = 0
    async with serving(Access(key_file, token_file), tls) as address:
        if transport == "plaintext":
            right = grpc.aio.insecure_channel(address)
            wrong = [grpc.aio.secure_channel(address, own.channel_credentials())]
        else:
            right = grpc.aio.secure_channel(address, own.channel_credentials(shows_certificate=transport == "mtls"))
            wrong = [
                grpc.aio.insecure_channel(address),
                grpc.aio.secure_channel(address, stranger.channel_credentials()),
            ]
            if transport == "mtls":
                bare = own.channel_credentials(shows_certificate=False)
                wrong.append(grpc.aio.secure_channel(address, bare, options=[("grpc.use_local_subchannel_pool", 1)]))
        for method, (number, secret) in itertools.product((*METHODS, *UNHEARD), enumerate(callers.values())):
            code = await code_of(right, method, secret)
            assert code is EXPECTED[row_of(method)][number], (method, CALLERS[number])
            checked += 1
        for channel in wrong:  # not even with the right key, nor for health
            for method in METHODS:
                assert await code_of(channel, method, keys[2]) is CUT_OFF, method
                checked += 1
        for channel in (right, *wrong):
            await channel.close()
    print(f"{transport}: {checked} calls as expected")
