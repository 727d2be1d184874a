"""An evaluator that answers nothing: what a search asks of it can be decided later, many trials at once."""

import numpy as np


class Recorder:
    """Notes what a search asks for. No draw of a search depends on a loss, so any losses will do.

    Attributes
    ----------
    batch : tuple or None
        The arguments of `set_batch` since the last trial, None if it holds the mini-batch of the one before.
    parameter : Parameter or None
        The one that the last trial changes.
    """

    nothing = np.zeros(3)

    def __init__(self):
        self.batch = self.parameter = None

    def set_batch(self, images, labels, key=None):
        """Take note of a mini-batch."""
        self.batch = images, labels, key

    def losses(self, parameter, index, candidates):
        """Take note of the parameter; return zeros."""
        self.parameter = parameter
        return self.nothing

    def keep(self, parameter, index, value):
        """Change nothing."""


def recorded(search):
    """Yield (trial, parameter, batch) for every trial of a search, none of them decided.

    `search` is a function of an evaluator that returns an iterator of `Trial`; batch is None where a trial
    holds the mini-batch of the one before.
    """
    recorder = Recorder()
    for trial in search(recorder):
        batch, recorder.batch = recorder.batch, None
        yield trial, recorder.parameter, batch
