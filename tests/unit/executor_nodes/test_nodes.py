"""Nodes of one executor find each other; who is not one of them, or comes too late, is refused with a reason."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from scalellm.services.common.lifecycle import StartError
from scalellm.services.executor import engine_supervisor
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine_supervisor import EngineSupervisor
from scalellm.services.executor.ipc import EngineChannel, Kind, Message
from scalellm.services.executor.nodes import handshake
from scalellm.services.executor.nodes.connection import NodeConnection
from scalellm.services.executor.nodes.generation import Generation
from scalellm.services.executor.nodes.handshake import NodeRefusedError, introduce
from scalellm.services.executor.nodes.identity import Identity, identify
from scalellm.services.executor.nodes.leader import NodeLeader
from scalellm.v1 import ranks_pb2
from service_processes import PATIENCE, eventually

MakeSettings = Callable[..., ExecutorSettings]

NEVER_READY = [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"]
"""In place of the engine: it says nothing, until it is killed."""


@pytest.fixture
def settings() -> MakeSettings:
    # Everything below 127 is this machine's: nobody else listens at an address that was drawn from so many.
    host = ".".join(("127", *(str(1 + secrets.randbelow(254)) for _ in range(3))))

    def make(node_rank: int = 0, **changes: Any) -> ExecutorSettings:
        given = {
            "model": "llama-3.1-8b", "load_format": "dummy", "nodes": 2, "tensor_parallel": 4,
            "leader": f"{host}:50071", "node_rank": node_rank, "stall_limit_s": PATIENCE,
        }  # fmt: skip
        return ExecutorSettings(**(given | changes))

    return make


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("a" * 40)
    return path


@asynccontextmanager
async def leading(settings: ExecutorSettings) -> AsyncIterator[NodeLeader]:
    leader = NodeLeader(settings)
    await leader.open()
    try:
        yield leader
    finally:
        await leader.close()


async def connect(
    settings: ExecutorSettings, identity: Identity | None = None, generation: str = "", rank: int = 0
) -> NodeConnection:
    """Connect as a node, or for a rank, does: again and again where it is closed without a word.

    Raises NodeRefusedError.
    """
    identity = identity or await identify(settings)
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                connection = await NodeConnection.dial(settings.leader)
            except ConnectionRefusedError:  # node 0 does not listen yet
                await asyncio.sleep(0.01)
                continue
            try:
                await introduce(connection, identity, generation, rank)
                return connection
            except EOFError:
                connection.close()
            except BaseException:
                connection.close()
                raise


async def next_word(connection: NodeConnection, kind: str) -> Any:
    """Return the next message of a kind; signs of life before it are read."""
    while True:
        message = await asyncio.wait_for(connection.receive(), PATIENCE)
        if message.WhichOneof("message") != "beat":
            assert message.WhichOneof("message") == kind
            return getattr(message, kind)


async def start_ranks(node: ExecutorSettings) -> tuple[str, NodeConnection, list[NodeConnection]]:
    """Play a node up to the start of its ranks. Returns the generation's name, the node's connection and its ranks'."""
    connection = await connect(node)
    name = (await next_word(connection, "start")).generation
    return name, connection, [await connect(node, generation=name, rank=rank) for rank in node.own_ranks]


@asynccontextmanager
async def generation_of(
    leader: NodeLeader, node: ExecutorSettings
) -> AsyncIterator[tuple[Generation, NodeConnection, list[NodeConnection]]]:
    """Start a generation of two nodes with two ranks each."""
    gathering = asyncio.create_task(leader.gather())
    name, connection, ranks = await start_ranks(node)
    try:
        generation = await asyncio.wait_for(gathering, PATIENCE)
        assert generation.name == name
        yield generation, connection, ranks
    finally:
        gathering.cancel()
        for one in (connection, *ranks):
            one.close()


async def test_plans_go_from_rank_0_to_each_rank_of_another_node(settings: MakeSettings) -> None:
    async with leading(settings()) as leader, generation_of(leader, settings(1)) as (generation, _, ranks):
        assert leader.num_missing == 0
        for rank, (leads, follows) in enumerate(zip(generation.sockets, ranks, strict=True), 2):
            plan = Message(Kind.PLAN, payload=bytes([rank]) * 100_000)
            sending = asyncio.create_task(asyncio.to_thread(EngineChannel(leads).send, plan))
            channel = EngineChannel(follows.detach())
            received: list[Message] = []
            while not received:
                received += await asyncio.to_thread(lambda: list(channel.receive(PATIENCE)))  # noqa: B023 - awaited here
            await sending
            assert received == [plan]
        assert generation.local_host == settings().leader.partition(":")[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tensor_parallel": 8}, "--tensor-parallel is 8 there and 4 on node 0"),
        ({"dtype": "float16"}, "--dtype is float16 there and auto on node 0"),
        ({"expert_parallel": 2, "num_blocks": 7}, "--expert-parallel is 2 there and 1 on node 0; --num-blocks is 7 "),
        ({"nodes": 4, "node_rank": 3}, "--nodes is 4 there and 2 on node 0"),
        ({"model": "qwen3-8b"}, "the digest of the model's files is "),
    ],
)
async def test_what_differs_is_named(settings: MakeSettings, changes: dict[str, Any], reason: str) -> None:
    async with leading(settings()):
        with pytest.raises(NodeRefusedError) as refused:
            await connect(settings(**({"node_rank": 1} | changes)))
        assert str(refused.value).startswith(reason)


