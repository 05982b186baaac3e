"""The run folder is its user's alone, whatever somebody else has put there."""

import asyncio
import os
from pathlib import Path

import pytest

from scalellm.launcher import Instance, LauncherError, State
from scalellm.launcher.credentials import make_link_token, with_link_token
from scalellm.launcher.processes import spawn
from scalellm.services.common.lifecycle import StartError, announce
from scalellm.services.common.new_file import create_file, write_new

STATE = State(model="m", redis_url="redis://:secret@h", drain_limit=1.0)


async def say_hello(log: Path) -> None:
    _, process = await spawn("scheduler", "scheduler", ["/bin/echo", "hello"], log, {})
    await process.wait()


def planted(path: Path, target: Path) -> Path:
    """A link at `path`, whose parents are there, to a file or folder of somebody's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


@pytest.mark.parametrize("place", ["run", "run/default", "run/default/logs"])
def test_a_link_in_place_of_a_folder_is_refused(tmp_path: Path, place: str) -> None:
    other = tmp_path / "other"
    other.mkdir(mode=0o755)
    link = planted(tmp_path / "home" / place, other)
    instance = Instance(tmp_path / "home")
    with pytest.raises(LauncherError, match=f"{link} is a link, which is not followed"), instance.locked():
        pass
    assert list(other.iterdir()) == []
    assert other.stat().st_mode & 0o777 == 0o755


def test_a_dangling_link_is_refused(tmp_path: Path) -> None:
    planted(tmp_path / "run" / "default", tmp_path / "nothing")
    with pytest.raises(LauncherError, match="is a link"), Instance(tmp_path).locked():
        pass


def test_home_may_be_a_link(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    instance = Instance(planted(tmp_path / "home", disk))
    with instance.locked():
        instance.save(STATE)
    assert instance.load() == STATE
    assert (disk / "run" / "default" / "state.json").exists()


def test_what_is_another_users_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = Instance(tmp_path)
    with instance.locked():
        instance.save(STATE)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(LauncherError, match="belongs to another user"), instance.locked():
        pass
    with pytest.raises(LauncherError, match="belongs to another user"):
        instance.load()


def test_folders_and_files_are_private_whatever_they_were(tmp_path: Path) -> None:
    instance = Instance(tmp_path)
    instance.logs.mkdir(parents=True)
    for folder in (instance.folder.parent, instance.folder, instance.logs):
        folder.chmod(0o777)
    with instance.locked():
        instance.save(STATE)
        make_link_token(instance, {})
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*")}
    assert modes == {
        instance.folder: 0o700,
        instance.logs: 0o700,
        instance.folder / "state.json": 0o600,
        instance.link_token: 0o600,
    }
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700


def test_no_file_is_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    instance = Instance(tmp_path)
    with instance.locked():
        address = instance.announce_file("scheduler")
        partial = address.with_name(f"{address.name}.{os.getpid()}")
        log = instance.log_file("scheduler")
        for place in (instance.folder / "state.partial", instance.link_token, address, partial, log):
            planted(place, victim)
        with pytest.raises(LauncherError, match="is a link, which is not followed"):
            instance.read_announced("scheduler")
        instance.save(STATE)
        make_link_token(instance, {})
        announce(address, "127.0.0.1:1")
        asyncio.run(say_hello(log))
        assert instance.load() == STATE
        assert instance.read_announced("scheduler") == ["127.0.0.1:1"]
        assert log.read_text() == "hello\n"
        planted_state = instance.folder / "state.json"
        planted_state.unlink()
        planted(planted_state, victim)
        with pytest.raises(LauncherError, match="is a link"):
            instance.load()
    assert victim.read_text() == "precious"


def test_what_appears_meanwhile_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    unlink = Path.unlink

    def raced(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        path.symlink_to(victim)

    monkeypatch.setattr(Path, "unlink", raced)
    with pytest.raises(FileExistsError):
        create_file(tmp_path / "a")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a", "x")
    with pytest.raises(StartError, match="choose another --announce"):
        announce(tmp_path / "b", "x")
    assert victim.read_text() == "precious"


def test_a_link_token_of_the_users_own_wins(tmp_path: Path) -> None:
    instance = Instance(tmp_path)
    with instance.locked():
        own = {"SCALELLM_SCHEDULER_LINK_TOKEN_FILE": "/own"}
        make_link_token(instance, own)
        assert with_link_token(instance, own) == own
        make_link_token(instance, {"OTHER": "1", "SCALELLM_SCHEDULER_LINK_TOKEN_FILE": ""})
        names = [f"SCALELLM_{kind}_LINK_TOKEN_FILE" for kind in ("TOKENIZER", "SCHEDULER", "EXECUTOR")]
        assert with_link_token(instance, own) == dict.fromkeys(names, str(instance.link_token)), (
            "what runs has this one"
        )
        first = instance.link_token.read_text()
        make_link_token(instance, {})
        assert len(first.strip()) == 64
        assert instance.link_token.read_text() != first
