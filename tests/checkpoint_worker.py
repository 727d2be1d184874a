"""A training that test_checkpoint.py starts in a process of its own, to kill it."""

import sys

import numpy as np

from rso_numba import build, datasets, rso, sgd

RUNS = {  # each takes some seconds
    "paper": dict(model="one_conv", preset="paper", rounds=3, backend="numpy"),
    "authors": dict(model="paper_mnist", preset="authors", rounds=5, backend="cpu", trained=("beta",)),
    "notebook": dict(model="two_conv", preset="notebook", rounds=1, backend="cpu"),
    "sgd": dict(model="original", preset="paper", rounds=10, backend="numpy"),
}


def train(name, path):
    """Train, going on from the checkpoint `path`, if there is one; return the network."""
    arguments = dict(RUNS[name])
    model, rounds, preset = (arguments.pop(key) for key in ("model", "rounds", "preset"))
    data = datasets.load_digits().subset(70, 30, rng=0)
    network = build(model, data.image_shape, rng=0, preset=preset)
    arguments |= dict(rng=np.random.default_rng(1), checkpoint=path, resume=path is not None)
    print("begun", flush=True)
    if name == "sgd":
        sgd.train(network, data, rounds, 20, 0.1, 0.9, checkpoint_every=0.05, **arguments)
    else:
        rso.train(network, data, rounds, 20, preset, checkpoint_every=0, **arguments)
    return network


if __name__ == "__main__":
    train(*sys.argv[1:])
