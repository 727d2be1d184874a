"""The layers: parameters, forward and backward side by side.

A layer holds its weights and knows two things, `forward` and `backward`; the arithmetic is done by
the kernels of a backend (`kernels/plain.py`, `cpu/` or `cuda/`), which the `Pass` carries (`passes.py`).
Layers never look inside the activations: each backend lays them out in its own way, `cuda` on the GPU.

A network is a chain of layers. A skip connection fits the chain as a layer, `Residual`, that holds two
branches and adds their outputs; `Network` finds their weights through `Layer.leaves`.
"""

import math
from dataclasses import dataclass, fields

import numpy as np

from .arguments import number_below, whole_number
from .arrays import KeepsArrays

RUNNING_MOMENTUM = 0.1  # of BatchNorm's running statistics in training, as in the notebook
OF_ITS_OWN = "give every place in a network a layer of its own, such as copy.deepcopy(layer)"


@dataclass(eq=False)
class Layer(KeepsArrays):
    """Base of all layers. Fields of a subclass are the arguments that describe it in a file."""

    name = ""  # "conv1", "conv2", ...: given by the network
    parameter_names = ()  # arrays that are trained, in the order they are declared
    buffer_names = ()  # arrays that belong to the layer but are not trained
    is_linear = False  # convolution or dense: every input channel reaches every output channel
    in_shortcut = False  # does it stand in the shortcut of a Residual?
    in_network = False  # has a network named it and given it its arrays?

    @property
    def kept_arrays(self):
        """Names of all arrays: to assign to one copies numbers into it."""
        return *self.parameter_names, *self.buffer_names

    def __getstate__(self):
        # a copy is in no network (unless its network is copied, which says so again)
        return {name: value for name, value in vars(self).items() if name != "in_network"}

    def leaves(self, shape):
        """Yield (layer, input shape) of layers with weights, in no network yet: this one, or its parts."""
        if self.in_network:
            raise ValueError(f"{self} is in another network; {OF_ITS_OWN}")
        self.in_shortcut = False  # unless the Residual around it says so
        yield self, shape

    def parameter_shapes(self, shape):
        """Return the shape of each parameter, for inputs of `shape` (C, H, W) or (features,)."""
        return {}

    def output_shape(self, shape):
        """Return the shape of the output of one image."""
        return shape

    def allocate_buffers(self, shape):
        """Create the buffers, for inputs of `shape`."""

    def description(self):
        """Return the arguments that make this layer anew, as a dict that JSON can hold."""
        arguments = {f.name: _description(getattr(self, f.name)) for f in fields(self)}
        return {"kind": type(self).__name__, **arguments}


def _description(argument):
    return [layer.description() for layer in argument] if isinstance(argument, list) else argument


@dataclass(eq=False)
class Standardize(Layer):
    """The preset's input scaling: images in [0, 1] to what the first convolution sees.

    `mean` and `std` (C,) are fitted on the training set when training starts and are saved with
    the network. Before that the layer passes images through unchanged.
    """

    scaling: str = "standardize"
    buffer_names = ("mean", "std", "fitted")

    def __post_init__(self):
        known = "standardize", "center", "none"
        if self.scaling not in known:
            raise ValueError(f"Standardize: scaling is {self.scaling!r}; expected one of {known}")

    def allocate_buffers(self, shape):
        self.mean = np.zeros(shape[0], np.float32)
        self.std = np.ones(shape[0], np.float32)
        self.fitted = np.zeros((), np.bool_)

    def fit(self, images):
        """Take mean and standard deviation of each channel from `images` (N, C, H, W)."""
        if self.scaling in ("standardize", "center"):
            self.mean[:] = images.mean(axis=(0, 2, 3), dtype=np.float64)
        if self.scaling == "standardize":
            std = images.std(axis=(0, 2, 3), dtype=np.float64)
            self.std[:] = np.where(std > 0, std, 1)  # a constant channel becomes 0, not NaN
        self.fitted[()] = True

    def forward(self, x, run):
        if self.scaling == "none":
            return x
        scale = (1 / self.std).astype(x.dtype)
        return run.kernels.scale_shift(x, scale, (-self.mean / self.std).astype(x.dtype))


