"""Child processes: real ones, talked to and ended in every way; restarts on a clock of the test's own."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm.services.common.child_process import ChildProcess, Restarts, describe_exit
from service_processes import PATIENCE

ECHO = """
import sys
from scalellm.services.common.json_lines import read_line, write_line
while (told := read_line(sys.stdin.buffer)) is not None:
    write_line(sys.stdout.buffer, told)
sys.exit(3)
"""


async def start(code: str, **options: object) -> ChildProcess:
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return await ChildProcess.start([sys.executable, "-c", code], environment, **options)


async def test_messages_go_both_ways_whatever_they_hold() -> None:
    child = await start(ECHO)
    for message in ({"text": "line\nbreak \U0001f600 \ud800"}, {}, {"deep": [{"x": None, "y": 1.5}]}):
        assert await child.ask(message) == message
    assert child.is_running
    await child.kill()
    assert describe_exit(await child.wait()) == "signal SIGKILL"
    assert await child.ask({"x": 1}) is None


async def test_a_child_sees_its_parents_end() -> None:
    child = await start(ECHO)
    assert child._writer is not None
    child._writer.close()
    assert describe_exit(await child.wait()) == "exit code 3"


@pytest.mark.parametrize(
    "said", ["print('no message')", "print('{')", "print('x' * 200000)", "pass", "print('{}', end='')"]
)
async def test_what_is_no_message_is_no_answer(said: str) -> None:
    child = await start(f"import sys; sys.stdin.readline(); {said}")
    assert await child.ask({}) is None
    await child.kill()


async def test_end_waits_for_those_that_end_and_kills_the_others() -> None:
    polite = await start("import signal; print('{}', flush=True); signal.pause()")
    stubborn = await start(
        "import signal; signal.signal(15, 0 or signal.SIG_IGN); print('{}', flush=True); signal.pause()"
    )
    both = (polite, stubborn)
    for child in both:
        assert await child.answer() == {}
    assert await polite.end(PATIENCE)
    assert not await stubborn.end(0.05)
    assert [describe_exit(await child.wait()) for child in both] == ["signal SIGTERM", "signal SIGKILL"]
    for child in both:
        child.terminate()
        await child.kill()
        assert await child.end(0.0)


@pytest.mark.parametrize("is_stubborn", [False, True])
def test_a_child_is_ended_although_a_signal_ends_the_loop(is_stubborn: bool) -> None:
    """`asyncio.run` cancels all tasks then, the one that watches the child among them."""
    children: list[ChildProcess] = []
    ignored = "signal.signal(15, signal.SIG_IGN); " if is_stubborn else ""

    def exit_now() -> None:
        raise SystemExit(143)

    async def run() -> None:
        child = await start(f"import signal; {ignored}print('{{}}', flush=True); signal.pause()")
        children.append(child)
        try:
            assert await child.answer() == {}
            asyncio.get_running_loop().call_soon(exit_now)
            await child.answer()
        except BaseException:
            assert await child.end(0.2 if is_stubborn else PATIENCE) is not is_stubborn
            raise

    with pytest.raises(SystemExit):
        asyncio.run(run())
    assert not children[0].is_running


async def test_a_session_of_its_own_hears_nothing_of_the_terminal() -> None:
    child = await start("import os; print('{}', flush=True); os.read(0, 1)", own_session=True)
    assert os.getsid(child.pid) == child.pid
    assert os.getsid(0) != child.pid
    await child.kill()


async def test_many_children_at_once() -> None:
    children = await asyncio.gather(*(start(ECHO) for _ in range(4)))
    assert await asyncio.gather(*(child.ask({"n": n}) for n, child in enumerate(children))) == [
        {"n": n} for n in range(4)
    ]
    await asyncio.gather(*(child.kill() for child in children))


def test_exits_in_words() -> None:
    assert describe_exit(0) == "exit code 0"
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(-signal.SIGSEGV) == "signal SIGSEGV"
    assert describe_exit(-(signal.SIGRTMIN + 1)) == f"signal {signal.SIGRTMIN + 1}"


@given(
    most=st.integers(0, 8),
    window=st.floats(1.0, 100.0),
    gaps=st.lists(st.floats(0.0, 60.0), min_size=1, max_size=40),
)
def test_restarts_follow_the_crashes_of_the_window(most: int, window: float, gaps: list[float]) -> None:
    now = 0.0
    restarts = Restarts(most, window=window, first_delay=0.5, longest_delay=8.0, clock=lambda: now)
    times: list[float] = []
    for gap in gaps:
        now += gap
        times.append(now)
        recent = [at for at in times if at >= now - window]
        delay = restarts.crashed()
        assert restarts.num_crashes == len(recent)
        assert delay == (None if len(recent) > most else min(8.0, 0.5 * 2 ** (len(recent) - 1)))


def test_what_works_has_a_clean_slate() -> None:
    restarts = Restarts(1, first_delay=0.2)
    assert restarts.crashed() == 0.2
    restarts.forget()
    assert restarts.crashed() == 0.2
    assert restarts.crashed() is None
