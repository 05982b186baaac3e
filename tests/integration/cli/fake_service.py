"""FakeService: a process with the start-up behaviour of a service (port, announce file, health, SIGTERM) and no work.

usage: fake_service.py KIND <the options of a real service>; told what to do by
SCALELLM_<KIND>_FAKE=crash|model|named|hang|stubborn|orphan|hostile. `model`: crash if the
model is gone. `named`: say which models the options name. What a hostile one says
of itself, and its log, would drive a terminal.
"""

import argparse
import os
import signal
import subprocess
import sys
from concurrent import futures
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from hostile_text import HOSTILE, fill
from scalellm.services.common.addresses import join_address
from scalellm.services.common.served_models import read_models
from scalellm.v1 import (
    executor_pb2,
    executor_pb2_grpc,
    scheduler_pb2,
    scheduler_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("--host")
    parser.add_argument("--port")
    parser.add_argument("--announce", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--model-name", default="")
    options, _ = parser.parse_known_args()
    behaviour = os.environ.get(f"SCALELLM_{options.kind.upper()}_FAKE", "")
    if behaviour == "crash" or (behaviour == "model" and not options.model.exists()):
        print("error: no room for the weights; give it more memory", file=sys.stderr)
        sys.exit(1)
    if behaviour == "orphan":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    # Waited for, not handled: a handler that interrupts whoever waits for its event may wait for that one for ever.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})

    server = grpc.server(futures.ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    status = health_pb2.HealthCheckResponse
    servicer.set("", status.NOT_SERVING if behaviour == "hang" else status.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    if behaviour == "named":
        say_names(server, [model.name for model in read_models(str(options.model), options.model_name)])
    if behaviour == "hostile":
        be_hostile(server)
    port = server.add_insecure_port(join_address(options.host, options.port))
    server.start()
    partial = options.announce.with_suffix(".partial")
    partial.write_text(f"{join_address(options.host, port)}\n")
    partial.replace(options.announce)
    signal.sigwait({signal.SIGUSR1 if behaviour == "stubborn" else signal.SIGTERM})
    server.stop(0)


class Hostile(
    executor_pb2_grpc.ExecutorServicer, scheduler_pb2_grpc.SchedulerServicer, tokenizer_pb2_grpc.TokenizerServicer
):
    """Answers questions for any kind of service."""

    def GetInfo(self, request: object, context: object) -> object:
        if isinstance(request, tokenizer_pb2.GetInfoRequest):
            return fill(tokenizer_pb2.GetInfoResponse())
        return fill(executor_pb2.GetExecutorInfoResponse())

    def GetState(self, request: object, context: object) -> scheduler_pb2.GetStateResponse:
        executors = [scheduler_pb2.ExecutorState(phase=99)]
        return fill(scheduler_pb2.GetStateResponse(executors=executors))


class Named(executor_pb2_grpc.ExecutorServicer, tokenizer_pb2_grpc.TokenizerServicer):
    """Says which models an executor or a tokenizer has."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def GetInfo(self, request: object, context: object) -> object:
        if isinstance(request, tokenizer_pb2.GetInfoRequest):
            return tokenizer_pb2.GetInfoResponse(model=self._names[0], models=self._names)
        return executor_pb2.GetExecutorInfoResponse(model=",".join(self._names))


def say_names(server: grpc.Server, names: list[str]) -> None:
    executor_pb2_grpc.add_ExecutorServicer_to_server(Named(names), server)
    tokenizer_pb2_grpc.add_TokenizerServicer_to_server(Named(names), server)


def be_hostile(server: grpc.Server) -> None:
    executor_pb2_grpc.add_ExecutorServicer_to_server(Hostile(), server)
    scheduler_pb2_grpc.add_SchedulerServicer_to_server(Hostile(), server)
    tokenizer_pb2_grpc.add_TokenizerServicer_to_server(Hostile(), server)
    print(f"12:00:00 INFO fake[1] fake: {HOSTILE}", file=sys.stderr)
    print(f"12:00:00 ERROR fake[1] fake: {HOSTILE}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