async def test_other_versions_are_refused(settings: MakeSettings) -> None:
    identity = await identify(settings(1))
    other = dataclasses.replace(identity, facts={**identity.facts, "the version of torch": "1.0"})
    async with leading(settings()):
        with pytest.raises(NodeRefusedError, match=r"^the version of torch is 1\.0 there and \S+ on node 0$"):
            await connect(settings(1), other)


async def test_each_node_has_a_number_of_its_own(settings: MakeSettings) -> None:
    three = {"nodes": 4, "tensor_parallel": 4}
    async with leading(settings(**three)) as leader:
        gathering = asyncio.create_task(leader.gather())
        first = await connect(settings(1, **three))
        with pytest.raises(NodeRefusedError, match=r"--node-rank 1: 127\.0\.0\.1:\d+ has the same, and is here"):
            await connect(settings(1, **three))
        for number in (0, 4):
            with pytest.raises(NodeRefusedError, match=f"--node-rank {number}: must be 1 to 3"):
                await connect(settings(number, **three))
        first.close()
        while True:  # its place is free as soon as node 0 knows
            try:
                (await connect(settings(1, **three))).close()
                break
            except NodeRefusedError:
                await asyncio.sleep(0)
        gathering.cancel()


@pytest.mark.parametrize(
    ("on_leader", "on_node", "reason"),
    [
        ("a" * 40, "", "it does not show the link token of node 0"),
        ("a" * 40, "b" * 40, "it does not show the link token of node 0"),
        ("", "a" * 40, "node 0 has no link token"),
    ],
)
async def test_who_does_not_know_the_token_is_told_nothing_else(
    settings: MakeSettings, tmp_path: Path, on_leader: str, on_node: str, reason: str
) -> None:
    def file(name: str, token: str) -> Path | None:
        (tmp_path / name).write_text(token)
        return tmp_path / name if token else None

    async with leading(settings(link_token_file=file("leader", on_leader))):
        node = settings(1, link_token_file=file("node", on_node), dtype="float16")
        with pytest.raises(NodeRefusedError, match=reason) as refused:
            await connect(node)
        assert "dtype" not in str(refused.value)


async def test_who_knows_the_token_joins(settings: MakeSettings, token_file: Path) -> None:
    async with (
        leading(settings(link_token_file=token_file)) as leader,
        generation_of(leader, settings(1, link_token_file=token_file)),
    ):
        pass


