"""The composed system with two of each service, as something that trials break."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping

from compose_stack import ComposeStack, docker, free_port

EXECUTORS = ("executor", "executor-2")
SCHEDULERS = ("scheduler", "scheduler-2")
TOKENIZERS = ("tokenizer", "tokenizer-2")
SERVICES = (*EXECUTORS, *SCHEDULERS, *TOKENIZERS, "redis")
_PATIENCE = 240.0

_STATE = """
import grpc, json
from google.protobuf.json_format import MessageToDict
from scalellm.v1 import {name}_pb2 as pb, {name}_pb2_grpc as rpc
stub = rpc.{stub}Stub(grpc.insecure_channel("127.0.0.1:{port}"))
answer = stub.{method}(pb.{request}(), timeout=10)
print(json.dumps(MessageToDict(answer, always_print_fields_with_no_presence=True, preserving_proto_field_name=True)))
"""
_ASK = {
    "scheduler": _STATE.format(
        name="scheduler", stub="Scheduler", port=50052, method="GetState", request="GetStateRequest"
    ),
    "executor": _STATE.format(
        name="executor", stub="Executor", port=50061, method="GetInfo", request="GetExecutorInfoRequest"
    ),
}


class ComposeLine:
    """A ComposeStack with `faults.yaml`. Its containers go by the names of their services."""

    def __init__(self) -> None:
        second = f"127.0.0.1:{free_port()}"
        self.stack = ComposeStack(COMPOSE_FILE="compose.yaml:tests/compose/faults.yaml", SCALELLM_LISTEN_2=second)
        self.addresses = [self.stack.address, second]

    def container(self, service: str) -> str:
        """The container that runs a service now."""
        (found,) = self.stack.containers(service)
        return found

    @property
    def network(self) -> str:
        return f"{self.stack.project}_line"

    def connect(self, container: str, service: str) -> None:
        """Put a container back where it was in the network."""
        names = [service, service.removesuffix("-2")]
        aliases = [part for name in dict.fromkeys(names) for part in ("--alias", name)]
        docker("network", "connect", *aliases, self.network, container)

    async def wait_linked(self) -> None:
        """Wait until every container is healthy and every scheduler has two executors that are ready."""
        for service in SERVICES:
            await asyncio.to_thread(self.stack.wait_running, service, 1, _PATIENCE)
        await self._until(self._missing_links)

    async def rest(self, before: Mapping[str, object] | None = None) -> dict[str, object]:
        """Wait until nothing runs and the books add up. Memory is not looked at: containers come and go."""
        await self._until(self._unrest)
        return {"at rest": True}

    async def _until(self, problems) -> None:
        deadline = time.monotonic() + _PATIENCE
        while found := await asyncio.to_thread(problems):
            assert time.monotonic() < deadline, "; ".join(found)
            await asyncio.sleep(0.5)

    def _missing_links(self) -> list[str]:
        found = []
        for service in SCHEDULERS:
            phases = [executor["phase"] for executor in self._ask(service)["executors"]]
            if phases != ["EXECUTOR_PHASE_READY"] * len(EXECUTORS):
                found.append(f"{service} knows {phases}")
        return found

    def _unrest(self) -> list[str]:
        found = []
        for service in SCHEDULERS:
            state = {key: int(value) for key, value in self._ask(service).items() if str(value).isdigit()}
            held = state["queued"] + state["running"]
            if held or state["accepted"] != state["finished"] + state["cancelled"] + state["rejected"]:
                found.append(f"{service}: {state}")
        for service in EXECUTORS:
            info = self._ask(service)
            load = info["load"]
            if load["running"] or load["waiting"] or load["free_blocks"] != load["total_blocks"]:
                found.append(f"{service}: {load}")
            ended = sum(int(info[key]) for key in ("finished", "cancelled", "rejected"))
            if int(info["accepted"]) != ended:
                found.append(f"{service}: the books do not add up: {info}")
        return found

    def _ask(self, service: str) -> dict:
        kind = service.removesuffix("-2")
        return json.loads(self.stack.compose("exec", "-T", service, "python", "-c", _ASK[kind]))
