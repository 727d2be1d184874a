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
    # A larger unit has few trials in a round and as many more rounds. A shuffle for each round would take all
    # the time, annealing would go by rounds, and a weight would be decayed at each of thousands of visits.
    overrides = {"unit": unit, "batches": "partition", "annealing": None, "weight_decay": 0.0}
    return Setting(f"unit={unit!r}, images of 1 round", overrides, finding, models=("one_conv",), rounds=1)


def _batch_size(batch_size, finding=""):
    return Setting(f"batch_size={batch_size}", {}, finding, models=("one_conv",), batch_size=batch_size)


NO_DIFFERENCE = "No difference that three seeds show."
SETTINGS = (
    Setting("preset authors", finding="What the others are compared with."),
    Setting("preset notebook", finding="Lower with each seed: see init and sigma.", preset="notebook"),
    Setting("preset paper", finding="Lower with each seed, though none of its settings alone is by as much. "
                                    "Many times as slow: see batches.", preset="paper"),
    _changed(NO_DIFFERENCE, scaling="standardize"),
    _changed(NO_DIFFERENCE, scaling="none"),
    _changed("Lower on two_conv with each seed.", init="glorot"),
    _changed(NO_DIFFERENCE, sigma="layer_std"),
    _changed("Lower with each seed.", sigma="pooled"),
    _changed("Not lower; on two_conv higher with each seed. So few rounds need no smaller steps.",
             annealing=None),
    _changed("Lower with each seed: in so few rounds the steps are small too soon.", annealing="to_tenth"),
    _changed(NO_DIFFERENCE, weight_decay=0.0),
    Setting("biases trained too", {"trained": EVERYTHING},
            "A little lower on one_conv with each seed, by 0.003; not on two_conv."),
    _changed("A little lower on two_conv with each seed, by 0.003; not on one_conv.", batches="partition"),
    _changed(f"{NO_DIFFERENCE} Many times as slow: no mini-batch comes back.", batches="fresh"),
    _changed("As good, in about half of the seconds.", hold="filter"),
    _changed("Higher on two_conv with each seed.", order="first_last"),
    _changed("A little higher on one_conv with each seed, by 0.002; not on two_conv.", order="column_major"),
    _changed("A little higher on one_conv with each seed, by 0.002; not on two_conv.", step="uniform"),
    _changed("Higher with each seed: half of the Gaussian steps are shorter than two thirds of sigma.",
             step="fixed"),
    _batch_size(64, "Lower with each seed."),
    _batch_size(256, "Lower with each seed."),
    _batch_size(4096, "Higher with each seed: the mini-batch matters more than any other setting."),
    _unit("weight", "What the other units are compared with."),
    _unit("filter", "Higher with each seed: so early, many trials of a filter are worth more than one of "
                    "each weight. But each takes whole forward passes."),
    _unit("layer", "Higher with each seed, too, but with about twice the loss: nearly all steps that are "
                   "kept are of the dense layer's thousands of weights, which grow."),
    _unit("network", "Little better than guessing: of 7,890 steps 13 to 15 are kept."),
)
ABLATIONS = tuple(setting.row(model) for model in MODELS for setting in SETTINGS if model in setting.models)
