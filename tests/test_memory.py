"""Memory that is used again: never while anything can still see it."""

import gc
import sys
import threading
import types
from functools import partial

import numba
import numpy as np
import pytest

from rso_numba.kernels import cpu
from rso_numba.kernels.cpu import delta, memory
from rso_numba.kernels.cpu.convolution import conv2d_fused
from rso_numba.kernels.cpu.fusion import no_epilogue
from rso_numba.kernels.cpu.lanes import LANES


@pytest.fixture(autouse=True)
def nothing_waits(monkeypatch):
    memory._take_back()
    memory._waiting.clear()
    monkeypatch.setattr(memory, "_waiting_bytes", [0])
    monkeypatch.setattr(memory, "SMALLEST", 4096)  # so that arrays need not be large here


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
    memory._take_back()
    assert memory._waiting_bytes == [80_000]
    assert sum(buffer.size for waiting in memory._waiting.values() for buffer in waiting) == 80_000


def test_ctrl_c_is_not_lost_while_an_array_dies():
    array = memory.empty((64, 100), np.float32)
    callbacks = [reference.__callback__ for reference, _ in memory._lent.values()]
    assert callbacks and all(isinstance(callback, types.BuiltinMethodType) for callback in callbacks)
    del array  # calls nothing of Python, in which Ctrl-C would only be printed


def test_small_arrays_do_not_wait():
    memory.empty((1023,), np.float32)
    memory._take_back()
    assert memory._waiting_bytes == [0]
    memory.empty((1024,), np.float32)
    memory._take_back()
    assert memory._waiting_bytes == [4096]


def test_sizes_that_nobody_asks_for_make_room(monkeypatch):
    monkeypatch.setattr(memory, "KEPT", 100_000)
    stale = [memory.empty((10_000,), np.float32) for _ in range(2)]
    stale.clear()
    array = memory.empty((20_000,), np.float32)
    where = address(array)
    del array
    memory._take_back()
    assert memory._waiting_bytes == [80_000] and list(memory._waiting) == [80_000]
    assert address(memory.empty((20_000,), np.float32)) == where


def test_threads_of_python_take_memory_at_the_same_time(request):
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)
    problems = []

    def take_and_give_back():
        try:
            for _ in range(20_000):
                memory.empty((1100,), np.float32)
        except Exception as problem:
            problems.append(problem)

    threads = [threading.Thread(target=take_and_give_back) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    waiting = sum(buffer.size for buffers in memory._waiting.values() for buffer in buffers)
    assert memory._waiting_bytes == [waiting]


def test_an_arena_holds_copies_in_the_same_memory_again(monkeypatch, rng):
    monkeypatch.setattr(memory.Arena, "CHUNK_BYTES", 4096)
    arena, arrays = memory.Arena(10_000), [rng.random((5, 3)), rng.random(200, np.float32)]
    for _ in range(2):
        held = [arena.hold(arrays) for _ in range(4)]
        for copies in held:
            for copy, array in zip(copies, arrays, strict=True):
                np.testing.assert_array_equal(copy, array)
                assert copy.dtype == array.dtype and address(copy) % memory.ALIGNMENT == 0
        assert len({address(copy) for copies in held for copy in copies}) == 8
        places = [address(copies[0]) for copies in held]
        arena.forget()
    assert [address(arena.hold(arrays)[0]) for _ in range(4)] == places


def test_an_arena_is_bounded(monkeypatch):
    monkeypatch.setattr(memory.Arena, "CHUNK_BYTES", 4096)
    arena = memory.Arena(10_000)
    held = [arena.hold([np.zeros(1000, np.float32)]) for _ in range(4)]
    assert [copies is None for copies in held] == [False, False, True, True]
    arena.forget()
    assert arena.hold([np.zeros(2400, np.float32)]) is not None  # chunks that are too small now make room
    assert arena.hold([np.zeros(1000, np.float32)]) is None


def test_an_arena_that_forgot_has_room_for_what_a_new_one_has(monkeypatch):
    # a search that goes on after an interruption has a new one, and has to hold the same mini-batches
    monkeypatch.setattr(memory.Arena, "CHUNK_BYTES", 4096)
    arenas = memory.Arena(10_000), memory.Arena(10_000)
    assert arenas[0].hold([np.zeros(2250, np.float32)]) is not None
    arenas[0].forget()
    found = [[arena.hold([np.zeros(750, np.float32)]) is not None for _ in range(3)] for arena in arenas]
    assert found[0] == found[1] == [True, True, False]
    assert sum(map(len, arenas[0].spare)) + sum(len(chunk) for chunk, _ in arenas[0].chunks) <= 10_000


def test_scratch_is_the_same_for_the_same_arguments_of_one_thread(monkeypatch):
    monkeypatch.setattr(memory, "_own", threading.local())
    monkeypatch.setattr(memory, "SCRATCHES", 3)
    arguments = "padded", (64, 100), np.float32
    first = memory.scratch(*arguments)
    assert first.shape == (64, 100) and memory.scratch(*arguments) is first
    others = [memory.scratch("sums", *arguments[1:]), memory.scratch("padded", (100, 64), np.float32)]
    thread = threading.Thread(target=lambda: others.append(memory.scratch(*arguments)))
    thread.start()
    thread.join()
    assert len({address(array) for array in (first, *others)}) == 4
    memory.scratch("a fourth", *arguments[1:])  # more than are kept: all are forgotten
    assert memory.scratch(*arguments) is not first


def test_shares_are_all_blocks_in_their_order():
    for n_threads, n_blocks in ((1, 5), (2, 5), (3, 2), (4, 64), (5, 0)):
        workspaces = [memory.workspace_of(thread) for thread in range(n_threads)]
        shares = [memory.block_range(t, 2 * n_threads, n_blocks) for t in workspaces]
        assert [b for share in shares for b in range(*share)] == list(range(n_blocks))
        sizes = [stop - start for start, stop in shares]
        assert max(sizes) - min(sizes) <= 1


def test_the_workspaces_between_those_of_threads_stay_unused(monkeypatch, rng):
    monkeypatch.setattr(memory, "_own", threading.local())
    monkeypatch.setattr(
        memory, "_aligned", lambda size: np.full(size // 4, np.nan, np.float32).view(np.uint8))
    n_blocks = numba.config.NUMBA_NUM_THREADS
    numba.set_num_threads(n_blocks)
    x = cpu.pack(rng.standard_normal((n_blocks * LANES, 8, 12, 12), np.float32))
    weight, bias = rng.standard_normal((8, 8, 3, 3), np.float32), np.zeros(8, np.float32)
    for exact_zeros in (True, False):
        conv2d_fused(x, no_epilogue(x), weight, bias, n_blocks * LANES, exact_zeros=exact_zeros)
    cpu.conv2d_backward(x, weight, x)
    cpu.dense_forward(x, rng.standard_normal((3, x[0].size // LANES), np.float32), bias[:3])
    direction, _ = delta.channel_direction(x, np.array([(0, 1, 1)]), np.ones(1, np.float32), 3, 1)
    epilogue = no_epilogue(direction)
    delta.epilogue_change(x, 0, direction, np.float32(1), epilogue, epilogue)
    workspaces = {name: array for (name, *_), array in vars(memory._own).items() if name != "dweight"}
    assert set(workspaces) == {
        "padded", "sums", "filters", "points", "products", "rows", "features", "tiles", "changed", "old"}
    for array in workspaces.values():
        assert len(array) == 2 * n_blocks
        assert np.isnan(array[1::2]).all() and np.isfinite(array[::2, 0]).any()
