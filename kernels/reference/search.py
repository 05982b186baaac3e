"""Exact searches in rows of logits that look at few of them.

A row is cut into tiles of `TILE` tokens. The tile maxima come from one vectorised pass; after it, a search for large
logits visits only the tiles that can hold one. (torch's own `argmax` and `topk` walk the row an element at a time:
fifteen times as slow at a vocabulary of 49152.)
"""

import torch
from torch import Tensor

TILE = 256


def tile_maxima(logits: Tensor) -> Tensor:
    """Return the maximum of each tile, [S, ceil(V / TILE)], for logits [S, V]; the last tile may be short."""
    rows, vocab = logits.shape
    tiles = vocab // TILE
    maxima = logits[:, : tiles * TILE].reshape(rows, tiles, TILE).amax(-1)
    if tiles * TILE < vocab:
        maxima = torch.cat((maxima, logits[:, tiles * TILE :].amax(-1, keepdim=True)), dim=1)
    return maxima


def argmax(logits: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
    """Return (ids, values) of each row's maximum, [S] each; of equal ones the lowest id."""
    first = maxima.argmax(-1, keepdim=True)
    columns = _columns(first).clamp_(max=logits.shape[1] - 1)
    values = logits.gather(1, columns)
    inner = values.argmax(-1, keepdim=True)
    return columns.gather(1, inner).squeeze(1), values.gather(1, inner).squeeze(1)


def top(logits: Tensor, maxima: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (values, ids) of the k largest logits of each row, [S, k], in descending order, equal ones by id."""
    rows, vocab = logits.shape
    if 0 < k <= maxima.shape[1]:  # the k largest are in the k tiles with the largest maxima
        columns = _columns(maxima.topk(k).indices.sort().values)
        found = logits.gather(1, columns.clamp(max=vocab - 1)).masked_fill_(columns >= vocab, -torch.inf)
        values, at = found.topk(k)
        ids = columns.gather(1, at)
        more = ((found >= values[:, -1:]).sum(-1) > k) | ((maxima >= values[:, -1:]).sum(-1) > k)
    else:
        values, ids = logits.topk(k)
        more = (
            (logits >= values[:, -1:]).sum(-1) > k if k else torch.zeros(rows, dtype=torch.bool, device=logits.device)
        )
    # topk leaves open which of equal values it takes, and their order; only then is the full sort needed.
    tied = more | (values[:, 1:] == values[:, :-1]).any(-1)
    for row in tied.nonzero().flatten().tolist():
        order = logits[row].sort(descending=True, stable=True)
        values[row], ids[row] = order.values[:k], order.indices[:k]
    return values, ids


def at_least(logits: Tensor, maxima: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Return (ids, values) of a set of tokens of one row that holds every logit >= `bound`, ids ascending.

    It holds others as well: `logits` [V] and `maxima` are one row, tiles are taken whole, and a short last tile always.
    """
    vocab = logits.shape[0]
    whole = vocab // TILE * TILE
    tiles = (maxima[: vocab // TILE] >= bound).nonzero().flatten()
    ids = _columns(tiles)
    values = logits[:whole].view(-1, TILE).index_select(0, tiles).flatten()
    if whole < vocab:
        rest = torch.arange(whole, vocab, device=logits.device)
        ids, values = torch.cat((ids, rest)), torch.cat((values, logits[whole:]))
    return ids, values


def top_with_ties(logits: Tensor, maxima: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (ids, values) of the logits of one row that are not less than its k-th largest, ids ascending."""
    bound = float(maxima.topk(k).values[-1]) if k <= maxima.shape[0] else -torch.inf
    ids, values = at_least(logits, maxima, bound)
    return keep(values >= values.topk(k).values[-1], ids, values)


def keep(which: Tensor, ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ids and values where `which` is true; index_select, several times as fast as `[]`."""
    at = which.nonzero().flatten()
    return ids.index_select(0, at), values.index_select(0, at)


def _columns(tiles: Tensor) -> Tensor:
    """Return the token ids of tiles [..., n], [..., n * TILE]."""
    return (tiles.unsqueeze(-1) * TILE + torch.arange(TILE, device=tiles.device)).flatten(-2)
