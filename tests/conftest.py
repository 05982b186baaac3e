"""Fixtures that every test may use."""

import gc
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from kept_together import folder_of, scheduling
from scalellm.services.common import model_store
from told_at_end import pytest_terminal_summary as pytest_terminal_summary

# Whether the suite passes must not depend on how fast the machine is just then, nor on what is drawn today: the same
# examples every time. To look for others: pytest --hypothesis-profile=default.
settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("suite")


def pytest_configure() -> None:
    """Hear SIGINT also where a shell had it ignored, as for `make test &`: processes that tests start inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave what importing all the tests makes, half a million objects, out of garbage collections: those that happen
    on the way take a sixth of the time, and tests that look through all objects would look through these, too.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object | None:
    """Keep the tests of some folders in one process, where others come by files."""
    if config.getoption("dist") != "loadfile":
        return None
    return scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let folders that are kept together come first: at the end the other processes would wait for the one of these."""
    items.sort(key=lambda item: folder_of(item.nodeid) is None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed the random generators before each test, so that its draws do not depend on the tests that ran before it."""
    random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


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


@pytest.fixture(scope="session")
def shallow_model(model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of SmolLM2 with four of its thirty layers, for a quarter of the work.

    What it answers means nothing; its vocabulary and the sizes of its numbers are those of a real model.
    """
    from shallow_gguf import write_shallow  # only here: it imports numpy

    folder = tmp_path_factory.mktemp("models") / "smollm2-shallow"
    folder.mkdir()
    write_shallow(model_dir("smollm2-135m-instruct") / "model.gguf", folder / "model.gguf", 4)
    return folder
