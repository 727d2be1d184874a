"""Tiles: a few outputs whose sums stay in registers until they are complete.

Then each number that is read from memory serves several multiplications. A tile of a convolution has CHANNELS
output channels of PIXELS pixels: a tuple of pairs of Lanes, 8 or 2 of them, as the registers are WIDE or not.
A tile that hangs over the edge computes its last channel or pixel again. A tile of `winograd.py` has TALL
channels of one pixel, or SHORT ones where no more are left.
"""

from collections import namedtuple

import numpy as np

from ..compiling import formula
from .lanes import LANES, WIDE, broadcast, load, multiply_add, number, prefetch, store, store_nontemporal
from .memory import workspaces

CHANNELS, PIXELS = 8 if WIDE else 2, 2  # of a tile of the convolution
TALL, SHORT = (16, 8) if WIDE else (4, 4)
STRIP = 450_000  # bytes of padded input that one thread works on at once: a part of its second-level cache

Filters = namedtuple("Filters", "weight bias")


def side_by_side(weight, bias, multiple=CHANNELS):
    """Return weight (C_out, C_in, k, k) and bias (C_out,) as Filters, (C_in, k, k, C) and (C,).

    The output channels that a tile needs are neighbours; copies of the last one make C a multiple, and the
    last tile whole.
    """
    if len(weight) % multiple:
        channels = np.minimum(np.arange(len(weight) + -len(weight) % multiple), len(weight) - 1)
        weight, bias = weight[channels], bias[channels]
    return Filters(np.ascontiguousarray(weight.transpose(1, 2, 3, 0)), np.ascontiguousarray(bias))


