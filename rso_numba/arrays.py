"""Arrays that keep their place: to assign to one of them copies numbers into it.

All weights of a network are one vector. A parameter, and the array of its layer, are views of it, and would
no longer be if an assignment put another array in their place: the network would not notice the new one.
"""

import copy

import numpy as np


class KeepsArrays:
    """Base of objects with arrays that keep their place, and of which every copy has arrays of its own.

    `p.value = array`, `p.value -= step` and `p.value[...] -= step` all write to the same array.
    """

    kept_arrays = ()  # names of their attributes; the first assignment gives each its array

    def __setattr__(self, name, value):
        place = vars(self).get(name) if name in self.kept_arrays else None
        if place is None:
            super().__setattr__(name, value)
        elif value is not place:  # which it is at the end of `p.value -= step`
            value = fitting(value, place, f"{self}.{name}")
            place[...] = value

    def __copy__(self):
        return copy.deepcopy(self)


def fitting(values, place, name):
    """Return `values` as an array that can be copied into the array `place`.

    Raises
    ------
    ValueError, TypeError
        If it has another shape, or a dtype that is no kind of the place's.
    """
    values = np.asarray(values)
    if values.shape != place.shape:
        raise ValueError(f"{name} has shape {place.shape}, and cannot take an array of shape {values.shape}")
    if not np.can_cast(values.dtype, place.dtype, "same_kind"):
        raise TypeError(f"{name} has dtype {place.dtype}, and cannot take an array of dtype {values.dtype}")
    return values
