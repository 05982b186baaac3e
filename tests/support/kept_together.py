"""Folders of tests that run in one process, since what their files share costs each process seconds of CPU time."""

from __future__ import annotations

from typing import Any

FOLDERS = (
    "tests/integration/tokenizer/http/",  # a service with its Redis, and OpenAI's and Anthropic's packages
    "tests/integration/tokenizer/",  # the other files there; both at once would keep one process for too long
    "tests/unit/tokenizer/",  # Gemma's tokenizer
)


def folder_of(nodeid: str) -> str | None:
    """Return the folder with which a test is kept together; None: with its file alone."""
    return next((folder for folder in FOLDERS if nodeid.startswith(folder)), None)


def scheduling(config: Any, log: Any) -> object:
    """Return xdist's scheduling by files, but for these folders."""
    from xdist.scheduler import LoadFileScheduling  # only here: it need not be installed

    class FolderScheduling(LoadFileScheduling):
        """Gives a process a file, or all files of a folder."""

        def _split_scope(self, nodeid: str) -> str:
            return folder_of(nodeid) or super()._split_scope(nodeid)

    return FolderScheduling(config, log)
