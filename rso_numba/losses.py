"""Softmax cross-entropy, one number an image, and accuracy."""

from .kernels import plain


def cross_entropy(logits, labels):
    """Return -log softmax(logits)[label] of every image.

    Parameters
    ----------
    logits : ndarray (N, n_classes)
    labels : ndarray (N,), int

    Returns
    -------
    ndarray (N,), in nats
    """
    return plain.cross_entropy(logits, labels)


def accuracy(logits, labels):
    """Return the fraction of images whose largest logit is that of their label."""
    return float((logits.argmax(axis=1) == labels).mean())
