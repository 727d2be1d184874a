"""A network: a chain of layers that share one vector of weights."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from . import kernels, losses
from .arguments import generator, whole_number
from .datasets import check_images, check_labels
from .files import read_npz, written_beside
from .layers import KINDS, BatchNorm, Standardize, chain_leaves, chain_output_shape
from .passes import Pass

FORMAT = 1  # of the files that networks are saved in
FORWARD_IMAGES = 256  # that pass through the network at once: few enough for activations to stay in the cache


@dataclass(frozen=True, eq=False)
class Parameter:
    """A named array of weights.

    Parameters
    ----------
    layer, name : str
        Such as "conv1" and "weight".
    value : ndarray
        The weights themselves: a view of `Network.weights`. Writing to it changes the network.
    """

    layer: str
    name: str
    value: np.ndarray

    def __str__(self):
        return f"{self.layer}.{self.name}"

    @property
    def fan_in(self):
        """Number of weights that make one activation (of a bias, gamma or beta: 1)."""
        return self.value[0].size if self.value.ndim > 1 else 1


class Network:
    """A chain of layers from images to logits.

    Parameters
    ----------
    layers : list of Layer
        In the order that images pass them. Their weights are created here, filled with zeros
        (gamma with ones); `initialize` draws them.
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
        All weights, layer by layer from the input. Each `Parameter.value` is a view of it.

    Raises
    ------
    ValueError
        If the images are too small for the layers or the last layer has not `n_classes` outputs.
    """

    def __init__(self, layers, image_shape, n_classes, name="custom", dtype=np.float32):
        self.layers, self.name = list(layers), name
        self.image_shape = _checked_image_shape(image_shape)
        self.n_classes = whole_number(n_classes, "n_classes")
        self.leaves, shapes, shape, counted = [], [], self.image_shape, Counter()
        for leaf, leaf_shape in chain_leaves(self.layers, shape):
            kind = "shortcut_" * leaf.in_shortcut + type(leaf).__name__.removesuffix("2D").lower()
            counted[kind] += 1
            leaf.name = f"{kind}{counted[kind]}"
            leaf.allocate_buffers(leaf_shape)
            self.leaves.append(leaf)
            shapes += [(leaf, *item) for item in leaf.parameter_shapes(leaf_shape).items()]
        shape = chain_output_shape(self.layers, shape)
        if shape != (self.n_classes,):
            raise ValueError(f"the last layer gives {shape} numbers an image; expected ({self.n_classes},)")
        self.weights = np.zeros(sum(math.prod(s) for _, _, s in shapes), dtype)
        self._parameters, start = [], 0
        for leaf, parameter_name, parameter_shape in shapes:
            stop = start + int(np.prod(parameter_shape))
            view = self.weights[start:stop].reshape(parameter_shape)
            view[...] = parameter_name == "gamma"
            setattr(leaf, parameter_name, view)
            self._parameters.append(Parameter(leaf.name, parameter_name, view))
            start = stop

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
        """Return the most probable class of each image, (N,) int64."""
        return self.forward(images, backend).argmax(axis=1)

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
        GpuError
            See `forward`.
        """
        labels = check_labels(labels, self.n_classes, len(images))
        logits = self.forward(images, backend)
        loss = losses.cross_entropy(logits, labels).mean(dtype=np.float64)
        return float(loss), losses.accuracy(logits, labels)

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
        GpuError
            See `forward`.
        """
        images, k = check_images(images, self.image_shape), kernels.backend(backend)
        self.propagate(k.pack(images), Pass(k, len(images), batch_statistics=True, momentum=1.0))

    def state(self):
        """Return all weights and buffers as a dict of arrays (views, not copies)."""
        state = {str(parameter): parameter.value for parameter in self._parameters}
        for leaf in self.leaves:
            state.update({f"{leaf.name}.{name}": getattr(leaf, name) for name in leaf.buffer_names})
        return state

    def set_state(self, state):
        """Copy weights and buffers from a dict such as `state` returns.

        Raises
        ------
        KeyError
            If the dict lacks one of them. Those before it have been copied then.
        ValueError
            If an array cannot be broadcast to the shape of its place. Those before it have been copied then.
        """
        for name, array in self.state().items():
            array[...] = state[name]

    def save(self, path):
        """Write the network to `path` (.npz): weights, buffers and the description of its layers."""
        description = {
            "format": FORMAT,
            "name": self.name,
            "image_shape": self.image_shape,
            "n_classes": self.n_classes,
            "layers": [layer.description() for layer in self.layers],
        }
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"{path} does not end in .npz")
        with written_beside(path) as beside:
            np.savez(beside, description=np.array(json.dumps(description)), **self.state())

    @classmethod
    def load(cls, path):
        """Return the network that `save` wrote to `path`. Nothing is unpickled.

        Raises
        ------
        FileNotFoundError, IsADirectoryError, PermissionError
            If there is no such file, or it cannot be read.
        ValueError
            If the file is damaged or is not a saved network; the message says why.
        """
        with open(path, "rb") as file:
            try:
                return cls._restored(read_npz(file))
            except Exception as error:  # reading a damaged file raises nearly anything
                raise ValueError(f"{path} is damaged or is not a network saved by Network.save "
                                 f"({type(error).__name__}: {error}); save it again") from error

    @classmethod
    def _restored(cls, saved):
        description = json.loads(str(saved["description"]))
        if description["format"] != FORMAT:
            raise ValueError(f"its format is {description['format']!r}; this rso_numba reads {FORMAT}")
        layers = [_layer(arguments) for arguments in description["layers"]]
        image_shape = _checked_image_shape(description["image_shape"])
        # what the layers ask memory for has to be in the file
        needed = sum(_n_numbers(*leaf) for leaf in chain_leaves(layers, image_shape))
        if needed > sum(array.nbytes for array in saved.values()):
            raise ValueError(f"its layers need {needed} numbers, which are not in it")
        network = cls(layers, image_shape, description["n_classes"], str(description["name"]))
        for name, array in network.state().items():
            if saved[name].shape != array.shape:
                raise ValueError(f"{name} has shape {saved[name].shape}; expected {array.shape}")
            np.copyto(array, saved[name], casting="same_kind")
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


def _checked_image_shape(shape):
    sizes = tuple(shape) if np.iterable(shape) else ()
    if len(sizes) != 3:
        raise ValueError(f"image_shape is {shape!r}; expected three positive whole numbers: (channels, "
                         "height, width)")
    return tuple(whole_number(size, f"image_shape[{i}]") for i, size in enumerate(sizes))
