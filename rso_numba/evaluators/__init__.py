"""Answers to one question: what is the loss of this mini-batch with this weight changed?

Every evaluator has the same three methods, and the search loop never knows which one it has:

* `set_batch(images, labels)`: the question is about these images from now on;
* `losses(parameter, index, candidates)`: the mean loss for every candidate value of
  `parameter.value[index]`, the first of which is the weight as it is, float64;
* `keep(parameter, index, value)`: this value stays.
"""

from .full import FullForward

__all__ = ["FullForward", "evaluator"]

EVALUATIONS = ("full",)


def evaluator(evaluation, network, backend, momentum):
    """Return the evaluator called `evaluation`.

    Raises
    ------
    ValueError
        If there is no such evaluation or backend.
    """
    if evaluation not in EVALUATIONS:
        raise ValueError(f"unknown evaluation {evaluation!r}; known evaluations: {', '.join(EVALUATIONS)}")
    return FullForward(network, backend, momentum)
