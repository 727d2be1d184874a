"""The `numpy` backend: every kernel as whole-array NumPy code, written to be read.

Each function here has a twin of the same name and arguments in `cpu/` and in `cuda/`.
Arrays are (N, C, H, W) or (N, features), in the dtype of the input.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def pack(images):
    """Return the images in the layout of this backend: as they are."""
    return np.ascontiguousarray(images)


def unpack(x, n_images):
    """Return the first `n_images` rows of `x` as an (N, ...) array."""
    return x[:n_images]


def propagate(layers, x, run):
    """Return the output of a chain of layers; `run` is the `Pass`."""
    for layer in layers:
        x = layer.forward(x, run)
    return x


def backpropagate(layers, dy, run):
    """Return the gradient of the loss with respect to the input of a chain; None if nobody wants it."""
    for layer in reversed(layers):
        dy = layer.backward(dy, run)
        if dy is None or layer is run.first:
            return None
    return dy


def add(a, b):
    """Return a + b: the sum of two branches, or of their gradients."""
    return a + b


def scale_shift(x, scale, shift):
    """Return scale * x + shift, channel by channel."""
    # x (N, C, H, W) or (N, C), scale (C,), shift (C,)
    return x * _per_channel(scale, x) + _per_channel(shift, x)


def _per_channel(values, x):
    # values (C,) in a shape that meets x (N, C, H, W) or (N, C)
    return values.reshape(-1, *[1] * (x.ndim - 2))


def _without_channels(x):
    # the axes of x over which a channel is summed up: images and, if there are any, pixels
    return (0, *range(2, x.ndim))


def conv2d_forward(x, weight, bias):
    """Return the cross-correlation of `x` with 3x3 (padded by 1) or 1x1 filters, plus bias."""
    # x (N, C_in, H, W), weight (C_out, C_in, k, k), bias (C_out,) -> (N, C_out, H, W)
    y = np.tensordot(_patches(x, weight.shape[2]), weight, axes=([1, 4, 5], [1, 2, 3]))
    return np.ascontiguousarray((y + bias).transpose(0, 3, 1, 2))


def conv2d_backward(x, weight, dy, wants_dx=True):
    """Return the gradients (dx, dweight, dbias) of `conv2d_forward`; dx is None if nobody wants it."""
    # dy (N, C_out, H, W); dx is a convolution of dy with the filters turned by 180 degrees
    turned = weight[:, :, ::-1, ::-1].swapaxes(0, 1)
    dx = conv2d_forward(dy, turned, np.zeros(weight.shape[1], dy.dtype)) if wants_dx else None
    dweight = np.tensordot(dy, _patches(x, weight.shape[2]), axes=([0, 2, 3], [0, 2, 3]))
    return dx, dweight, dy.sum(axis=(0, 2, 3))


def _patches(x, size):
    # (N, C, H, W) -> (N, C, H, W, size, size), the window around every pixel
    pad = size // 2
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    return sliding_window_view(padded, (size, size), axis=(2, 3))


def dense_forward(x, weight, bias):
    """Return x @ weight.T + bias."""
    # x (N, n_in), weight (n_out, n_in), bias (n_out,) -> (N, n_out)
    return x @ weight.T + bias


def dense_backward(x, weight, dy):
    """Return the gradients (dx, dweight, dbias) of `dense_forward`."""
    return dy @ weight, dy.T @ x, dy.sum(axis=0)


def batchnorm_statistics(x, n_images):
    """Return mean and (biased) variance of each channel over images and pixels."""
    # x (N, C, H, W) or (N, C) -> (C,), (C,)
    mean = x.mean(axis=_without_channels(x), dtype=np.float64)
    variance = x.var(axis=_without_channels(x), dtype=np.float64)
    return mean.astype(x.dtype), variance.astype(x.dtype)


def batchnorm_backward(x, dy, mean, variance, gamma, epsilon, n_images):
    """Return the gradients (dx, dgamma, dbeta) of BatchNorm with the statistics of this batch."""
    # y = gamma * z + beta, z = (x - mean) / sqrt(variance + epsilon); mean and variance depend on x
    inverse = 1 / np.sqrt(variance + x.dtype.type(epsilon))
    z = scale_shift(x, inverse, -mean * inverse)
    dbeta = dy.sum(axis=_without_channels(x))
    dgamma = (dy * z).sum(axis=_without_channels(x))
    count = x.dtype.type(x[:, 0].size)
    centred = dy - (_per_channel(dbeta, x) + z * _per_channel(dgamma, x)) / count
    return centred * _per_channel(gamma * inverse, x), dgamma, dbeta


def relu_forward(x):
    """Return max(x, 0)."""
    return np.maximum(x, x.dtype.type(0))


def relu_backward(y, dy):
    """Return dy where the output was positive, else 0."""
    return dy * (y > 0)


def maxpool_forward(x):
    """Return the maximum of every 2x2 window; an odd last row or column is dropped."""
    # x (N, C, H, W) -> (N, C, H // 2, W // 2)
    return _windows(x).max(axis=-1)


def maxpool_backward(x, y, dy):
    """Return dx: each window's gradient goes to its first maximum in row-major order."""
    windows = _windows(x)
    first = windows.argmax(axis=-1)[..., None] == np.arange(4)
    return _unwindow(first * dy[..., None], x.shape)


