"""The presets of RSO: the paper's Algorithm 1, its authors' code, the course notebook; and `best`.

They run the same loop (`rso.py`) and differ only in the settings below. Each field is an
argument of `rso.trials` and `rso.train`: a preset fills it in, a caller may override it.

Sources: *paper* is Tripathi & Singh, arXiv 2005.05955, Algorithm 1; *authors* is the MXNet code
that they released; *notebook* is Heesoo Song's Julia project for the course "Selected Topics in
Mathematical Optimization", as it ran. *best* is ours: the authors' settings, steps of one size, the first
layer first, and the vertex of the parabola, see `tutorials/RESULTS.md`.
"""

from dataclasses import dataclass, fields, replace

import numpy as np

from .arguments import is_number, number_below, positive_number

EVERYTHING = ("weight", "bias", "gamma", "beta")


@dataclass(frozen=True)
class Preset:
    """Settings of one RSO run.

    Parameters
    ----------
    scaling : {"standardize", "center", "none"}
        What the network's first layer does to images in [0, 1]: (x - mean) / std of the training
        set, x - mean, or nothing. Used by `models.build`.
    init : {"he", "authors", "glorot"}
        Initial weights: N(0, sqrt(2 / fan_in)); the same, but N(0, sqrt(2 / C_out)) in a shortcut; or uniform
        in +-sqrt(6 / (fan_in + fan_out)). Biases and beta are 0, gamma is 1. Used by `models.build`.
    sigma : {"layer_std", "fan_in", "pooled"}, float or dict
        Standard deviation of the step of each layer, sigma_d: the standard deviation of all its
        weights at the start; sqrt(2 / fan_in) (a shortcut has that of the convolution to whose output it is
        added), and 0.167 for gamma and beta; the standard
        deviation of freshly drawn N(0, sqrt(2 / size)) for every tensor of layers 1..d; or one
        number for every layer; or a number for every parameter, by its name, such as "conv1.weight".
    annealing : {None, "to_tenth", "authors"}
        Factor on sigma in round e = 0..C-1: 1; linear from 1 to 0.1 in the last round (the paper's
        text); 0.1 + 0.9 (C - e) / C (the authors' code).
    weight_decay : float
        w <- w (1 - weight_decay) at each visit, before the three losses.
    batches : {"fresh", "slices", "partition"}
        A fresh random sample for every weight; consecutive slices of a shuffled set, cycled,
        reshuffled at each layer; a fixed partition of the set of which one is drawn, with
        replacement, for every weight.
    order : {"last_first", "blocks", "column_major", "first_last"}
        Order of the visits, see `visits.visiting_order`.
    trained : tuple of str
        Names of the parameters that are searched.
    test_statistics : {"first_2000", "running"}
        Statistics that BatchNorm uses outside the search: those of the first 2000 training images,
        computed anew before each evaluation, or an exponential average over the mini-batches, which lags
        behind the last trials.
    search_statistics : {"batch", "fixed"}
        Statistics that BatchNorm uses in the search: those of the mini-batch; or, on the way to the layer
        that is being searched (one layer earlier where a shortcut enters it; for the last layer everywhere),
        those of the first 2000 training images, computed anew when the search of the layer begins.
    epsilon : float
        What BatchNorm adds to the variance. Used by `models.build`.
    step : {"gaussian", "uniform", "fixed"}
        Distribution of Delta; each has standard deviation sigma_d.
    unit : {"weight", "filter", "layer", "network"}
        What one trial changes at once.
    hold : {"weight", "filter"}
        How long a mini-batch is used: for one trial, or as long as the visits stay in one output
        channel, which saves computing the unchanged loss. Needs `unit="weight"`.
    growth : float
        How many times as large the mini-batches of the last round are as those of the first, which have
        `batch_size` images; in between they grow by the same factor from round to round, to at most the
        training set. 1 in the paper.
    fraction : float
        Part of the weights that a round visits, 0 < fraction <= 1: a random part of each parameter, at least
        one weight, drawn anew in each round. (Of units, where they are larger.) 1 in the paper.
    choose : {"smallest", "vertex"}
        What a weight becomes: that of w, w + Delta, w - Delta with the smallest loss; or w plus half of the
        step (at most 2 Delta) to the vertex of the parabola through the three losses, and where it has no
        lowest point, the same. (The vertex is not of the paper.)
    gate : float
        How many standard errors the loss has to fall, or the weight is kept: see `evaluators/blocks.py`. It
        needs mini-batches of 17 images or more. 0 in the paper: anything smaller is better.
    """

    scaling: str = "standardize"
    init: str = "he"
    sigma: str | float | dict = "layer_std"
    annealing: str | None = None
    weight_decay: float = 0.0
    batches: str = "fresh"
    order: str = "last_first"
    trained: tuple = EVERYTHING
    test_statistics: str = "first_2000"
    search_statistics: str = "batch"
    epsilon: float = 1e-5
    step: str = "gaussian"
    unit: str = "weight"
    hold: str = "weight"
    growth: float = 1.0
    fraction: float = 1.0
    choose: str = "smallest"
    gate: float = 0.0

    @property
    def decay(self):
        """Factor of weight decay, float32."""
        return np.float32(1 - self.weight_decay)


