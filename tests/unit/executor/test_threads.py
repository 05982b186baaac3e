"""The choice of the number of threads by measurement."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from scalellm.services.executor.threads import choose_num_threads

HIDDEN = 4


@pytest.fixture(autouse=True)
def _threads_of_torch() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class FakeMachine:
    """Products that advance a clock.

    Args:
        seconds: Time of a row's product by number of threads.
        busy_from: From then on another process uses all cores but one for 50 ms.
    """

    def __init__(self, seconds: dict[int, float], busy_from: float = float("inf")) -> None:
        self.now = 0.0
        self._seconds = seconds
        self._busy_from = busy_from

    def product(self, rows: torch.Tensor) -> None:
        threads = torch.get_num_threads()
        waits = threads > 1 and self._busy_from <= self.now < self._busy_from + 0.05
        of_row = 2 * self._seconds[1] if waits else self._seconds[threads]
        self.now += of_row * len(rows)

    def choose(self, cores: int) -> int:
        return choose_num_threads(self.product, HIDDEN, torch.float32, cores=cores, clock=lambda: self.now)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [({1: 1e-5, 2: 6e-6, 4: 4e-6}, 4), ({1: 1e-5, 2: 6e-6, 4: 9e-6}, 2), ({1: 1e-5, 2: 2e-5, 4: 3e-5}, 1)],
)
def test_the_fastest_number_is_chosen(seconds: dict[int, float], best: int) -> None:
    assert FakeMachine(seconds).choose(cores=4) == best


@pytest.mark.parametrize("busy_from", [step * 0.005 for step in range(40)])
def test_another_process_for_some_time_does_not_change_the_choice(busy_from: float) -> None:
    assert FakeMachine({1: 1e-5, 2: 6e-6}, busy_from).choose(cores=2) == 2
