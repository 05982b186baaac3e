"""The number of KV-cache blocks of an engine."""

_GIB = 1024**3


class KVCacheTooSmallError(ValueError):
    """The cache cannot hold one sequence of max_model_len tokens. The message names the free and the required memory
    and the settings to change.
    """


def num_kv_blocks(
    *,
    bytes_per_token: int,
    block_size: int,
    max_model_len: int,
    num_blocks: int | None = None,
    free_bytes: int,
    memory_fraction: float,
) -> int:
    """Return the number of blocks: `num_blocks` if given, else what `memory_fraction` of the free memory holds.

    bytes_per_token: keys and values of one token in all layers; free_bytes: what is free once the weights are loaded.
    Raises KVCacheTooSmallError when one sequence of `max_model_len` would not fit, or `num_blocks` not the memory.
    """
    block_bytes = bytes_per_token * block_size
    needed = -(-max_model_len // block_size)
    if num_blocks is not None:
        if num_blocks * block_bytes > free_bytes:
            raise KVCacheTooSmallError(
                f"num_blocks ({num_blocks}) takes {_gib(num_blocks * block_bytes)} of KV cache, {_gib(free_bytes)} "
                f"are free: set num_blocks to at most {free_bytes // block_bytes}, or leave it out"
            )
        if num_blocks < needed:
            raise KVCacheTooSmallError(
                f"num_blocks ({num_blocks}) holds {num_blocks * block_size} tokens, one sequence of max_model_len "
                f"({max_model_len}) takes {needed} blocks: raise num_blocks or lower max_model_len"
            )
        return num_blocks
    if not 0.0 < memory_fraction <= 1.0:
        raise ValueError(f"memory_fraction must be in (0, 1], got {memory_fraction}")
    fitting = int(free_bytes * memory_fraction) // block_bytes
    if fitting < needed:
        raise KVCacheTooSmallError(
            f"memory_fraction ({memory_fraction:g}) of {_gib(free_bytes)} free memory holds {fitting} KV-cache blocks "
            f"({fitting * block_size} tokens), one sequence of max_model_len ({max_model_len}) takes {needed} blocks "
            f"({_gib(needed * block_bytes)}): lower max_model_len to at most {fitting * block_size}, or raise "
            "memory_fraction"
        )
    return fitting


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
