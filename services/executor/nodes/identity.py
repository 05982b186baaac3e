"""Identity of a node. A group accepts nodes with node 0's model, versions, settings and link token."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scalellm import __version__
from scalellm.services.common.addresses import is_loopback, split_address
from scalellm.services.common.lifecycle import StartError
from scalellm.services.common.link_token import OPTION, read_token
from scalellm.services.executor.config import ExecutorSettings

_GROUP_SETTINGS = (
    *("nodes", "tensor_parallel", "expert_parallel", "stall_limit_s"),
    *("load_format", "dtype", "quantization", "fp8_fast_sums", "kv_cache_dtype", "device", "kernels", "enforce_eager"),
    *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "num_blocks", "capacity_policy"),
    *("prefix_cache", "target_itl_ms"),
)
"""Settings that decide what ranks compute and must be equal. Those of memory and threads may differ, because ranks
agree on the size of the cache."""


@dataclass(frozen=True)
class Identity:
    """A node's identity, as it is sent in the handshake.

    Attributes:
        node_rank: Its number.
        facts: Values that must be equal on all nodes, by the names that refusals use.
        token_file: File with the link token; None: the handshake uses none.
    """

    node_rank: int
    facts: Mapping[str, str]
    token_file: Path | None

    def token(self) -> bytes:
        """Read the current link token; empty without one. Raises ConfigFileError."""
        return b"" if self.token_file is None else read_token(self.token_file).encode()

    def differences(self, other: Mapping[str, str]) -> str:
        """Describe the facts in which another node differs, with both values; empty if there are none."""
        names = [name for name in {**self.facts, **other} if self.facts.get(name) != other.get(name)]
        return "; ".join(
            f"{name} is {other.get(name, 'not told')} there and {self.facts.get(name, 'not told')} on node 0"
            for name in names
        )


async def identify(settings: ExecutorSettings) -> Identity:
    """Return this node's identity, from its settings and its model's files. Raises StartError."""
    _check(settings)
    facts = {f"--{name.replace('_', '-')}": str(getattr(settings, name)) for name in _GROUP_SETTINGS}
    facts["the version of ScaleLLM"] = __version__
    facts["the version of torch"] = importlib.metadata.version("torch")
    facts["the digest of the model's files"] = await asyncio.to_thread(_digest_of_model, settings)
    return Identity(settings.node_rank, facts, settings.link_token_file)


def _check(settings: ExecutorSettings) -> None:
    """Raise StartError for settings that cannot form a group."""
    if settings.engine != "model":
        raise StartError(f"--nodes {settings.nodes}: --engine {settings.engine} has no ranks to divide among hosts")
    if settings.tensor_parallel % settings.nodes:
        raise StartError(
            f"--nodes {settings.nodes}: must divide --tensor-parallel, {settings.tensor_parallel}: each host has as "
            "many ranks"
        )
    try:
        host, _ = split_address(settings.leader)
    except ValueError as error:
        raise StartError(f"--leader: {error}") from None
    if not is_loopback(host) and settings.link_token_file is None:
        raise StartError(
            f"--leader {settings.leader}: whoever reaches this address could join the group or lead it: give each node "
            f"the same {OPTION}"
        )
    if settings.link_token_file is not None:
        read_token(settings.link_token_file)


def _digest_of_model(settings: ExecutorSettings) -> str:
    # Imported here, because they import numpy and the model store, which the front of a single host does not need.
    from scalellm.services.common.model_store import ModelStoreError, resolve
    from scalellm.services.executor.model_config import PRESETS
    from scalellm.services.executor.nodes.model_digest import model_digest

    if settings.load_format == "dummy" and settings.model in PRESETS:
        return hashlib.sha256(repr(PRESETS[settings.model]).encode()).hexdigest()[:16]
    try:
        return model_digest(resolve(settings.model, settings.home))
    except ModelStoreError as error:
        raise StartError(str(error)) from error
