"""Compiled kernels come back from a run in pieces, and are found by the next one wherever its cache is."""

import os

import pytest

pytest.importorskip("triton")

from triton.runtime.cache import FileCacheManager

from bench.gpu import kernel_cache
from bench.gpu.kernel_cache import KernelCache


def put(folder, monkeypatch, key, size=10):
    """Leave what Triton leaves for a kernel, through Triton."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    manager = FileCacheManager(key)
    files = {"k.json": b"{}", "k.cubin": os.urandom(size), "k.ttir": b"not needed"}
    manager.put_group("k.json", {name: manager.put(data, name) for name, data in files.items()})
    return files


def get(folder, monkeypatch, key):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    return {name: open(path, "rb").read() for name, path in (FileCacheManager(key).get_group("k.json") or {}).items()}


def test_triton_finds_what_was_carried_elsewhere(tmp_path, monkeypatch):
    cache = KernelCache(tmp_path / "cache", tmp_path / "out")
    first = put(cache.folder, monkeypatch, "first")
    cache.save()
    second = put(cache.folder, monkeypatch, "second")
    cache.save()
    cache.save()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["triton-cache-0.tar.gz"]
    (tmp_path / "cache").rename(tmp_path / "gone")
    there = KernelCache(tmp_path / "elsewhere", tmp_path / "out2")
    assert there.restore(tmp_path / "out") == 2
    for key, files in (("first", first), ("second", second)):
        assert get(there.folder, monkeypatch, key) == {name: files[name] for name in ("k.json", "k.cubin")}


def test_pieces_are_small_and_few(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_cache, "_PIECE_BYTES", 1600)
    cache = KernelCache(tmp_path / "cache", tmp_path / "out")
    cache.save()  # nothing was compiled yet
    for i in range(12):
        put(cache.folder, monkeypatch, f"key{i}", size=700)
        cache.save()
    pieces = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in pieces] == [f"triton-cache-{i}.tar.gz" for i in range(4)]
    assert all(path.stat().st_size < 4000 for path in pieces)
    assert KernelCache(tmp_path / "elsewhere", tmp_path).restore(tmp_path / "out") == 8
