"""`python -m bench.peers.servers.onnx_server`: OpenAI's API on closed batches of ONNX Runtime GenAI.

The library's own engine takes no more than 4 sequences at once where it has no paged attention, which is on a CPU.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from bench.peers.servers.closed_batches import ClosedBatches
from bench.peers.servers.front import TextFormat, serve_engine, server_parser
from bench.peers.servers.stepping import Engine


def _engine(max_rows: int, eos_token_ids: frozenset[int], **options: Any) -> Engine:
    # Here, for the engine's process alone: the front's needs none of the library's memory.
    from bench.peers.servers.onnx_engine import OnnxModel, Options

    return ClosedBatches(OnnxModel(Options(**options)).begin, max_rows, eos_token_ids)


def main() -> None:
    """Serve until killed, or until the engine ends."""
    parser = server_parser(__doc__, model="A folder of bench.peers.servers.onnx_export.")
    parser.add_argument("--max-batch", type=int, default=32)
    arguments = parser.parse_args()
    text = TextFormat(arguments.tokenizer)
    make_engine = partial(
        _engine,
        max_rows=arguments.max_batch,
        eos_token_ids=frozenset(text.eos_token_ids),
        model=arguments.model,
        threads=arguments.threads,
        filler=text.filler,
    )
    asyncio.run(serve_engine(arguments.model.name, text, make_engine, arguments.port))


if __name__ == "__main__":
    main()
