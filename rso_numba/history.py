"""What a training run did: one `Round` a round, and on request every trial."""

import csv
from collections import Counter
from dataclasses import asdict, dataclass, field, fields

from .files import written_beside


@dataclass(frozen=True)
class Round:
    """State after one round of RSO or one epoch of SGD. Counts and seconds are totals since the start.

    Parameters
    ----------
    round : int
        0 is the state before training.
    seconds : float
        Time spent training, evaluation of this row not included.
    images_forwarded : int
        Images whose loss was computed: three mini-batches a trial in RSO, one a step in SGD.
        (However they were computed; and SGD's backward pass costs about two forward passes more.)
    weights_visited : int
        Trials in RSO; weights times steps in SGD.
    accepted : int
        Trials that changed their weight; in SGD the same as `weights_visited`.
    train_loss, train_accuracy, test_loss, test_accuracy : float
        On the whole sets. Losses in nats.
    acceptance : dict
        Fraction of this round's trials that were accepted, by layer.
    """

    round: int
    seconds: float
    images_forwarded: int
    weights_visited: int
    accepted: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    acceptance: dict = field(default_factory=dict)


class History:
    """Rows of a training run.

    Parameters
    ----------
    solver : {"rso", "sgd"}

    Attributes
    ----------
    rounds : list of Round
    trials : list of Trial
        Empty unless they were asked for.
    """

    def __init__(self, solver):
        self.solver = solver
        self.rounds, self.trials = [], []
        self.seconds, self.images_forwarded = 0.0, 0
        self.weights_visited, self.accepted = 0, 0
        self._visited, self._accepted = Counter(), Counter()

    def __repr__(self):
        if not self.rounds:
            return f"History({self.solver!r}, empty)"
        last = self.rounds[-1]
        return f"History({self.solver!r}, round {last.round}, test accuracy {last.test_accuracy:.4f})"

    def __getitem__(self, column):
        """Return a column, a list with one entry a row: `history["test_accuracy"]`."""
        known = [f.name for f in fields(Round)]
        if column not in known:
            raise KeyError(f"unknown column {column!r}; known columns: {', '.join(known)}")
        return [getattr(row, column) for row in self.rounds]

    def add_trial(self, trial, images, track):
        """Count one trial that forwarded `images` images; keep it if `track`."""
        self.images_forwarded += images
        self.weights_visited += 1
        self.accepted += trial.accepted
        self._visited[trial.layer] += 1
        self._accepted[trial.layer] += trial.accepted
        if track:
            self.trials.append(trial)

    def add_step(self, images, weights):
        """Count one step of SGD."""
        self.images_forwarded += images
        self.weights_visited += weights
        self.accepted += weights

    def end_round(self, network, data, backend):
        """Evaluate the network on both sets and add a row."""
        train_loss, train_accuracy = network.evaluate(data.train_images, data.train_labels, backend)
        test_loss, test_accuracy = network.evaluate(data.test_images, data.test_labels, backend)
        acceptance = {layer: self._accepted[layer] / n for layer, n in self._visited.items()}
        self.rounds.append(Round(
            len(self.rounds), self.seconds, self.images_forwarded, self.weights_visited, self.accepted,
            train_loss, train_accuracy, test_loss, test_accuracy, acceptance,
        ))
        self._visited.clear()
        self._accepted.clear()

    def to_dict(self):
        """Return everything but the trials, as a dict that JSON can hold."""
        return {"rounds": [asdict(row) for row in self.rounds], "seconds": self.seconds,
                "images_forwarded": self.images_forwarded, "weights_visited": self.weights_visited,
                "accepted": self.accepted, "_visited": dict(self._visited), "_accepted": dict(self._accepted)}

    def restore(self, saved):
        """Become what `to_dict` returned."""
        vars(self).update(saved, rounds=[Round(**row) for row in saved["rounds"]],
                          _visited=Counter(saved["_visited"]), _accepted=Counter(saved["_accepted"]))

    def to_csv(self, path):
        """Write the rows to `path`; the acceptance of layer conv1 is the column acceptance_conv1."""
        layers = list(dict.fromkeys(layer for row in self.rounds for layer in row.acceptance))
        names = [f.name for f in fields(Round) if f.name != "acceptance"]
        with written_beside(path) as beside, open(beside, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["solver", *names, *(f"acceptance_{layer}" for layer in layers)])
            for row in self.rounds:
                acceptance = [row.acceptance.get(layer, "") for layer in layers]
                writer.writerow([self.solver, *(getattr(row, name) for name in names), *acceptance])
