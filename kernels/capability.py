"""The facts about a device by which ops are chosen."""

from dataclasses import dataclass

import torch

_E4M3_MIN_SM = 89  # conversions to and from e4m3 exist from here on; an older device would need them done by hand


@dataclass(frozen=True, slots=True)
class Capability:
    """The facts about a device by which ops are chosen.

    `sm` is ten times the CUDA compute capability (80 A100, 89 L40S, 90 H100 and H200, 100 B200) and 0 elsewhere;
    `num_sms` is the number of streaming multiprocessors; `name` is the driver's, by which a device can have tile tables
    of its own.
    """

    sm: int
    num_sms: int
    name: str = ""

    @classmethod
    def of(cls, device: torch.device) -> "Capability":
        """Ask the driver."""
        if device.type != "cuda":
            return cls(sm=0, num_sms=1)
        found = torch.cuda.get_device_properties(device)
        return cls(sm=10 * found.major + found.minor, num_sms=found.multi_processor_count, name=found.name)

    @property
    def has_e4m3(self) -> bool:
        """True if the device converts to and from e4m3."""
        return self.sm >= _E4M3_MIN_SM

    def require_e4m3(self, argument: str) -> None:
        """Refuse an argument that needs e4m3 on the device.

        Raises:
            ValueError: the device has no conversions to and from it.
        """
        if not self.has_e4m3:
            needed, there = _E4M3_MIN_SM / 10, self.sm / 10
            raise ValueError(f"{argument}: e4m3 needs compute capability {needed}, the device has {there}")
