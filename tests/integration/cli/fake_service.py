"""FakeService: a process with the start-up behaviour of a service (port, announce file, health, SIGTERM) and no work.

usage: fake_service.py KIND <the options of a real service>; told what to do by FAKE_<KIND>=crash|hang|stubborn|orphan.
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

from services.common.addresses import join_address


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("--host")
    parser.add_argument("--port")
    parser.add_argument("--announce", type=Path)
    options, _ = parser.parse_known_args()
    behaviour = os.environ.get(f"FAKE_{options.kind.upper()}", "")
    if behaviour == "crash":
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
    port = server.add_insecure_port(join_address(options.host, options.port))
    server.start()
    partial = options.announce.with_suffix(".partial")
    partial.write_text(f"{join_address(options.host, port)}\n")
    partial.replace(options.announce)
    signal.sigwait({signal.SIGUSR1 if behaviour == "stubborn" else signal.SIGTERM})
    server.stop(0)


if __name__ == "__main__":
    main()
