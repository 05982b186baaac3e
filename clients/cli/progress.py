"""Progress on standard error: a spinner or a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.status import Status
from rich.text import Text

from scalellm.cli.output import Terminal
from scalellm.services.common.model_store import ProgressCallback, PullProgress

_PLAIN_INTERVAL = 10.0
_SPINNER_WIDTH = 2


class StageReport:
    """Shows the stages of `up`.

    Args:
        console: Console of the output.
    """

    def __init__(self, console: Terminal) -> None:
        self._console = console
        self._stage = self._detail = ""
        self._status: Status | None = None
        self._next_line = 0.0

    def begin(self, stage: str, detail: str) -> None:
        """A stage begins."""
        self._stage, self._detail = stage, detail
        self._next_line = time.monotonic() + _PLAIN_INTERVAL
        if self._console.is_terminal:
            self._status = self._console.status(self._line(detail))
            self._status.start()
        else:
            self._print(detail)

    def waiting(self, detail: str) -> None:
        """Say that the step still lasts."""
        if self._status is not None:
            self._status.update(self._line(f"{self._detail}, {detail}"))
        elif time.monotonic() >= self._next_line:
            self._next_line += _PLAIN_INTERVAL
            self._print(f"{self._detail}, {detail}")

    def done(self, detail: str) -> None:
        """Say that the step is done."""
        self.stop()
        self._print(f"ready ({detail})")

    def stop(self) -> None:
        """Take the spinner away, whatever comes next."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _text(self, detail: str) -> Text:
        return Text(f"{self._stage:<12}{detail}")

    def _line(self, detail: str) -> Text:
        """The text on one line beside the spinner: what wraps jumps up and down as it changes."""
        text = self._text(" ".join(detail.split()))
        text.truncate(max(1, self._console.width - _SPINNER_WIDTH), overflow="ellipsis")
        return text

    def _print(self, detail: str) -> None:
        self._console.print(self._text(detail), soft_wrap=True)


@contextmanager
def pull_progress(console: Terminal, name: str) -> Iterator[ProgressCallback]:
    """A callback for a model's pull that shows how far it is; silent when the model is here already."""
    if console.is_terminal:
        with _PullBar(console, name) as bar:
            yield bar
    else:
        yield _PullLines(console, name)


class _PullBar:
    def __init__(self, console: Terminal, name: str) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console)
        self._name = name
        self._task = self._progress.add_task(f"model {name}", visible=False)

    def __call__(self, progress: PullProgress) -> None:
        if progress.stage == "done" and self._progress.tasks[0].visible is False:
            return
        waits = " (another process downloads it)" if progress.stage == "waiting" else ""
        self._progress.update(
            self._task,
            description=f"model {self._name}{waits}",
            completed=progress.done_bytes,
            total=progress.total_bytes,
            visible=True,
        )

    def __enter__(self) -> _PullBar:
        self._progress.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._progress.stop()


class _PullLines:
    def __init__(self, console: Terminal, name: str) -> None:
        self._console = console
        self._name = name
        self._shown = -1

    def __call__(self, progress: PullProgress) -> None:
        mebibytes = progress.total_bytes / 2**20
        if progress.stage == "waiting":
            self._print("another process downloads it; waiting")
        elif progress.stage == "done":
            if self._shown >= 0:
                self._print("ready")
        elif (tenth := 10 * progress.done_bytes // max(1, progress.total_bytes)) > self._shown:
            self._shown = tenth
            self._print(f"downloading, {10 * tenth} % of {mebibytes:.0f} MiB")

    def _print(self, text: str) -> None:
        self._console.print(f"model {self._name}: {text}", soft_wrap=True)