@dataclass(eq=False)
class Conv2D(Layer):
    """Convolution of stride 1: 3x3 filters on an input padded by zeros, or 1x1 filters.

    Weights: `weight` (C_out, C_in, k, k), `bias` (C_out,).
    """

    filters: int
    size: int = 3
    use_bias: bool = True
    is_linear = True

    def __post_init__(self):
        self.filters = whole_number(self.filters, "Conv2D: filters")
        self.size = whole_number(self.size, "Conv2D: size")
        if self.size not in (1, 3):
            raise ValueError(f"Conv2D: size is {self.size}; expected 3 or 1")
        self.parameter_names = ("weight", "bias") if self.use_bias else ("weight",)

    def allocate_buffers(self, shape):
        self.bias = np.zeros(self.filters, np.float32)  # stays 0 without use_bias

    def parameter_shapes(self, shape):
        shapes = {"weight": (self.filters, shape[0], self.size, self.size), "bias": (self.filters,)}
        return {name: shapes[name] for name in self.parameter_names}

    def output_shape(self, shape):
        return (self.filters, *shape[1:])

    def forward(self, x, run):
        run.save(self, x)
        return run.kernels.conv2d_forward(x, self.weight, self.bias)

    def backward(self, dy, run):
        (x,) = run.saved[self.name]
        dx, dweight, dbias = run.kernels.conv2d_backward(x, self.weight, dy, run.first is not self)
        run.collect(self, weight=dweight, bias=dbias)
        return dx


@dataclass(eq=False)
class Dense(Layer):
    """Every output is a weighted sum of all inputs.

    Weights: `weight` (n_out, n_in), `bias` (n_out,).
    """

    units: int
    use_bias: bool = True
    is_linear = True

    def __post_init__(self):
        self.units = whole_number(self.units, "Dense: units")
        self.parameter_names = ("weight", "bias") if self.use_bias else ("weight",)

    def allocate_buffers(self, shape):
        self.bias = np.zeros(self.units, np.float32)  # stays 0 without use_bias

    def parameter_shapes(self, shape):
        shapes = {"weight": (self.units, shape[0]), "bias": (self.units,)}
        return {name: shapes[name] for name in self.parameter_names}

    def output_shape(self, shape):
        return (self.units,)

    def forward(self, x, run):
        run.save(self, x)
        return run.kernels.dense_forward(x, self.weight, self.bias)

    def backward(self, dy, run):
        (x,) = run.saved[self.name]
        dx, dweight, dbias = run.kernels.dense_backward(x, self.weight, dy)
        run.collect(self, weight=dweight, bias=dbias)
        return dx


@dataclass(eq=False)
class BatchNorm(Layer):
    """Each channel gets mean beta and standard deviation gamma, over images and pixels.

    The statistics are those of the mini-batch (`Pass.batch_statistics`) or the stored ones, which
    are a running average (momentum 0.1) or those of one chosen set (momentum 1, `calibrate`).

    Weights: `gamma` (C,), `beta` (C,). Buffers: `running_mean` (C,), `running_variance` (C,).
    """

    epsilon: float = 1e-5
    parameter_names = ("gamma", "beta")
    buffer_names = ("running_mean", "running_variance")

    def __post_init__(self):
        self.epsilon = number_below(self.epsilon, "BatchNorm: epsilon")

    def parameter_shapes(self, shape):
        return {"gamma": shape[:1], "beta": shape[:1]}

    def allocate_buffers(self, shape):
        self.running_mean = np.zeros(shape[0], np.float32)
        self.running_variance = np.ones(shape[0], np.float32)

    def forward(self, x, run):
        mean, variance = self.running_mean, self.running_variance
        if run.batch_statistics and self.name not in run.fixed:
            mean, variance = run.kernels.batchnorm_statistics(x, run.n_images)
            self.follow(mean, variance, run.momentum)
        run.statistics[self.name] = mean, variance
        run.save(self, x, mean, variance)
        return run.kernels.scale_shift(x, *self.scale_and_shift(mean, variance))

    def scale_and_shift(self, mean, variance, channels=slice(None)):
        """Return what each channel is multiplied with and what is added to it, (C,) arrays."""
        scale = self.gamma[channels] / np.sqrt(variance + self.epsilon)
        return scale, self.beta[channels] - mean * scale

    def follow(self, mean, variance, momentum):
        """Move the stored statistics by `momentum` of the way to `mean` and `variance`."""
        if momentum:
            self.running_mean += momentum * (mean - self.running_mean)
            self.running_variance += momentum * (variance - self.running_variance)

    def backward(self, dy, run):
        x, mean, variance = run.saved[self.name]
        dx, dgamma, dbeta = run.kernels.batchnorm_backward(
            x, dy, mean, variance, self.gamma, self.epsilon, run.n_images
        )
        run.collect(self, gamma=dgamma, beta=dbeta)
        return dx


@dataclass(eq=False)
class ReLU(Layer):
    """max(x, 0)."""

    def forward(self, x, run):
        y = run.kernels.relu_forward(x)
        run.save(self, y)
        return y

    def backward(self, dy, run):
        (y,) = run.saved[self.name]
        return run.kernels.relu_backward(y, dy)


