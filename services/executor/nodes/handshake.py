"""The first words between two nodes: both prove that they know the link token, and node 0 compares what must agree."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable

from scalellm.services.common.link_token import OPTION
from scalellm.services.executor.nodes.connection import NodeConnection
from scalellm.services.executor.nodes.identity import Identity
from scalellm.v1 import ranks_pb2

HANDSHAKE_LIMIT = 10.0
"""Seconds for all of it."""

_NONCE_BYTES = 32


class NodeRefusedError(Exception):
    """A node may not join, or does not know its leader; the message says why."""


async def admit(
    connection: NodeConnection, identity: Identity, refusal: Callable[[ranks_pb2.NodeHello], str]
) -> ranks_pb2.NodeHello:
    """Find out who has connected to node 0.

    What differs is told to those only that know the token.

    Args:
        connection: A new one.
        identity: Node 0's own.
        refusal: Tells why a node that is as it should be may not join now; empty: it may.

    Raises NodeRefusedError, once the node has been told why, and EOFError.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    await connection.send(challenge=ranks_pb2.NodeChallenge(nonce=nonce))
    message = await connection.receive()
    if message.WhichOneof("message") != "hello":
        raise EOFError(f"{connection.peer} sent something else than its hello")
    hello, token = message.hello, identity.token()
    if not hmac.compare_digest(hello.proof, _proof(token, b"node", nonce, hello.nonce)):
        why = f"it does not show the link token of node 0 ({OPTION})" if token else "node 0 has no link token"
    elif differences := identity.differences(hello.facts):
        why = differences
    else:
        why = refusal(hello)
    if why:
        await connection.send(refusal=ranks_pb2.NodeRefusal(reason=why))
        raise NodeRefusedError(why)
    await connection.send(welcome=ranks_pb2.NodeWelcome(proof=_proof(token, b"leader", nonce, hello.nonce)))
    return hello


async def introduce(connection: NodeConnection, identity: Identity, generation: str = "", rank: int = 0) -> None:
    """Tell node 0 who has connected to it.

    Args:
        connection: A new one.
        identity: This node's own.
        generation: The start of the group to which the connection belongs, as a rank's; empty: the node joins by it.
        rank: That rank.

    Raises NodeRefusedError and EOFError.
    """
    message = await connection.receive()
    if message.WhichOneof("message") != "challenge":
        raise EOFError("what answers there is no node 0 of an executor")
    nonce, own, token = message.challenge.nonce, secrets.token_bytes(_NONCE_BYTES), identity.token()
    hello = ranks_pb2.NodeHello(
        node_rank=identity.node_rank,
        nonce=own,
        proof=_proof(token, b"node", nonce, own),
        facts=identity.facts,
        generation=generation,
        rank=rank,
    )
    await connection.send(hello=hello)
    answer = await connection.receive()
    match answer.WhichOneof("message"):
        case "welcome":
            if not hmac.compare_digest(answer.welcome.proof, _proof(token, b"leader", nonce, own)):
                raise NodeRefusedError(f"node 0 does not show the link token of this node ({OPTION})")
        case "refusal":
            raise NodeRefusedError(answer.refusal.reason)
        case _:
            raise EOFError("what answers there is no node 0 of an executor")


def _proof(token: bytes, role: bytes, leader_nonce: bytes, node_nonce: bytes) -> bytes:
    return hmac.digest(token, role + leader_nonce + node_nonce, "sha256") if token else b""
