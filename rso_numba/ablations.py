"""The table of ablations: the authors' search with one setting changed at a time, on the notebook's networks.

Beside each setting stands what follows from its numbers. The base are the authors' settings, whose mini-
batches come back: with a fresh one for every weight, 10 rounds of `one_conv` took 700 s where these took 44
s (one thread, other work beside it). Some settings do nothing here: those of BatchNorm, because these
networks have none; the order "blocks", which is "last_first" without it; the initial weights "authors",
which are "he" without shortcuts. There is no setting of `hold` for a mini-batch that serves a whole layer.
"""

from dataclasses import dataclass, field

from .presets import EVERYTHING
from .rows import Row

MODELS = {"one_conv": dict(batch_size=1024, rounds=5), "two_conv": dict(batch_size=512, rounds=2)}


@dataclass(frozen=True)
class Setting:
    """What is changed, and what follows.

    Parameters
    ----------
    name : str
    overrides : dict
        See `rows.Row`.
    finding : str
        A sentence.
    preset : str
    models : tuple of str
    rounds, batch_size : int or None
        None are those of MODELS.
    """

    name: str
    overrides: dict = field(default_factory=dict)
    finding: str = ""
    preset: str = "authors"
    models: tuple = tuple(MODELS)
    rounds: int | None = None
    batch_size: int | None = None

    def row(self, model):
        """Return the row of a model."""
        own = {name: value for name, value in dict(rounds=self.rounds, batch_size=self.batch_size).items()
               if value is not None}
        return Row(f"{model}, {self.name}", model, **MODELS[model] | own, preset=self.preset,
                   overrides=self.overrides)


def _changed(finding="", **overrides):
    ((name, value),) = overrides.items()
    return Setting(f"{name}={value!r}", overrides, finding)


def _unit(unit, finding=""):
    # a shuffle for each of few trials would take all the time, and annealing would go by rounds of few trials
    overrides = {"unit": unit, "batches": "partition", "annealing": None}
    return Setting(f"unit={unit!r}, images of 1 round", overrides, finding, models=("one_conv",), rounds=1)


def _batch_size(batch_size, finding=""):
    return Setting(f"batch_size={batch_size}", {}, finding, models=("one_conv",), batch_size=batch_size)


SETTINGS = (
    Setting("preset authors"),
    Setting("preset notebook", preset="notebook"),
    Setting("preset paper", preset="paper"),
    _changed(scaling="standardize"),
    _changed(scaling="none"),
    _changed(init="glorot"),
    _changed(sigma="layer_std"),
    _changed(sigma="pooled"),
    _changed(annealing=None),
    _changed(annealing="to_tenth"),
    _changed(weight_decay=0.0),
    Setting("biases trained too", {"trained": EVERYTHING}),
    _changed(batches="partition"),
    _changed(batches="fresh"),
    _changed(hold="filter"),
    _changed(order="first_last"),
    _changed(order="column_major"),
    _changed(step="uniform"),
    _changed(step="fixed"),
    _batch_size(64),
    _batch_size(256),
    _batch_size(4096),
    _unit("weight"),
    _unit("filter"),
    _unit("layer"),
    _unit("network"),
)
ABLATIONS = tuple(setting.row(model) for model in MODELS for setting in SETTINGS if model in setting.models)
