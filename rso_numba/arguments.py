"""What numbers callers may give: whole numbers, numbers in a range, and what random numbers come from.

NumPy's numbers are as good as Python's; True is not 1 here, nor "3" or 3.0 a whole number.
"""

import math
import numbers

import numpy as np


def whole_number(value, name, smallest=1):
    """Return `value` as an int, if it is a whole number of at least `smallest`; else raise an error."""
    expected = "a positive whole number" if smallest == 1 else f"a whole number, {smallest} or larger"
    if not is_whole(value):
        raise TypeError(f"{name} is {value!r}; expected {expected}")
    if value < smallest:
        raise ValueError(f"{name} is {value}; expected {expected}")
    return int(value)


def is_whole(value):
    """Return whether `value` is a whole number, of any sign."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value):
    """Return whether `value` is a single real number, NaN and infinity included."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def number_below(value, name, high=math.inf):
    """Return `value` as a float, if it is a number with 0 <= value < high; else raise an error."""
    if not is_number(value):
        raise TypeError(f"{name} is {value!r}; expected a number, 0 <= {name} < {high}")
    if not 0 <= value < high:
        raise ValueError(f"{name} is {value!r}; expected 0 <= {name} < {high}")
    return float(value)


def positive_number(value, name, largest=math.inf):
    """Return `value` as a float, if it is a finite number with 0 < value <= largest; else raise an error."""
    expected = f"0 < {name} {'<=' if largest < math.inf else '<'} {largest}"
    if not is_number(value):
        raise TypeError(f"{name} is {value!r}; expected a number, {expected}")
    if not (0 < value <= largest and value < math.inf):
        raise ValueError(f"{name} is {value!r}; expected {expected}")
    return float(value)


def generator(rng):
    """Return the Generator that `rng` is, or one that it seeds.

    Parameters
    ----------
    rng : None, int or numpy.random.Generator
        A seed is 0 or larger; None draws one from the operating system. (What else
        numpy.random.default_rng takes will do, but for a RandomState, which some NumPys refuse.)

    Returns
    -------
    numpy.random.Generator

    Raises
    ------
    ValueError, TypeError
        If it is anything else.
    """
    expected = "expected None, a whole number from 0, or a Generator such as numpy.random.default_rng(0)"
    if isinstance(rng, (bool, np.random.RandomState)):
        raise TypeError(f"rng is {rng!r}; {expected}")
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError):
        problem = ValueError if isinstance(rng, numbers.Integral) else TypeError
        raise problem(f"rng is {rng!r}; {expected}") from None


def training_generator(seed):
    """Return the Generator that trains a network whose initial weights `seed` draws.

    Not the stream that drew the weights, or the first steps would repeat them.
    """
    return np.random.default_rng([whole_number(seed, "seed", 0), 1])


def checked_image_shape(shape):
    """Return (C, H, W) as a tuple of int, or raise a ValueError that says what is wrong with it."""
    sizes = tuple(shape) if np.iterable(shape) else ()
    if len(sizes) != 3:
        raise ValueError(f"image_shape is {shape!r}; expected three positive whole numbers: (channels, "
                         "height, width)")
    return tuple(whole_number(size, f"image_shape[{i}]") for i, size in enumerate(sizes))
