"""The calls that the one class behind the seam makes of torch.cuda; what these do is the GPU's to show."""

from types import SimpleNamespace

import pytest
import torch

from bench.gpu.device import CudaDevice


class FakeCuda:
    """Counts; time goes on by one millisecond with each call that is timed, and by ten with the first."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def call(self):
        self.now += 1.0 if "call" in self.log else 10.0
        self.log.append("call")

    def event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: other.at - event.at
        return event


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    properties = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, name="NVIDIA H200", L2_cache_size=60 << 20
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: fake.log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 10))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: fake.log.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    return fake


def test_what_is_known_of_the_device(cuda):
    device = CudaDevice()
    assert device.capability.sm == 90
    assert device.capability.num_sms == 132
    assert device.l2_bytes == 60 << 20
    assert device.free_bytes() == 5
    device.release()
    assert cuda.log == ["empty_cache"]


def test_the_median_of_repetitions_without_the_first(cuda):
    device = CudaDevice()
    assert device.time(cuda.call, flush=False, repeats=5) == pytest.approx(1000)
    assert cuda.log == ["call"] * 6 + ["synchronize"]


def test_the_cache_is_overwritten_outside_of_what_is_timed(cuda, monkeypatch):
    device = CudaDevice()
    monkeypatch.setattr(device, "_overwrite_l2", lambda: setattr(cuda, "now", cuda.now + 100))
    assert device.time(cuda.call, flush=True, repeats=3) == pytest.approx(1000)


def test_a_graph_is_captured_and_replayed(cuda, monkeypatch):
    class Graph:
        replay = staticmethod(lambda: cuda.log.append("replay"))

    class Capture:
        def __init__(self, graph):
            assert isinstance(graph, Graph)

        def __enter__(self):
            cuda.log.append("begin")

        def __exit__(self, *exception):
            cuda.log.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    CudaDevice().capture(cuda.call)()
    assert cuda.log == ["begin", "call", "end", "replay"]