PRESETS = {
    "paper": Preset(),
    "authors": Preset(
        scaling="center",
        init="authors",
        sigma="fan_in",
        annealing="authors",
        weight_decay=1e-4,
        batches="slices",
        order="blocks",
        trained=("weight", "gamma", "beta"),
        search_statistics="fixed",
        epsilon=1e-3,  # MXNet's default
    ),
    "notebook": Preset(
        scaling="none",
        init="glorot",
        sigma="pooled",
        batches="partition",
        order="column_major",
        test_statistics="running",
    ),
}

PRESETS["best"] = replace(PRESETS["authors"], weight_decay=0.0, trained=EVERYTHING, hold="filter",
                          order="first_last", step="fixed", choose="vertex")

ALLOWED_VALUES = {
    "scaling": ("standardize", "center", "none"),
    "init": ("he", "authors", "glorot"),
    "sigma": ("layer_std", "fan_in", "pooled"),
    "annealing": (None, "to_tenth", "authors"),
    "batches": ("fresh", "slices", "partition"),
    "order": ("last_first", "blocks", "column_major", "first_last"),
    "test_statistics": ("first_2000", "running"),
    "search_statistics": ("batch", "fixed"),
    "step": ("gaussian", "uniform", "fixed"),
    "unit": ("weight", "filter", "layer", "network"),
    "hold": ("weight", "filter"),
    "choose": ("smallest", "vertex"),
}


def resolve(preset="paper", **overrides):
    """Return the settings of `preset` with `overrides` in place.

    Parameters
    ----------
    preset : str or Preset
        A name in `PRESETS`, or settings of your own.
    **overrides
        Fields of `Preset`.

    Returns
    -------
    Preset

    Raises
    ------
    ValueError, TypeError
        If the preset, a field or a value is unknown; the message lists the known ones.
    """
    if not isinstance(preset, Preset):
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}; known presets: {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    known = [field.name for field in fields(Preset)]
    for name in overrides:
        if name not in known:
            raise TypeError(f"unknown setting {name!r}; known settings: {', '.join(known)}")
    settings = replace(preset, **overrides)
    settings = replace(settings, epsilon=number_below(settings.epsilon, "epsilon"),
                       weight_decay=number_below(settings.weight_decay, "weight_decay", 1),
                       growth=positive_number(settings.growth, "growth"),
                       fraction=positive_number(settings.fraction, "fraction", 1),
                       gate=number_below(settings.gate, "gate"))
    for name, choices in ALLOWED_VALUES.items():
        value = getattr(settings, name)
        if isinstance(value, (str, type(None))) and value in choices:
            continue
        if name != "sigma":
            raise ValueError(f"{name} is {value!r}; expected one of {choices}")
        numbers = value.values() if isinstance(value, dict) else [value]
        if not all(is_number(number) and 0 < number < float("inf") for number in numbers):
            raise ValueError(f"sigma is {value!r}; expected a positive number or one of {choices}, or a "
                             "dict of positive numbers")
    if settings.hold == "filter" and settings.unit != "weight":
        raise ValueError(f"hold is 'filter' and unit is {settings.unit!r}; expected unit='weight' with it")
    unknown = [name for name in settings.trained if name not in EVERYTHING]
    if isinstance(settings.trained, str) or unknown or not settings.trained:
        raise ValueError(f"trained is {settings.trained!r}; expected a tuple of names out of {EVERYTHING}")
    return settings
