"""The process of a rank other than 0: loads its share of the model and follows rank 0, the engine's process.

Started by the front as `python -m scalellm.services.executor.ranks.rank_process RANK SOCKET STACKS`, the last two
descriptors, with its settings as one JSON line on standard input. It ends when rank 0 does.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys

from scalellm.services.common.json_lines import read_line
from scalellm.services.common.lifecycle import StartError
from scalellm.services.common.logs import configure_logging
from scalellm.services.executor.build import follow_engine
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.ipc import EngineChannel
from scalellm.services.executor.stall_report import write_stacks_to

_log = logging.getLogger(__name__)


def main() -> int:
    """Run the rank until rank 0 is gone. Returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rank, connection, stacks = map(int, sys.argv[1:])
    channel = EngineChannel(socket.socket(fileno=connection))
    write_stacks_to(stacks)
    told = read_line(sys.stdin.buffer)
    if told is None:  # the front has ended
        return 0
    settings = ExecutorSettings.model_validate(told)
    configure_logging(f"rank {rank}", settings)
    gc.freeze()
    try:
        follow_engine(settings, rank, channel)
    except EOFError:
        _log.info("rank 0 is gone; rank %d ends", rank)
    except StartError as error:
        _log.error("rank %d cannot start: %s", rank, error)
        return 1
    except Exception:
        _log.exception("rank %d failed, and the group ends with it", rank)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(
        code
    )  # interpreter teardown with a large model takes seconds, and a group's threads may wait for the others