@dataclass(eq=False)
class MaxPool(Layer):
    """Maximum of every 2x2 window; an odd last row or column is dropped."""

    def output_shape(self, shape):
        return _halved(self, shape)

    def forward(self, x, run):
        y = run.kernels.maxpool_forward(x)
        run.save(self, x, y)
        return y

    def backward(self, dy, run):
        x, y = run.saved[self.name]
        return run.kernels.maxpool_backward(x, y, dy)


@dataclass(eq=False)
class AvgPool(Layer):
    """Mean of every 2x2 window; an odd last row or column is dropped."""

    def output_shape(self, shape):
        return _halved(self, shape)

    def forward(self, x, run):
        run.save(self, x)
        return run.kernels.avgpool_forward(x)

    def backward(self, dy, run):
        (x,) = run.saved[self.name]
        return run.kernels.avgpool_backward(x, dy)


def _halved(layer, shape):
    channels, height, width = shape
    if height < 2 or width < 2:
        raise ValueError(f"{layer.name} gets maps of {height}x{width} pixels; it needs at least 2x2. "
                         "The images are too small for this model")
    return channels, height // 2, width // 2


@dataclass(eq=False)
class GlobalMaxPool(Layer):
    """Maximum of every channel's map: (C, H, W) to (C,)."""

    def output_shape(self, shape):
        return shape[:1]

    def forward(self, x, run):
        y = run.kernels.globalmax_forward(x)
        run.save(self, x, y)
        return y

    def backward(self, dy, run):
        x, y = run.saved[self.name]
        return run.kernels.globalmax_backward(x, y, dy)


@dataclass(eq=False)
class GlobalMeanPool(Layer):
    """Mean of every channel's map: (C, H, W) to (C,)."""

    def output_shape(self, shape):
        return shape[:1]

    def forward(self, x, run):
        run.save(self, x)
        return run.kernels.globalmean_forward(x)

    def backward(self, dy, run):
        (x,) = run.saved[self.name]
        return run.kernels.globalmean_backward(x, dy)


@dataclass(eq=False)
class Flatten(Layer):
    """(C, H, W) to (C * H * W,)."""

    def output_shape(self, shape):
        return (math.prod(shape),)

    def forward(self, x, run):
        run.save(self, x)
        return run.kernels.flatten_forward(x)

    def backward(self, dy, run):
        (x,) = run.saved[self.name]
        return run.kernels.flatten_backward(x, dy)


@dataclass(eq=False)
class Residual(Layer):
    """body(x) + shortcut(x): a skip connection. Without a shortcut, body(x) + x.

    Parameters
    ----------
    body, shortcut : list of Layer
        Both give outputs of the same shape.
    """

    body: list
    shortcut: list | None = None

    def __post_init__(self):
        if not self.body:
            raise ValueError("Residual: body is empty; expected at least one layer")
        self.shortcut = self.shortcut or []

    def leaves(self, shape):
        yield from chain_leaves(self.body, shape)
        for leaf, leaf_shape in chain_leaves(self.shortcut, shape):
            leaf.in_shortcut = True
            yield leaf, leaf_shape

    def output_shape(self, shape):
        of_body, of_shortcut = (chain_output_shape(layers, shape) for layers in (self.body, self.shortcut))
        if of_body != of_shortcut:
            raise ValueError(f"Residual: its body makes {of_body} of {shape} and its shortcut {of_shortcut}; "
                             "expected the same: Conv2D(filters, size=1) changes channels, a pool the size")
        return of_body

    def forward(self, x, run):
        return run.kernels.add(run.kernels.propagate(self.body, x, run),
                               run.kernels.propagate(self.shortcut, x, run))

    def backward(self, dy, run):
        dx_body = run.kernels.backpropagate(self.body, dy, run)
        dx_shortcut = run.kernels.backpropagate(self.shortcut, dy, run)
        if dx_body is None or dx_shortcut is None:  # the first weights of the network are in here
            return None
        return run.kernels.add(dx_body, dx_shortcut)


def chain_leaves(layers, shape):
    """Yield (layer, input shape) of all layers of a chain that hold weights, for inputs of `shape`."""
    for layer in layers:
        yield from layer.leaves(shape)
        shape = layer.output_shape(shape)


def chain_output_shape(layers, shape):
    """Return the shape of the output of a chain of layers."""
    for layer in layers:
        shape = layer.output_shape(shape)
    return shape


KINDS = {kind.__name__: kind for kind in Layer.__subclasses__()}
