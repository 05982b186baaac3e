"""Handles of a link."""

from __future__ import annotations

from scalellm.services.common.link import Handles


def test_a_handle_is_kept_until_its_finish() -> None:
    handles: Handles[str] = Handles()
    handles._last = 2**32 - 2
    assert (handles.take("a"), handles.take("b")) == (2**32 - 1, 1)
    handles.release(1)
    assert (handles.get(1), handles.get(2**32 - 1), len(handles)) == (None, "a", 2)
    assert handles.requests == {2**32 - 1: "a"}
    handles._last = 2**32 - 2
    assert handles.take("c") == 2  # both are still taken
    assert [handles.finish(handle) for handle in (2**32 - 1, 1, 77)] == ["a", None, None]
    assert handles.clear() == ["c"]
    assert len(handles) == 0
