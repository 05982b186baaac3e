"""Keys and link tokens that cannot be read show on each service, before they open nothing."""

from __future__ import annotations

from pathlib import Path

from line import scrape
from scalellm.services.common.api_keys import Role, key_entry, new_key
from service_processes import ServiceProcess, Spawn, eventually


def unread(service: ServiceProcess, name: str) -> float:
    return scrape(service)[f"scalellm_{name}_keys_unread"]


async def test_an_unread_file_shows_on_the_service_that_needs_it(spawn: Spawn, tmp_path: Path, model_dir) -> None:
    token, keys = tmp_path / "link.token", tmp_path / "keys.toml"
    token.write_text("0123456789abcdef0123456789abcdef")
    keys.write_text(key_entry(new_key(), "ops", Role.ADMIN))
    links = ("--link-token-file", str(token), "--metrics-port", "0")
    fake = ("--engine", "fake", "--model", str(model_dir("smollm2-135m-instruct")))
    executor = spawn("executor", *fake, *links)
    scheduler = spawn("scheduler", "--executors", executor.address, "--api-keys", str(keys), *links)
    assert (unread(executor, "executor"), unread(scheduler, "scheduler")) == (0, 0)
    written = keys.read_text()
    keys.write_text("[[keys]]")
    await eventually(lambda: unread(scheduler, "scheduler") == 1)
    assert unread(executor, "executor") == 0
    keys.write_text(written)
    token.unlink()
    await eventually(lambda: unread(executor, "executor") == 1)
    assert unread(scheduler, "scheduler") == 1
    token.write_text("0123456789abcdef0123456789abcdef")
    await eventually(lambda: (unread(executor, "executor"), unread(scheduler, "scheduler")) == (0, 0))
