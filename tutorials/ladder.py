"""What each step of making the convolution fast has brought: `python tutorials/ladder.py` prints a table.

Measured is the 3x3 convolution of 16 to 16 channels on 1024 images of 14x14, with as many threads as Numba
takes. Nothing else should run on the machine. Nested loops in Python are timed on one image.
"""

import os
import subprocess
import sys
import tempfile
import timeit
from pathlib import Path

import numpy as np
from numba import get_num_threads, njit, prange

N, CHANNELS, SIZE = 1024, 16, 14
WITHOUT_PREFETCH = "--without-prefetch"


@njit(parallel=True, fastmath=True)
def numba_loops(padded, weight, y):
    # padded (N, C_in, H + 2, W + 2), weight (C_out, C_in, 3, 3), y (N, C_out, H, W)
    for n in prange(y.shape[0]):
        for o in range(y.shape[1]):
            for h in range(y.shape[2]):
                for w in range(y.shape[3]):
                    total = np.float32(0)
                    for c in range(weight.shape[1]):
                        for i in range(3):
                            for j in range(3):
                                total += weight[o, c, i, j] * padded[n, c, h + i, w + j]
                    y[n, o, h, w] = total


@njit(parallel=True, fastmath=True)
def numba_lanes(padded, weight, y):
    # the same, with 16 images side by side: padded (n_blocks, C_in, H + 2, W + 2, 16), y likewise
    for b in prange(y.shape[0]):
        for o in range(y.shape[1]):
            for h in range(y.shape[2]):
                for w in range(y.shape[3]):
                    total = np.zeros(16, np.float32)
                    for c in range(weight.shape[1]):
                        for i in range(3):
                            for j in range(3):
                                for lane in range(16):
                                    total[lane] += weight[o, c, i, j] * padded[b, c, h + i, w + j, lane]
                    y[b, o, h, w] = total


def seconds(function, *arguments):
    """Return the median time of a call, after a first one."""
    function(*arguments)
    return float(np.median(timeit.repeat(lambda: function(*arguments), number=1, repeat=15)))


def arrays():
    """Return images (N, C, H, W), weights and biases."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((N, CHANNELS, SIZE, SIZE), np.float32)
    return images, rng.standard_normal((CHANNELS, CHANNELS, 3, 3), np.float32), np.zeros(CHANNELS, np.float32)


def tiles_without_prefetch():
    """Return the time of the tiles, if the instruction that asks for memory ahead of its use does nothing."""
    from rso_numba.kernels.cpu import lanes

    lanes.prefetch = njit(lambda array, position: None)  # before a kernel is compiled with it
    from rso_numba.kernels import cpu

    images, weight, bias = arrays()
    return seconds(cpu.conv2d_forward, cpu.pack(images), weight, bias)


def main():
    """Print the table."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import naive

    from rso_numba.kernels import cpu, plain
    from rso_numba.kernels.cpu.convolution import conv2d_before_norm

    images, weight, bias = arrays()
    x = cpu.pack(images)
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    packed = cpu.pack(padded)
    with tempfile.TemporaryDirectory() as folder:  # for kernels that nobody should find again
        run = subprocess.run([sys.executable, __file__, WITHOUT_PREFETCH], check=True, capture_output=True,
                             text=True, env={**os.environ, "NUMBA_CACHE_DIR": folder})
    steps = [
        ("nested loops in Python", N * timeit.timeit(lambda: naive.conv2d(images[:1], weight), number=1)),
        ("NumPy", seconds(plain.conv2d_forward, images, weight, bias)),
        ("Numba: nested loops, compiled", seconds(numba_loops, padded, weight, np.empty_like(images))),
        ("lanes: 16 images side by side", seconds(numba_lanes, packed, weight, np.empty_like(x))),
        ("tiles: sums stay in registers", float(run.stdout)),
        ("prefetch: memory is asked for ahead", seconds(cpu.conv2d_forward, x, weight, bias)),
        ("Winograd: a quarter of the multiplications", seconds(conv2d_before_norm, x, weight, bias)),
    ]
    print(f"{get_num_threads()} threads\n\n| step | milliseconds | times as fast as the step before |")
    print("|---|---:|---:|")
    for (name, taken), (_, before) in zip(steps, [steps[0], *steps], strict=False):
        milliseconds, ratio = 1000 * taken, before / taken
        digits, ratio_digits = (1 if number < 100 else 0 for number in (milliseconds, ratio))
        print(f"| {name} | {milliseconds:,.{digits}f} | {ratio:,.{ratio_digits}f} |")


if __name__ == "__main__":
    print(tiles_without_prefetch()) if WITHOUT_PREFETCH in sys.argv else main()
