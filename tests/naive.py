"""Every formula of the package as nested loops in float64: slow, obvious, and the judge of all faster code.

It imports nothing of rso_numba. Images are (N, C, H, W): image, channel, row, column.
"""

import math

import numpy as np


def conv2d(x, weight, bias=None):
    """Stride-1 convolution, zero padding k // 2: (N, C, H, W), (K, C, k, k), (K,) or None -> (N, K, H, W)."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    (N, C, H, W), (K, _, k, _) = x.shape, weight.shape
    bias = np.zeros(K) if bias is None else np.asarray(bias, np.float64)
    p = k // 2
    padded = np.zeros((N, C, H + 2 * p, W + 2 * p))
    padded[:, :, p : p + H, p : p + W] = x
    out = np.zeros((N, K, H, W))
    for n, o, i, j in np.ndindex(N, K, H, W):
        total = bias[o]
        for c in range(C):
            for di in range(k):
                for dj in range(k):
                    total += weight[o, c, di, dj] * padded[n, c, i + di, j + dj]
        out[n, o, i, j] = total
    return out


def dense(x, weight, bias=None):
    """Fully connected layer: (N, n_in), (n_out, n_in), (n_out,) or None -> (N, n_out)."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    (N, n_in), n_out = x.shape, weight.shape[0]
    bias = np.zeros(n_out) if bias is None else np.asarray(bias, np.float64)
    out = np.zeros((N, n_out))
    for n in range(N):
        for k in range(n_out):
            total = bias[k]
            for j in range(n_in):
                total += weight[k, j] * x[n, j]
            out[n, k] = total
    return out


def batch_statistics(x):
    """Mean and biased variance of each channel: (N, C, H, W) -> (C,), (C,)."""
    x = np.asarray(x, np.float64)
    N, C, H, W = x.shape
    mean, variance = np.zeros(C), np.zeros(C)
    for c in range(C):
        for n, i, j in np.ndindex(N, H, W):
            mean[c] += x[n, c, i, j] / (N * H * W)
        for n, i, j in np.ndindex(N, H, W):
            variance[c] += (x[n, c, i, j] - mean[c]) ** 2 / (N * H * W)
    return mean, variance


def batchnorm(x, gamma, beta, mean, variance, epsilon):
    """Normalize, scale and shift each channel: (N, C, H, W), four times (C,), number -> (N, C, H, W)."""
    x, gamma, beta = np.asarray(x, np.float64), np.asarray(gamma, np.float64), np.asarray(beta, np.float64)
    mean, variance = np.asarray(mean, np.float64), np.asarray(variance, np.float64)
    out = np.zeros(x.shape)
    for n, c, i, j in np.ndindex(x.shape):
        normalized = (x[n, c, i, j] - mean[c]) / math.sqrt(variance[c] + epsilon)
        out[n, c, i, j] = gamma[c] * normalized + beta[c]
    return out


def standardize(x, mean, std):
    """(x - mean) / std of each channel: (N, C, H, W), (C,), (C,) -> (N, C, H, W)."""
    x, mean, std = np.asarray(x, np.float64), np.asarray(mean, np.float64), np.asarray(std, np.float64)
    out = np.zeros(x.shape)
    for n, c, i, j in np.ndindex(x.shape):
        out[n, c, i, j] = (x[n, c, i, j] - mean[c]) / std[c]
    return out


def relu(x):
    """Negative entries become 0, NaN stays NaN: any shape -> the same shape."""
    x = np.asarray(x, np.float64)
    out = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        out[index] = 0.0 if x[index] < 0 else x[index]
    return out


