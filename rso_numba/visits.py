"""Which weights one round visits, in which order, and how large a step each may take."""

from itertools import groupby

import numpy as np

from .layers import BatchNorm, Residual
from .network import Parameter

GAMMA_BETA_SIGMA = 0.167  # the authors' step for every gamma and beta


def visits(network, settings, sigma):
    """Return the visits of one round, a list of (parameter, indices, sigma_d).

    Parameters
    ----------
    network : Network
    settings : Preset
    sigma : dict
        sigma_d of every parameter, see `sigmas`.

    Returns
    -------
    list of (Parameter, sequence of index, float or ndarray)
        `parameter.value[index]` is what one trial changes, `sigma_d` the standard deviation of its
        step. With `unit="layer"` and `"network"` the parameter is the network's whole vector of
        weights and the index an array of positions in it.
    """
    order = visiting_order(network, settings.order, settings.trained)
    if settings.unit == "weight":
        return [(p, weight_indices(p, settings.order), sigma[str(p)]) for p in order]
    if settings.unit == "filter":
        return [(p, range(len(p.value)), sigma[str(p)]) for p in order]
    if settings.unit == "layer":
        layers = dict.fromkeys(p.layer for p in order)
        groups = {layer: [p for p in order if p.layer == layer] for layer in layers}
    else:
        groups = {"network": order}
    positions = network.views(np.arange(network.n_weights))
    return [
        (
            Parameter(name, "weights", network.weights),
            [np.concatenate([positions[str(p)].ravel() for p in group])],
            np.concatenate([np.full(p.value.size, sigma[str(p)]) for p in group]),
        )
        for name, group in groups.items()
    ]


def layers_of_round(network, settings):
    """Return the layers of a round in their order: their names, and the numbers of trials of their visits."""
    nothing = {str(p): 0.0 for p in network.parameters()}
    round_visits = visits(network, settings, nothing)
    return [(name, [n_drawn(indices, settings.fraction) for _, indices, _ in group])
            for name, group in groupby(round_visits, key=lambda visit: visit[0].layer)]


def n_drawn(indices, fraction):
    """Return how many of the weights of a parameter a round visits."""
    return max(1, round(fraction * len(indices)))


def drawn(indices, fraction, rng):
    """Return those that a round visits, in their order; if it is not all of them, they are drawn."""
    if fraction == 1:
        return indices
    chosen = rng.choice(len(indices), n_drawn(indices, fraction), replace=False, shuffle=False)
    return [indices[i] for i in sorted(chosen.tolist())]


def visiting_order(network, order, trained):
    """Return the trained parameters in the order of their visits.

    Parameters
    ----------
    network : Network
    order : str
        "last_first" (Algorithm 1): layers D..1, the parameters of a layer as it declares them.
        "blocks" (authors): the same with each convolution and its BatchNorm taken as one layer,
        its weights first, then beta, then gamma.
        "column_major" (notebook): layers D..1, beta before gamma.
        "first_last": layers 1..D.
    trained : tuple of str
        Names of the parameters to visit.

    Returns
    -------
    list of Parameter
    """
    groups = blocks(network.layers) if order == "blocks" else [[leaf] for leaf in network.leaves]
    if order != "first_last":
        groups.reverse()
    visited = []
    for leaf in (leaf for group in groups for leaf in group):
        own = [p for p in network.parameters() if p.layer == leaf.name and p.name in trained]
        if isinstance(leaf, BatchNorm) and order in ("blocks", "column_major"):
            own.reverse()  # gamma, beta are declared; beta, gamma are visited
        visited += own
    return visited


def blocks(layers):
    """Return lists of layers: each convolution or dense layer with what follows it, up to the next one.

    The blocks of a shortcut stand before the block of the convolution to whose output theirs is added.
    """
    found = []
    for layer in layers:
        if isinstance(layer, Residual):
            *before, last = blocks(layer.body)
            found += [*before, *blocks(layer.shortcut), last]
        elif layer.is_linear or not found:
            found.append([layer])
        else:
            found[-1].append(layer)
    return found


