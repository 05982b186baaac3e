"""The places in a model of the tensors of a checkpoint."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from scalellm.services.executor.models.shard import Part

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class WeightSlot:
    """The place of one tensor of a checkpoint, and its conversion to what is kept.

    Attributes:
        name: its Hugging Face name.
        dests: the memory it fills, perhaps slices of packed matrices. A tensor that is only checked, or becomes a
            number of the layer, fills none.
        shape: of the tensor in the checkpoint; `()` takes one element of any shape. Default: that of the one dest.
        window: what a rank of several reads of the tensor, a range of each dimension; `shape` is then the window's.
            None: all of it.
        dtypes: that the tensor may have. uint8 asks for a GGUF tensor's blocks as they are in the file,
            `[rows, bytes of a row]`, where `shape` is that of the matrix they stand for.
        encode: turns the tensor, on the model's device, into what `dests` are to hold; the default changes nothing.
        optional: whether a checkpoint may lack it.
        aliases: other names it may have.
        finish: called once this and all other tensors of its weight are loaded; see `finish_all`.
    """

    def __init__(
        self,
        name: str,
        *dests: Tensor,
        shape: tuple[int, ...] | None = None,
        dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES,
        encode: Callable[[Tensor], Sequence[Tensor]] | None = None,
        optional: bool = False,
        aliases: tuple[str, ...] = (),
        window: tuple[slice, ...] | None = None,
    ) -> None:
        self.name = name
        self.dests = dests
        self.shape = tuple(dests[0].shape) if shape is None else shape
        self.dtypes = dtypes
        self.optional = optional
        self.aliases = aliases
        self.window = window
        self.finish: Callable[[], None] | None = None
        self._encode = encode

    @property
    def is_plain(self) -> bool:
        """True if the tensor is kept as it is stored, so that it may be loaded in pieces."""
        return self._encode is None

    @property
    def dest(self) -> Tensor:
        """The memory of a tensor that fills one."""
        (dest,) = self.dests
        return dest

    @property
    def num_bytes(self) -> int:
        """Bytes of the model that the tensor fills."""
        return sum(dest.nbytes for dest in self.dests)

    def takes_shape(self, shape: tuple[int, ...]) -> bool:
        """Return whether a tensor of this shape belongs here."""
        return shape == self.shape or (self.shape == () and math.prod(shape) == 1)

    def cut_from(self, whole: "WeightSlot", part: Part) -> "WeightSlot":
        """Return the slot of a rank that holds `part` of a weight: this one, reading its window of the whole tensor.

        `whole` is the same slot of the whole weight. Its dimensions that differ from this one's are those that are cut,
        perhaps packed or in groups. What fills no memory is only checked, and that is done as a whole.
        """
        if not self.shape:  # one element belongs to all
            return self
        if not self.dests:
            return whole
        starts = [
            part.start * length // part.whole if length != mine else 0
            for mine, length in zip(self.shape, whole.shape, strict=True)
        ]
        self.window = tuple(slice(start, start + mine) for start, mine in zip(starts, self.shape, strict=True))
        return self

    def load(self, tensor: Tensor, device: torch.device) -> None:
        """Fill the slot with the tensor, or its window. Conversions are computed on `device`."""
        if self._encode is None:
            self.dest.copy_(tensor.view(self.dest.shape))
            return
        for dest, value in zip(self.dests, self._encode(tensor.to(device)), strict=True):
            dest.copy_(value)


def finish_with(finish: Callable[[], None], slots: Iterable[WeightSlot]) -> None:
    """Have `finish` called when the slots, all of a weight, are filled."""
    for slot in slots:
        slot.finish = finish


def finish_all(slots: Iterable[WeightSlot]) -> None:
    """Call the `finish` of all slots, once all tensors of a model are loaded."""
    for finish in dict.fromkeys(slot.finish for slot in slots if slot.finish is not None):
        finish()
