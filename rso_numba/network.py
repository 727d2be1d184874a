"""A network: a chain of layers that share one vector of weights."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from . import kernels, losses
from .arguments import checked_image_shape, generator, whole_number
from .arrays import KeepsArrays, fitting
from .datasets import check_images, check_labels
from .files import read_npz, written_beside
from .layers import KINDS, OF_ITS_OWN, BatchNorm, Standardize, chain_leaves, chain_output_shape
from .passes import Pass

FORMAT = 1  # of the files that networks are saved in
FORWARD_IMAGES = 256  # that pass through the network at once: few enough for activations to stay in the cache


@dataclass(eq=False)
class Parameter(KeepsArrays):
    """A named array of weights.

    Parameters
    ----------
    layer, name : str
        Such as "conv1" and "weight".
    value : ndarray
        The weights themselves: a view of `Network.weights`. Writing or assigning to it changes the network.
    """

    layer: str
    name: str
    value: np.ndarray
    kept_arrays = ("value",)

    def __str__(self):
        return f"{self.layer}.{self.name}"

    @property
    def fan_in(self):
        """Number of weights that make one activation (of a bias, gamma or beta: 1)."""
        return self.value[0].size if self.value.ndim > 1 else 1


class Network(KeepsArrays):
    """A chain of layers from images to logits. A copy of it (`copy`, `pickle`) shares nothing with it.

    Parameters
    ----------
    layers : list of Layer
        In the order that images pass them. Their weights are created here, filled with zeros
        (gamma with ones); `initialize` draws them. A layer can be in one network only, and once.
    image_shape : tuple of int
        (C, H, W).
    n_classes : int
        Number of logits.
    name : str
        Name of the model.
    dtype : dtype
        float32; float64 serves to check gradients with the `numpy` backend.

    Attributes
    ----------
    weights : ndarray (n_weights,)
        All weights, layer by layer from the input. Each `Parameter.value`, and the array of its layer,
        is a view of it. Assigning to any of them (`network.weights = array`) copies numbers into it.

    Raises
    ------
    ValueError
        If the images are too small for the layers, the last layer has not `n_classes` outputs, or a layer
        is in another network or here twice.
    """

    kept_arrays = ("weights",)

    def __init__(self, layers, image_shape, n_classes, name="custom", dtype=np.float32):
        self.layers, self.name = list(layers), name
        self.image_shape = checked_image_shape(image_shape)
        self.n_classes = whole_number(n_classes, "n_classes")
        self.leaves, shapes, shape, counted = [], [], self.image_shape, Counter()
        for leaf, leaf_shape in chain_leaves(self.layers, shape):
            if leaf in counted:
                raise ValueError(f"{leaf} is here twice; {OF_ITS_OWN}")
            kind = "shortcut_" * leaf.in_shortcut + type(leaf).__name__.removesuffix("2D").lower()
            counted.update((kind, leaf))
            leaf.name = f"{kind}{counted[kind]}"
            for name in leaf.kept_arrays:  # of a layer that was copied out of a network
                vars(leaf).pop(name, None)
            leaf.allocate_buffers(leaf_shape)
            self.leaves.append(leaf)
            shapes += [(leaf, *item) for item in leaf.parameter_shapes(leaf_shape).items()]
        shape = chain_output_shape(self.layers, shape)
        if shape != (self.n_classes,):
            raise ValueError(f"the last layer gives {shape} numbers an image; expected ({self.n_classes},)")
        self.weights = np.zeros(sum(math.prod(s) for _, _, s in shapes), dtype)
        self._parameters = [Parameter(leaf.name, name, np.empty(s, dtype)) for leaf, name, s in shapes]
        self._make_views()
        for parameter in self._parameters:
            parameter.value[...] = parameter.name == "gamma"

    def _make_views(self):
        """Make the arrays of parameters and layers views of the one vector of weights."""
        leaves, views = {leaf.name: leaf for leaf in self.leaves}, self.views(self.weights)
        for parameter in self._parameters:
            view = views[str(parameter)]
            vars(parameter)["value"] = vars(leaves[parameter.layer])[parameter.name] = view
        for leaf in self.leaves:
            leaf.in_network = True

    def __setstate__(self, state):
        # a copy, or what pickle or joblib has read: its arrays are no views, and may be read-only
        vars(self).update(state, weights=np.array(state["weights"]))
        self._make_views()

    def __repr__(self):
        return f"Network({self.name!r}, image_shape={self.image_shape}, n_weights={self.n_weights})"

    def parameters(self):
        """Return the list of `Parameter`, layer by layer from the input."""
        return list(self._parameters)

    @property
    def n_weights(self):
        """Number of weights."""
        return self.weights.size

    @cached_property
    def has_batchnorm(self):
        """Whether any layer is a BatchNorm."""
        return any(isinstance(leaf, BatchNorm) for leaf in self.leaves)

    def views(self, vector):
        """Return `vector` (n_weights,) cut up as the weights are: views of it, by `str(parameter)`."""
        views, start = {}, 0
        for parameter in self._parameters:
            shape, stop = parameter.value.shape, start + parameter.value.size
            views[str(parameter)], start = vector[start:stop].reshape(shape), stop
        return views

    def initialize(self, init, rng=None):
        """Draw the initial weights.

        Parameters
        ----------
        init : {"he", "authors", "glorot"}
            See `presets.Preset`.
        rng : None, int or Generator
        """
        rng = generator(rng)
        in_shortcut = {leaf.name for leaf in self.leaves if leaf.in_shortcut}
        for parameter in self._parameters:
            if parameter.name == "weight":
                shape, fan_in = parameter.value.shape, parameter.fan_in
                fan_out = shape[0] * int(np.prod(shape[2:]))
                limit = np.sqrt(6 / (fan_in + fan_out))
                if init == "glorot":
                    parameter.value[...] = rng.uniform(-limit, limit, shape)
                    continue
                if init == "authors" and parameter.layer in in_shortcut:
                    fan_in = shape[0]
                parameter.value[...] = rng.normal(0, np.sqrt(2 / fan_in), shape)

    def fit_scaling(self, images):
        """Fit the input scaling to the training images, unless an earlier training has done so."""
        for leaf in self.leaves:
            if isinstance(leaf, Standardize) and not leaf.fitted:
                leaf.fit(images)

    def propagate(self, x, run):
        """Return the logits of packed images `x`; `run` is the `Pass`."""
        return run.kernels.propagate(self.layers, x, run)

    def backpropagate(self, dlogits, run):
        """Fill `run.gradients` from the gradient of the loss with respect to the logits."""
        run.first = next(layer for layer in self.leaves if layer.parameter_names)
        run.kernels.backpropagate(self.layers, dlogits, run)

    def forward(self, images, backend="cpu"):
        """Return the logits, with BatchNorm's stored statistics.

        Parameters
        ----------
        images : ndarray (N, C, H, W), float32 in [0, 1]
        backend : {"cpu", "numpy", "cuda", "auto"}
            "cuda" is an NVIDIA GPU; "auto" is "cuda" where that works, else "cpu".

        Returns
        -------
        ndarray (N, n_classes), float32

        Raises
        ------
        ValueError, TypeError
            If the images have another shape or hold NaN or infinite pixels.
        GpuError
            If the backend is "cuda" and there is no GPU that works, or its memory is full.
        """
        images, k = check_images(images, self.image_shape), kernels.backend(backend)
        logits = []
        for start in range(0, len(images), FORWARD_IMAGES):
            chunk = images[start : start + FORWARD_IMAGES]
            run = Pass(k, len(chunk))
            logits.append(k.unpack(self.propagate(k.pack(chunk), run), len(chunk)))
        return np.concatenate(logits)

    def predict(self, images, backend="cpu"):
        """Return the most probable class of each image, (N,) int64.

        Raises
        ------
        ValueError, TypeError, GpuError
            See `forward`.
        FloatingPointError
            If logits are NaN or infinite: they name no class.
        """
        logits = self.forward(images, backend)
        _check_images_finite(logits, "logits that are")
        return logits.argmax(axis=1)

    def evaluate(self, images, labels, backend="cpu"):
        """Return mean cross-entropy and accuracy on labelled images.

        Parameters
        ----------
        images : ndarray (N, C, H, W), float32 in [0, 1]
        labels : ndarray (N,), int
        backend : {"cpu", "numpy", "cuda", "auto"}

        Returns
        -------
        loss, accuracy : float

        Raises
        ------
        ValueError, TypeError
            If images or labels do not fit the network, or each other.
        FloatingPointError
            If the loss of an image is NaN or infinite.
        GpuError
            See `forward`.
        """
        labels = check_labels(labels, self.n_classes, len(images))
        logits = self.forward(images, backend)
        with np.errstate(over="ignore", invalid="ignore"):  # told below
            each = losses.cross_entropy(logits, labels)
        _check_images_finite(each, "a loss that is")
        return float(each.mean(dtype=np.float64)), losses.accuracy(logits, labels)

    def calibrate(self, images, backend="cpu"):
        """Store the statistics of `images` in every BatchNorm, layer by layer (the authors' way).

        Parameters
        ----------
        images : ndarray (N, C, H, W), float32 in [0, 1]
        backend : {"cpu", "numpy", "cuda", "auto"}

        Raises
        ------
        ValueError, TypeError
            If the images have another shape or hold NaN or infinite pixels.
        FloatingPointError
            If the statistics are not finite. Those that were stored stay.
        GpuError
            See `forward`.
        """
        images, k = check_images(images, self.image_shape), kernels.backend(backend)
        before = self.copied_state()
        self.propagate(k.pack(images), Pass(k, len(images), batch_statistics=True, momentum=1.0))
        try:
            self.check_finite()
        except FloatingPointError:
            self.set_state(before)
            raise

    def description(self):
        """Return all but the weights and buffers, as a dict that JSON can hold."""
        return {"format": FORMAT, "name": self.name, "image_shape": self.image_shape,
                "n_classes": self.n_classes, "layers": [layer.description() for layer in self.layers]}

    def state(self):
        """Return all weights and buffers as a dict of arrays (views, not copies)."""
        state = {str(parameter): parameter.value for parameter in self._parameters}
        for leaf in self.leaves:
            state.update({f"{leaf.name}.{name}": getattr(leaf, name) for name in leaf.buffer_names})
        return state

    def copied_state(self):
        """Return the same as copies."""
        return {name: array.copy() for name, array in self.state().items()}

    def check_finite(self):
        """Raise FloatingPointError if a weight, or a number in a buffer, is NaN or infinite."""
        for name, array in self.state().items():
            bad = np.argwhere(~np.isfinite(array))
            if len(bad):
                first = tuple(bad[0].tolist())
                raise FloatingPointError(
                    f"{name} holds {len(bad)} NaN or infinite numbers (the first is {array[first]} at index "
                    f"{first}); build the network anew, or load one")

    def set_state(self, state):
        """Copy weights and buffers from a dict such as `state` returns.

        Raises
        ------
        KeyError
            If the dict lacks one of them, or has one that the network has not.
        ValueError, TypeError
            If an array has another shape, or a dtype that is no kind of its place's. In all these cases
            nothing has been copied.
        """
        own = self.state()
        for names, what in ((own.keys() - state.keys(), "lacks"), (state.keys() - own.keys(), "has unknown")):
            if names:
                raise KeyError(f"the state {what} {', '.join(sorted(names))}; expected {', '.join(own)}")
        arrays = {name: fitting(state[name], place, name) for name, place in own.items()}
        for name, place in own.items():
            place[...] = arrays[name]

    def save(self, path):
        """Write the network to `path` (.npz): weights, buffers and the description of its layers.

        Raises
        ------
        ValueError
            If `path` does not end in .npz.
        FloatingPointError
            If a weight is NaN or infinite: such a network cannot be loaded.
        """
        self.check_finite()
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"{path} does not end in .npz")
        with written_beside(path) as beside:
            np.savez(beside, description=np.array(json.dumps(self.description())), **self.state())

    @classmethod
    def load(cls, path):
        """Return the network that `save` wrote to `path`. Nothing is unpickled.

        Raises
        ------
        FileNotFoundError, IsADirectoryError, PermissionError
            If there is no such file, or it cannot be read.
        ValueError
            If the file is damaged, holds weights that are NaN or infinite, or is not a saved network; the
            message says why.
        """
        with open(path, "rb") as file:
            try:
                return cls._restored(read_npz(file))
            except Exception as error:  # reading a damaged file raises nearly anything
                raise ValueError(f"{path} is damaged or is not a network saved by Network.save "
                                 f"({type(error).__name__}: {error}); save it again") from error

    @classmethod
    def _restored(cls, saved):
        description = json.loads(str(saved.pop("description")))
        if description["format"] != FORMAT:
            raise ValueError(f"its format is {description['format']!r}; this rso_numba reads {FORMAT}")
        layers = [_layer(arguments) for arguments in description["layers"]]
        image_shape = checked_image_shape(description["image_shape"])
        # what the layers ask memory for has to be in the file
        needed = sum(_n_numbers(*leaf) for leaf in chain_leaves(layers, image_shape))
        if needed > sum(array.nbytes for array in saved.values()):
            raise ValueError(f"its layers need {needed} numbers, which are not in it")
        network = cls(layers, image_shape, description["n_classes"], str(description["name"]))
        network.set_state(saved)
        network.check_finite()
        return network


def _n_numbers(leaf, shape):
    """Return how many numbers the parameters and buffers of a layer hold, or a few more."""
    return sum(map(math.prod, leaf.parameter_shapes(shape).values())) + len(leaf.buffer_names) * shape[0]


def _layer(description):
    arguments = dict(description)
    kind = arguments.pop("kind")
    if kind not in KINDS:
        raise ValueError(f"unknown layer {kind!r}; known layers: {', '.join(KINDS)}")
    branches = {name: [_layer(inner) for inner in value]
                for name, value in arguments.items() if isinstance(value, list)}
    return KINDS[kind](**(arguments | branches))


def _check_images_finite(numbers, what):
    # numbers (N, ...), some of each image
    bad = np.flatnonzero(~np.isfinite(numbers.reshape(len(numbers), -1)).all(axis=1))
    if len(bad):
        raise FloatingPointError(
            f"{len(bad)} of {len(numbers)} images have {what} not finite, the first is image "
            f"{bad[0]}: weights are too large, or not finite; train the network anew, by smaller steps")
