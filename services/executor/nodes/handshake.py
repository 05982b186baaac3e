"""The handshake of two nodes: both prove that they know the link token, and node 0 compares versions and settings."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable

from scalellm.services.common.link_token import OPTION
from scalellm.services.executor.nodes.connection import NodeConnection
from scalellm.services.executor.nodes.identity import Identity
from scalellm.v1 import ranks_pb2

HANDSHAKE_LIMIT = 10.0
"""Seconds for the whole handshake."""

_NONCE_BYTES = 32


class NodeRefusedError(Exception):
    """A node may not join, or node 0 did not prove that it knows the link token. The message says why."""


async def admit(
    connection: NodeConnection, identity: Identity, refusal: Callable[[ranks_pb2.NodeHello], str]
) -> ranks_pb2.NodeHello:
    """Perform node 0's side of the handshake. Returns the other end's hello.

    Differences of settings are revealed only to nodes that know the token.

    Args:
        connection: A new connection.
        identity: Node 0's identity.
        refusal: Returns the reason why a node with the right token and settings may not join now; empty: it may.

    Raises:
        NodeRefusedError: The node was refused, and has been sent the reason.
        EOFError: The connection was closed, or its messages violate the protocol.
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
    """Perform the handshake of a node other than 0.

    Args:
        connection: A new connection to node 0.
        identity: This node's identity.
        generation: Name of the generation, for the connection of a rank; empty: the node itself joins.
        rank: Number of that rank.

    Raises:
        NodeRefusedError: Node 0 refused the connection, or did not prove that it knows the link token.
        EOFError: The connection was closed, or its messages violate the protocol.
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