def weight_indices(parameter, order):
    """Return the indices of all weights of `parameter`, in the order of their visits.

    The notebook walks Julia's memory, column by column. A Flux convolution is stored
    (kW, kH, C_in, C_out) there, so column-major order is row-major order of our
    (C_out, C_in, kH, kW); a Flux dense layer is stored (n_out, n_in) as here, so its n_out weights
    of one input come first.
    """
    shape = parameter.value.shape
    indices = list(np.ndindex(shape))
    if order == "column_major" and len(shape) == 2:
        indices.sort(key=lambda index: index[::-1])
    return indices


def sigmas(network, rule, rng):
    """Return sigma_d of every parameter, a dict by `str(parameter)`.

    Parameters
    ----------
    network : Network
        With its initial weights.
    rule : str, float or dict
        See `Preset.sigma`.
    rng : Generator
        Drawn from by "pooled" only.

    Raises
    ------
    ValueError
        If a layer would get sigma = 0, so that no step could ever change it, or one that is NaN or infinite;
        or if a dict has no number for a parameter, or one for a parameter that there is not.
    """
    if isinstance(rule, dict):
        names = [str(p) for p in network.parameters()]
        if set(rule) != set(names):
            raise ValueError(f"sigma has numbers for {', '.join(rule)}; expected {', '.join(names)}")
        return rule
    sigma, pool, joined = {}, np.empty(0), joined_by_shortcuts(network.layers)
    for leaf in network.leaves:
        parameters = [p for p in network.parameters() if p.layer == leaf.name]
        if not parameters:
            continue
        if rule == "pooled":
            # the notebook draws Gaussian weights, measures them, and then forgets to put them into its model
            drawn = [rng.normal(0, np.sqrt(2 / p.value.size), p.value.size) for p in parameters]
            pool = np.concatenate([pool, *drawn])
        for p in parameters:
            if rule == "layer_std":
                sigma[str(p)] = float(np.concatenate([q.value.ravel() for q in parameters]).std())
            elif rule == "fan_in":
                counted = [q for q in network.parameters() if q.layer == joined.get(leaf.name, leaf.name)]
                he = float(np.sqrt(2 / max(q.fan_in for q in counted)))
                sigma[str(p)] = GAMMA_BETA_SIGMA if isinstance(leaf, BatchNorm) else he
            elif rule == "pooled":
                sigma[str(p)] = float(pool.std(ddof=1))  # as Julia's std
            else:
                sigma[str(p)] = float(rule)
            if not 0 < sigma[str(p)] < np.inf:
                reason = ("all its weights are equal" if sigma[str(p)] == 0 else
                          "there is only one weight to measure, or the squares of its weights overflow")
                raise ValueError(
                    f"sigma of layer {p.layer} is {sigma[str(p)]}, because {reason}; "
                    "give sigma as a number, or sigma='fan_in'"
                )
    return sigma


def joined_by_shortcuts(layers):
    """Return to which layer's output that of each linear layer in a shortcut is added, by their names."""
    joined = {}
    for layer in layers:
        if isinstance(layer, Residual):
            last = blocks(layer.body)[-1][0]
            joined |= {inner.name: last.name for inner in layer.shortcut if inner.is_linear}
            joined |= joined_by_shortcuts(layer.body) | joined_by_shortcuts(layer.shortcut)
    return joined


def annealing_factor(annealing, e, rounds):
    """Return the factor on sigma in round e = 0..rounds-1, see `Preset.annealing`."""
    if annealing == "authors":
        return 0.1 + 0.9 * (rounds - e) / rounds
    if annealing == "to_tenth" and rounds > 1:
        return 1 - 0.9 * e / (rounds - 1)
    return 1.0


def draw_step(rng, step, sigma, shape):
    """Return Delta, of standard deviation `sigma`: a float, or an array of `shape`."""
    size = shape or None
    if step == "gaussian":
        return sigma * rng.standard_normal(size)
    if step == "uniform":
        return sigma * np.sqrt(3) * rng.uniform(-1, 1, size)
    return sigma * rng.choice((-1.0, 1.0), size)
