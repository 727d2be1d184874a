"""The layers: parameters, forward and backward side by side.

A layer holds its weights and knows two things, `forward` and `backward`; the arithmetic is done by
the kernels of a backend (`kernels/plain.py`, `cpu.py` or `cuda.py`), which the `Pass` carries. Layers
never look inside the activations: each backend lays them out in its own way, `cuda` on the GPU.

A network is a chain of layers. A skip connection fits the chain as a layer that holds two branches
of layers and adds their outputs; `Network` finds their weights through `Layer.leaves`.
"""

from dataclasses import dataclass, field, fields

import numpy as np

RUNNING_MOMENTUM = 0.1  # of BatchNorm's running statistics in training, as in the notebook


@dataclass
class Pass:
    """What all layers are told in one pass through the network.

    Parameters
    ----------
    kernels : module
        The backend.
    n_images : int
        Number of images; the `cpu` and `cuda` backends pad their last block.
    batch_statistics : bool
        BatchNorm uses the statistics of these images instead of its stored ones.
    momentum : float
        How far BatchNorm moves its stored statistics to those of these images: 0 not at all,
        1 replaces them.
    statistics : dict
        Mean and variance that each BatchNorm used, by layer name, filled by forward.
    saved : dict or None
        Where layers keep what their backward needs; None in passes that have no backward.
    gradients : dict
        Gradient of every parameter, by (layer name, parameter name), filled by backward.
    first : Layer or None
        Where backward ends: the first layer with weights, whose own input needs no gradient.
    """

    kernels: object
    n_images: int
    batch_statistics: bool = False
    momentum: float = 0.0
    statistics: dict = field(default_factory=dict)
    saved: dict | None = None
    gradients: dict = field(default_factory=dict)
    first: object = None

    def save(self, layer, *arrays):
        """Keep `arrays` for the backward of `layer`, if there will be one."""
        if self.saved is not None:
            self.saved[layer.name] = arrays

    def collect(self, layer, **gradients):
        """Keep the gradients of the parameters that `layer` trains."""
        for parameter in layer.parameter_names:
            self.gradients[layer.name, parameter] = gradients[parameter]


@dataclass(eq=False)
class Layer:
    """Base of all layers. Fields of a subclass are the arguments that describe it in a file."""

    name = ""  # "conv1", "conv2", ...: given by the network
    parameter_names = ()  # arrays that are trained, in the order they are declared
    buffer_names = ()  # arrays that belong to the layer but are not trained
    mixes_channels = False  # does one input channel reach every output channel?

    def leaves(self, shape):
        """Yield (layer, input shape) of the layers that hold weights: this one, or those inside it."""
        yield self, shape

    def parameter_shapes(self, shape):
        """Return the shape of each parameter, for inputs of `shape` (C, H, W) or (features,)."""
        return {}

    def output_shape(self, shape):
        """Return the shape of the output of one image."""
        return shape

    def allocate_buffers(self, shape):
        """Create the buffers, for inputs of `shape`."""

    def forward_channels(self, x, run, channels):
        """Return the output channels of a layer that does not mix channels, from the same inputs.

        x holds some channels only, `channels` (a slice) says which; BatchNorm takes their statistics
        from x.
        """
        return self.forward(x, run)

    def description(self):
        """Return the arguments that make this layer anew, as a dict that JSON can hold."""
        arguments = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"kind": type(self).__name__, **arguments}


@dataclass(eq=False)
class Standardize(Layer):
    """The preset's input scaling: images in [0, 1] to what the first convolution sees.

    `mean` and `std` (C,) are fitted on the training set when training starts and are saved with
    the network. Before that the layer passes images through unchanged.
    """

    scaling: str = "standardize"
    buffer_names = ("mean", "std", "fitted")

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

    Weights: `weight` (C_out, C_in, k, k), `bias` (C_out,). Without `exact_zeros`, which a BatchNorm behind it
    makes useless (see `Network.steps`), there is a faster way.
    """

    filters: int
    size: int = 3
    use_bias: bool = True
    mixes_channels = True

    def __post_init__(self):
        if self.size not in (1, 3):
            raise ValueError(f"Conv2D: size is {self.size!r}; expected 3 or 1")
        self.parameter_names = ("weight", "bias") if self.use_bias else ("weight",)
        self.bias = np.zeros(self.filters, np.float32)

    def parameter_shapes(self, shape):
        shapes = {"weight": (self.filters, shape[0], self.size, self.size), "bias": (self.filters,)}
        return {name: shapes[name] for name in self.parameter_names}

    def output_shape(self, shape):
        return (self.filters, *shape[1:])

    def forward(self, x, run, exact_zeros=True):
        run.save(self, x)
        return run.kernels.conv2d_forward(x, self.weight, self.bias, exact_zeros=exact_zeros)

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
    mixes_channels = True

    def __post_init__(self):
        self.parameter_names = ("weight", "bias") if self.use_bias else ("weight",)
        self.bias = np.zeros(self.units, np.float32)

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
    A ReLU that directly follows is done in the same pass over memory, `with_relu`, and both are left to a
    convolution that is next, `lazy`: see `Network.steps`.

    Weights: `gamma` (C,), `beta` (C,). Buffers: `running_mean` (C,), `running_variance` (C,).
    """

    epsilon: float = 1e-5
    parameter_names = ("gamma", "beta")
    buffer_names = ("running_mean", "running_variance")

    def parameter_shapes(self, shape):
        return {"gamma": shape[:1], "beta": shape[:1]}

    def allocate_buffers(self, shape):
        self.running_mean = np.zeros(shape[0], np.float32)
        self.running_variance = np.ones(shape[0], np.float32)

    def forward(self, x, run, with_relu=False, lazy=False):
        mean, variance = self.running_mean, self.running_variance
        if run.batch_statistics:
            mean, variance = run.kernels.batchnorm_statistics(x, run.n_images)
            self.follow(mean, variance, run.momentum)
        run.statistics[self.name] = mean, variance
        run.save(self, x, mean, variance)
        return run.kernels.scale_shift(x, *self.scale_and_shift(mean, variance), with_relu, lazy)

    def scale_and_shift(self, mean, variance, channels=slice(None)):
        """Return what each channel is multiplied with and what is added to it, (C,) arrays."""
        scale = self.gamma[channels] / np.sqrt(variance + self.epsilon)
        return scale, self.beta[channels] - mean * scale

    def follow(self, mean, variance, momentum):
        """Move the stored statistics by `momentum` of the way to `mean` and `variance`."""
        if momentum:
            self.running_mean += momentum * (mean - self.running_mean)
            self.running_variance += momentum * (variance - self.running_variance)

    def forward_channels(self, x, run, channels):
        mean, variance = run.statistics[self.name] = run.kernels.batchnorm_statistics(x, run.n_images)
        return run.kernels.scale_shift(x, *self.scale_and_shift(mean, variance, channels))

    def backward(self, dy, run, with_relu=False):
        x, mean, variance = run.saved[self.name]
        relu = self.scale_and_shift(mean, variance) if with_relu else None
        dx, dgamma, dbeta = run.kernels.batchnorm_backward(
            x, dy, mean, variance, self.gamma, self.epsilon, run.n_images, relu
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
        return (int(np.prod(shape)),)

    def forward(self, x, run):
        run.save(self, x)
        return run.kernels.flatten_forward(x)

    def backward(self, dy, run):
        (x,) = run.saved[self.name]
        return run.kernels.flatten_backward(x, dy)


KINDS = {kind.__name__: kind for kind in Layer.__subclasses__()}