def padded_workspace(shape, size, stride, dtype, strips=True):
    """Return workspaces for padded maps (C, H, W), or for as many of their rows as fit a thread's cache.

    `size` and `stride` are those of the filters. The number of columns is odd: with a power of two between
    them, the same pixels of many rows would compete for the same places of the cache.
    """
    n_channels, height, width = shape
    width = (width - stride + size) | 1
    n_outputs = height // stride
    if strips:
        n_rows = STRIP // (n_channels * width * LANES * np.dtype(dtype).itemsize)
        n_strips = -(-n_outputs // max(1, (n_rows - size) // stride + 1))
        n_outputs = -(-n_outputs // n_strips)
    n_rows = (n_outputs - 1) * stride + size
    return workspaces("padded", (n_channels, n_rows, width, LANES), dtype)


@formula
def prefetch_size(pixels, n_parts, is_next):
    """Return how many pixels of the next block to ask for in each of n_parts, none if there is no next."""
    return pixels.shape[1] // n_parts + 1 if is_next else 0


@formula
def prefetch_part(pixels, b, part, size):
    """Ask for one of the parts of block b of pixels (n_blocks, n, LANES), each of `size` pixels."""
    for i in range(part * size, min(part * size + size, pixels.shape[1])):
        prefetch(pixels, (b, i))


@formula
def two_products(weight, at, o, x, y):
    """Return y + weight[at] (C,), from o on, times x: a tile of pairs, of x a pair."""
    return plus(number(weight, (*at, o)), x, y[0]), plus(number(weight, (*at, o + 1)), x, y[1])


@formula
def eight_products(weight, at, o, x, y):
    """Return the same for a tile of 8 channels."""
    return (plus(number(weight, (*at, o)), x, y[0]), plus(number(weight, (*at, o + 1)), x, y[1]),
            plus(number(weight, (*at, o + 2)), x, y[2]), plus(number(weight, (*at, o + 3)), x, y[3]),
            plus(number(weight, (*at, o + 4)), x, y[4]), plus(number(weight, (*at, o + 5)), x, y[5]),
            plus(number(weight, (*at, o + 6)), x, y[6]), plus(number(weight, (*at, o + 7)), x, y[7]))


@formula
def plus(weight, x, totals):
    """Return totals + weight * x, of which both are pairs."""
    return multiply_add(weight, x[0], totals[0]), multiply_add(weight, x[1], totals[1])


@formula
def two_pairs(numbers, o):
    """Return a tile, each of the numbers (C,) from o on twice."""
    return twice(numbers[o]), twice(numbers[o + 1])


@formula
def eight_pairs(numbers, o):
    """Return the same for a tile of 8 channels."""
    return (twice(numbers[o]), twice(numbers[o + 1]), twice(numbers[o + 2]), twice(numbers[o + 3]),
            twice(numbers[o + 4]), twice(numbers[o + 5]), twice(numbers[o + 6]), twice(numbers[o + 7]))


@formula
def twice(number):
    """Return a pair of the same, in all lanes."""
    return broadcast(number), broadcast(number)


@formula
def load_two(x, n, o, pixels):
    """Return two pixels of the channels from o on of x[n], the last one again if there are too few."""
    return load_pair(x, n, o, pixels), load_pair(x, n, min(o + 1, x.shape[1] - 1), pixels)


@formula
def load_eight(x, n, o, pixels):
    """Return the same for a tile of 8 channels."""
    last = x.shape[1] - 1
    return (load_pair(x, n, o, pixels), load_pair(x, n, min(o + 1, last), pixels),
            load_pair(x, n, min(o + 2, last), pixels), load_pair(x, n, min(o + 3, last), pixels),
            load_pair(x, n, min(o + 4, last), pixels), load_pair(x, n, min(o + 5, last), pixels),
            load_pair(x, n, min(o + 6, last), pixels), load_pair(x, n, min(o + 7, last), pixels))


@formula
def load_pair(x, n, c, pixels):
    """Return two pixels of channel c of x[n]."""
    return load(x, (n, c, pixels[0])), load(x, (n, c, pixels[1]))


@formula
def prefetch_tile(x, n, o, pixels):
    """Ask for what `load_tile` will load."""
    for c in range(o, min(o + CHANNELS, x.shape[1])):
        prefetch(x, (n, c, pixels[0]))
        prefetch(x, (n, c, pixels[1]))


@formula
def store_two(y, n, o, pixels, nontemporal, values):
    """Store two pixels of the channels from o on in y[n], of those that it has."""
    store_pair(y, n, o, pixels, nontemporal, values[0])
    if o + 1 < y.shape[1]:
        store_pair(y, n, o + 1, pixels, nontemporal, values[1])


@formula
def store_eight(y, n, o, pixels, nontemporal, values):
    """Store the same of a tile of 8 channels."""
    n_channels = y.shape[1] - o
    store_pair(y, n, o, pixels, nontemporal, values[0])
    if n_channels > 1:
        store_pair(y, n, o + 1, pixels, nontemporal, values[1])
    if n_channels > 2:
        store_pair(y, n, o + 2, pixels, nontemporal, values[2])
    if n_channels > 3:
        store_pair(y, n, o + 3, pixels, nontemporal, values[3])
    if n_channels > 4:
        store_pair(y, n, o + 4, pixels, nontemporal, values[4])
    if n_channels > 5:
        store_pair(y, n, o + 5, pixels, nontemporal, values[5])
    if n_channels > 6:
        store_pair(y, n, o + 6, pixels, nontemporal, values[6])
    if n_channels > 7:
        store_pair(y, n, o + 7, pixels, nontemporal, values[7])


@formula
def store_pair(y, n, c, pixels, nontemporal, values):
    """Store two pixels of channel c in y[n]."""
    if nontemporal:
        store_nontemporal(y, (n, c, pixels[0]), values[0])
        store_nontemporal(y, (n, c, pixels[1]), values[1])
    else:
        store(y, (n, c, pixels[0]), values[0])
        store(y, (n, c, pixels[1]), values[1])


@formula
def four_channels(weight, at, o, x, y):
    """Return y + weight[at] (C,), from o on, times one pixel x: four channels."""
    return (multiply_add(number(weight, (*at, o)), x, y[0]),
            multiply_add(number(weight, (*at, o + 1)), x, y[1]),
            multiply_add(number(weight, (*at, o + 2)), x, y[2]),
            multiply_add(number(weight, (*at, o + 3)), x, y[3]))


@formula
def eight_channels(weight, at, o, x, y):
    """Return the same for eight channels."""
    return *four_channels(weight, at, o, x, y[:4]), *four_channels(weight, at, o + 4, x, y[4:])


@formula
def sixteen_channels(weight, at, o, x, y):
    """Return the same for sixteen channels."""
    return *eight_channels(weight, at, o, x, y[:8]), *eight_channels(weight, at, o + 8, x, y[8:])


@formula
def four_same(value):
    """Return four channels of one pixel, all of them `value`."""
    return value, value, value, value


@formula
def eight_same(value):
    """Return the same for eight channels."""
    return *four_same(value), *four_same(value)


@formula
def sixteen_same(value):
    """Return the same for sixteen channels."""
    return *eight_same(value), *eight_same(value)


@formula
def store_four_channels(y, n, o, values):
    """Store one pixel of the channels from o on, y[n, o]."""
    store(y, (n, o), values[0])
    store(y, (n, o + 1), values[1])
    store(y, (n, o + 2), values[2])
    store(y, (n, o + 3), values[3])


@formula
def store_eight_channels(y, n, o, values):
    """Store the same of eight channels."""
    store_four_channels(y, n, o, values[:4])
    store_four_channels(y, n, o + 4, values[4:])


@formula
def store_sixteen_channels(y, n, o, values):
    """Store the same of sixteen channels."""
    store_eight_channels(y, n, o, values[:8])
    store_eight_channels(y, n, o + 8, values[8:])


plus_tall, plus_short = (sixteen_channels, eight_channels) if WIDE else (four_channels, four_channels)
tall_of, short_of = (sixteen_same, eight_same) if WIDE else (four_same, four_same)
store_tall, store_short = (
    (store_sixteen_channels, store_eight_channels) if WIDE else (store_four_channels, store_four_channels))
plus_products = eight_products if WIDE else two_products
bias_tile = eight_pairs if WIDE else two_pairs
load_tile = load_eight if WIDE else load_two
store_tile = store_eight if WIDE else store_two