def avgpool_forward(x):
    """Return the mean of every 2x2 window; an odd last row or column is dropped."""
    return _windows(x).mean(axis=-1)


def avgpool_backward(x, dy):
    """Return dx: each pixel of a window gets a quarter of its gradient."""
    quarter = np.repeat(dy[..., None] * dy.dtype.type(0.25), 4, axis=-1)
    return _unwindow(quarter, x.shape)


def _windows(x):
    # (N, C, H, W) -> (N, C, H // 2, W // 2, 4)
    n, c, h, w = x.shape[0], x.shape[1], x.shape[2] // 2, x.shape[3] // 2
    tiles = x[:, :, : 2 * h, : 2 * w].reshape(n, c, h, 2, w, 2)
    return tiles.transpose(0, 1, 2, 4, 3, 5).reshape(n, c, h, w, 4)


def _unwindow(windows, shape):
    # the inverse of _windows, with zeros in a dropped last row or column
    n, c, h, w, _ = windows.shape
    tiles = windows.reshape(n, c, h, w, 2, 2).transpose(0, 1, 2, 4, 3, 5)
    x = np.zeros(shape, windows.dtype)
    x[:, :, : 2 * h, : 2 * w] = tiles.reshape(n, c, 2 * h, 2 * w)
    return x


def globalmax_forward(x):
    """Return the maximum of every channel's map."""
    # x (N, C, H, W) -> (N, C)
    return x.max(axis=(2, 3))


def globalmax_backward(x, y, dy):
    """Return dx: the gradient goes to the first maximum in row-major order."""
    flat = x.reshape(*x.shape[:2], -1)
    first = flat.argmax(axis=-1)[..., None] == np.arange(flat.shape[-1])
    return (first * dy[..., None]).reshape(x.shape)


def globalmean_forward(x):
    """Return the mean of every channel's map."""
    return x.mean(axis=(2, 3))


def globalmean_backward(x, dy):
    """Return dx: every pixel gets the same share of the gradient."""
    share = dy / dy.dtype.type(x.shape[2] * x.shape[3])
    return np.broadcast_to(share[:, :, None, None], x.shape).copy()


def flatten_forward(x):
    """Return (N, C, H, W) as (N, C * H * W)."""
    return x.reshape(x.shape[0], -1)


def flatten_backward(x, dy):
    """Return `dy` in the shape of `x`."""
    return dy.reshape(x.shape)


def cross_entropy(logits, labels):
    """Return -log softmax(logits)[label] of every image."""
    # logits (N, n_classes), labels (N,) -> (N,)
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]


def mean_loss(logits, labels):
    """Return the mean cross-entropy, summed in float64."""
    return float(cross_entropy(logits, labels).sum(dtype=np.float64)) / len(labels)


def cross_entropy_backward(logits, labels):
    """Return the gradient of the mean cross-entropy: (softmax - one-hot) / N."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    dlogits = shifted / shifted.sum(axis=1, keepdims=True)
    dlogits[np.arange(len(labels)), labels] -= 1
    return dlogits / logits.dtype.type(len(labels))
