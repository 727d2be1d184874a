"""The table of ablations: Algorithm 1 with one setting changed at a time, on the notebook's networks.

Beside each setting stands what follows from its numbers. (The order "blocks" is that of the paper in networks
without BatchNorm, as these are. A mini-batch for all weights of a layer is none of the settings of `hold`.)
"""

from dataclasses import dataclass, field

from .rows import Row

MODELS = {"one_conv": dict(batch_size=1024, rounds=10), "two_conv": dict(batch_size=512, rounds=3)}


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
    preset: str = "paper"
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
    # its trials are whole forward passes: a tenth of the others' images has to do
    return Setting(f"unit={unit!r}, images of 1 round", {"unit": unit}, finding, models=("one_conv",),
                   rounds=1)


def _batch_size(batch_size, finding="", models=tuple(MODELS)):
    return Setting(f"batch_size={batch_size}", {}, finding, models=models, batch_size=batch_size)


SETTINGS = (
    Setting("preset paper"),
    Setting("preset authors", preset="authors"),
    Setting("preset notebook", preset="notebook"),
    _changed(scaling="center"),
    _changed(scaling="none"),
    _changed(init="glorot"),
    _changed(sigma="fan_in"),
    _changed(sigma="pooled"),
    _changed(annealing="to_tenth"),
    _changed(annealing="authors"),
    _changed(weight_decay=1e-4),
    _changed(batches="slices"),
    _changed(batches="partition"),
    _changed(hold="filter"),
    _changed(order="first_last"),
    _changed(order="column_major"),
    Setting("biases not trained", {"trained": ["weight"]}),
    _changed(step="uniform"),
    _changed(step="fixed"),
    _batch_size(64),
    _batch_size(256),
    _batch_size(4096, models=("one_conv",)),
    _unit("weight"),
    _unit("filter"),
    _unit("layer"),
    _unit("network"),
)
ABLATIONS = tuple(setting.row(model) for model in MODELS for setting in SETTINGS if model in setting.models)