async def test_a_node_does_not_follow_a_leader_without_the_token(
    settings: MakeSettings, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = settings(1, link_token_file=token_file)
    proof = handshake._proof

    def forged(token: bytes, role: bytes, *nonces: bytes) -> bytes:
        return (
            b"?" * 32
            if role == b"leader" and asyncio.current_task() is not introducing
            else proof(token, role, *nonces)
        )

    async with leading(settings(link_token_file=token_file)):
        monkeypatch.setattr(handshake, "_proof", forged)
        connection = await NodeConnection.dial(node.leader)
        introducing = asyncio.create_task(introduce(connection, await identify(node)))
        with pytest.raises(NodeRefusedError, match="node 0 does not show the link token of this node"):
            await asyncio.wait_for(introducing, PATIENCE)
        connection.close()


async def test_a_rank_of_an_earlier_generation_joins_no_later_one(settings: MakeSettings) -> None:
    node = settings(1)
    async with leading(settings()) as leader:
        async with generation_of(leader, node) as (old, connection, _):
            with pytest.raises(NodeRefusedError, match="rank 2 is already connected"):
                await connect(node, generation=old.name, rank=2)
            await leader.end("a test", stalled=True)
            end = await next_word(connection, "end")
            assert (end.reason, end.stalled) == ("a test", True)
        with pytest.raises(NodeRefusedError, match=f"generation {old.name} of the group is over"):
            await connect(node, generation=old.name, rank=2)
        gathering = asyncio.create_task(leader.gather())
        connection = await connect(node)
        name = (await next_word(connection, "start")).generation
        assert name.startswith("2-")
        with pytest.raises(NodeRefusedError, match=f"generation {old.name} of the group is over"):
            await connect(node, generation=old.name, rank=2)
        with pytest.raises(NodeRefusedError, match="rank 1 is not one of node 1"):
            await connect(node, generation=name, rank=1)
        gathering.cancel()
        connection.close()


async def test_a_node_that_leaves_ends_the_generation(settings: MakeSettings) -> None:
    async with leading(settings()) as leader, generation_of(leader, settings(1)) as (generation, connection, _):
        connection.close()
        ended = await asyncio.wait_for(generation.first_end(), PATIENCE)
        assert leader.num_missing == 1
        assert ended.startswith("node 1 has left: the connection ")


async def test_a_node_that_comes_back_before_the_generation_has_ended_is_in_the_next_one(
    settings: MakeSettings,
) -> None:
    async with leading(settings()) as leader, generation_of(leader, settings(1)) as (generation, connection, _):
        connection.close()
        await asyncio.wait_for(generation.first_end(), PATIENCE)
        back = await connect(settings(1))
        await leader.end("a test", stalled=False)
        gathering = asyncio.create_task(leader.gather())
        assert (await next_word(back, "start")).generation.startswith("2-")
        gathering.cancel()
        back.close()


async def test_a_node_that_is_gone_while_the_model_loads_is_no_crash_of_the_engine(
    settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_supervisor, "python_module", lambda *command: NEVER_READY)
    monkeypatch.setattr(engine_supervisor, "_LAST_WORDS", 0.1)
    supervisor = EngineSupervisor(settings(max_engine_restarts=0, tensor_parallel=2))
    running = asyncio.create_task(supervisor.run(lambda: None))
    node = settings(1, max_engine_restarts=0, tensor_parallel=2)
    try:
        for number in (1, 2):
            name, connection, ranks = await asyncio.wait_for(start_ranks(node), PATIENCE)
            assert name.startswith(f"{number}-")
            for each in (*ranks, connection):
                each.close()
            await eventually(lambda: supervisor.num_missing_nodes == 1)
        name, connection, ranks = await asyncio.wait_for(start_ranks(node), PATIENCE)
        assert name.startswith("3-"), "it started again, though no crash is allowed"
        await connection.send(end=ranks_pb2.NodeEnd(reason="rank 1 ended with signal SIGKILL"))
        with pytest.raises(StartError, match="the engine died 1 times in a row while starting"):
            await asyncio.wait_for(running, PATIENCE)
        for each in (*ranks, connection):
            each.close()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_node_that_is_silent_is_gone() -> None:
    """A node whose host lost power is silent: the connection does not close."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = socket.create_connection(server.getsockname())
        connection = NodeConnection(server.accept()[0])
        heard: list[ranks_pb2.NodeMessage] = []

        async def on_message(message: ranks_pb2.NodeMessage) -> None:
            heard.append(message)

        ended = await asyncio.wait_for(connection.converse(0.2, on_message), PATIENCE)
        assert ended == "it has said nothing for 0.2 s"
        assert not heard
        assert next(EngineChannel(silent).receive(0)).kind is Kind.NODE, "this end shows that it is alive"
        connection.close()
        silent.close()


async def test_strangers_disturb_nobody(settings: MakeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalellm.services.executor.nodes.leader._MOST_STRANGERS", 2)
    async with leading(settings()) as leader:
        host, _, port = settings().leader.partition(":")
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"\x0d\0\0\0\0\xff\xff\xff\xff", b"\x0d\0\0\0\0\x02\0\0\0??", b""):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(said)
            writer.write_eof()
            await _is_closed(reader)
            writer.close()
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(6)]
        for reader, _ in silent:
            assert await asyncio.wait_for(reader.read(1), PATIENCE), "its challenge"
        reader, writer = await asyncio.open_connection(host, int(port))  # one too many
        await _is_closed(reader)
        writer.close()
        silent.pop()[1].close()
        silent.pop()[1].close()
        async with generation_of(leader, settings(1)):
            pass
        for _, writer in silent:
            writer.close()


async def _is_closed(reader: asyncio.StreamReader) -> None:
    with suppress(ConnectionResetError):  # what it had not read is lost
        await asyncio.wait_for(reader.read(), PATIENCE)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"nodes": 3}, "--nodes 3: must divide --tensor-parallel, 4"),
        ({"engine": "fake"}, "--nodes 2: --engine fake has no ranks to divide among hosts"),
        ({"leader": "0.0.0.0:50071"}, "--leader 0.0.0.0:50071: whoever reaches this address could join the group"),
        ({"leader": "a-host:50071"}, "--leader a-host:50071: whoever reaches this address could join the group"),
        ({"leader": "a-host"}, "--leader: 'a-host' is not host:port"),
    ],
)
async def test_settings_that_make_no_group(settings: MakeSettings, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(StartError) as refused:
        await identify(settings(**changes))
    assert str(refused.value).startswith(reason)


async def test_an_address_that_is_taken(settings: MakeSettings) -> None:
    async with leading(settings()):
        with pytest.raises(StartError, match=f"^--leader {settings().leader}: node 0 cannot listen there"):
            await NodeLeader(settings()).open()
