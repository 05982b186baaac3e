"""Fixtures that every test may use."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from services.common import model_store


@pytest.fixture(scope="session")
def model_dir() -> Callable[[str], Path]:
    """Return the directory of a catalogue model, pulled on first use.

    The store is the user's own (`$SCALELLM_HOME`), so a model is fetched once per machine; its file lock makes this
    safe under xdist.
    """
    home = Path(os.environ.get("SCALELLM_HOME") or Path.home() / ".cache" / "scalellm")

    def get(name: str) -> Path:
        return model_store.pull(name, home)

    return get