def maxpool(x):
    """Maximum of each 2x2 window, odd last row or column dropped: (N, C, H, W) -> (N, C, H//2, W//2)."""
    x = np.asarray(x, np.float64)
    N, C, H, W = x.shape
    out = np.zeros((N, C, H // 2, W // 2))
    for n, c, i, j in np.ndindex(out.shape):
        out[n, c, i, j] = np.max(x[n, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2])
    return out


def avgpool(x):
    """Mean of each 2x2 window, odd last row or column dropped: (N, C, H, W) -> (N, C, H//2, W//2)."""
    x = np.asarray(x, np.float64)
    N, C, H, W = x.shape
    out = np.zeros((N, C, H // 2, W // 2))
    for n, c, i, j in np.ndindex(out.shape):
        out[n, c, i, j] = np.mean(x[n, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2])
    return out


def global_max(x):
    """Largest entry of each channel of each image: (N, C, H, W) -> (N, C)."""
    x = np.asarray(x, np.float64)
    out = np.zeros(x.shape[:2])
    for n, c in np.ndindex(out.shape):
        out[n, c] = np.max(x[n, c])
    return out


def global_mean(x):
    """Mean of each channel of each image: (N, C, H, W) -> (N, C)."""
    x = np.asarray(x, np.float64)
    out = np.zeros(x.shape[:2])
    for n, c in np.ndindex(out.shape):
        out[n, c] = np.mean(x[n, c])
    return out


def flatten(x):
    """Channel by channel, row by row: (N, C, H, W) -> (N, C*H*W)."""
    x = np.asarray(x, np.float64)
    N, C, H, W = x.shape
    out = np.zeros((N, C * H * W))
    for n, c, i, j in np.ndindex(x.shape):
        out[n, (c * H + i) * W + j] = x[n, c, i, j]
    return out


def softmax(logits):
    """Probabilities of the classes of each image: (N, K) -> (N, K)."""
    rows = []
    for row in np.asarray(logits, np.float64).tolist():
        largest = max(row)  # subtracted, so that exp cannot overflow
        exponentials = [math.exp(z - largest) for z in row]
        rows.append([e / sum(exponentials) for e in exponentials])
    return np.array(rows)


def cross_entropy(logits, labels):
    """Minus the log of the softmax probability of the label: (N, K), (N,) -> (N,)."""
    losses = []
    for row, label in zip(np.asarray(logits, np.float64).tolist(), labels, strict=True):
        largest = max(row)
        log_sum = largest + math.log(sum(math.exp(z - largest) for z in row))
        losses.append(log_sum - row[label])
    return np.array(losses)


def mean_loss(logits, labels):
    """Mean cross-entropy: (N, K), (N,) -> number."""
    losses = cross_entropy(logits, labels).tolist()
    return sum(losses) / len(losses)


def accuracy(logits, labels):
    """Share of images whose largest logit (the first on ties) is the label: (N, K), (N,) -> number."""
    correct = 0
    for row, label in zip(np.asarray(logits, np.float64), labels, strict=True):
        correct += int(np.argmax(row) == label)
    return correct / len(labels)


def central_difference(function, array, index, step=1e-5):
    """Slope of the number function(array) along array[index]; the float64 array is changed, then restored."""
    if array.dtype != np.float64:
        raise TypeError(f"central_difference needs a float64 array, got {array.dtype}")
    before = array[index]
    try:
        array[index] = before + step
        above = function(array)
        array[index] = before - step
        below = function(array)
    finally:
        array[index] = before
    return (float(above) - float(below)) / (2 * step)


def rso_trial_losses(loss_of, w, delta):
    """Losses [keep, plus, minus] of one RSO trial: function of a number, number, number -> list of 3."""
    w, delta = float(w), float(delta)
    return [float(loss_of(w)), float(loss_of(w + delta)), float(loss_of(w - delta))]


def vertex(delta, losses):
    """Half of the step to the lowest point of the parabola through the losses at 0, delta, -delta.

    At most 2 delta; None if the parabola has no lowest point.
    """
    a, b, _ = np.polyfit([0, delta, -delta], losses, 2)
    return np.clip(-b / (2 * a) / 2, -2 * abs(delta), 2 * abs(delta)) if a > 0 else None


def choose(losses):
    """Index of the smallest finite loss, the first on ties, 0 if none is finite: (n,) -> int."""
    best = None
    for index, loss in enumerate(losses):
        if math.isfinite(loss) and (best is None or loss < losses[best]):
            best = index
    return 0 if best is None else best
