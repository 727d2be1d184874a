"""Memory that is used again: never while anything can still see it."""

import gc

import numpy as np
import pytest

from rso_numba.kernels import memory


@pytest.fixture(autouse=True)
def nothing_waits(monkeypatch):
    memory._waiting.clear()
    monkeypatch.setattr(memory, "_waiting_bytes", [0])


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_of_a_dead_array_is_used_again():
    first = memory.empty((64, 100), np.float32)
    where = address(first)
    assert where % memory.ALIGNMENT == 0
    del first
    assert address(memory.empty((100, 64), np.float32)) == where


@pytest.mark.parametrize("view", [
    lambda a: a[3:5], lambda a: a.reshape(-1), lambda a: a.T, lambda a: a.view(np.int32)[1:][2:], np.asarray,
    memoryview,
])
def test_any_view_keeps_the_memory(view):
    array = memory.empty((64, 100), np.float32)
    where, seen = address(array), view(array)
    del array
    gc.collect()
    assert address(memory.empty((64, 100), np.float32)) != where
    del seen
    assert address(memory.empty((64, 100), np.float32)) == where


def test_no_more_waits_than_allowed(monkeypatch):
    monkeypatch.setattr(memory, "KEPT", 100_000)
    arrays = [memory.empty((10_000,), np.float32) for _ in range(5)]
    arrays.clear()
    assert memory._waiting_bytes == [80_000]
    assert sum(buffer.size for waiting in memory._waiting.values() for buffer in waiting) == 80_000


def test_small_arrays_do_not_wait():
    memory.empty((3,), np.float32)
    assert memory._waiting_bytes == [0]
