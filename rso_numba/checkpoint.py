"""Checkpoints: files from which an interrupted training goes on, to the same weights bit for bit.

A search goes on from the beginning of a layer, and makes the trials since then once more. There an evaluator
remembers nothing. Inside a layer it remembers gigabytes of what it knows of mini-batches, and sums that were
brought up to date trial by trial: computed anew, they would differ in their last bits. SGD remembers nothing
between two steps, and goes on from any of them.
"""

import json
import shutil
import signal
import threading
from pathlib import Path
from time import monotonic

import numpy as np

from .arguments import number_below
from .evaluators.graph import Graph, NoDelta
from .files import read_npz, written_beside

FORMAT = 1  # of checkpoint files
SIGNALS = signal.SIGINT, signal.SIGTERM


class Checkpoint:
    """The last state of a training, in a file; the state before it in another one beside it.

    As a context it lets Ctrl-C and SIGTERM wait for the end of a step (a second one does not wait).

    Parameters
    ----------
    path : str, path or None
        Ends in .npz. None means that there are no checkpoints: then the methods do nothing.
    every : float
        Seconds from one writing to the next.
    """

    def __init__(self, path, every):
        self.path, self.every = path and Path(path), number_below(every, "checkpoint_every")
        self.signal, self.former, self.due = None, {}, monotonic() + self.every
        self.place = "its beginning"
        if path and self.path.suffix != ".npz":
            raise ValueError(f"checkpoint is {str(path)!r}; expected a file that ends in .npz")

    @property
    def previous(self):
        """Path of the checkpoint before the last one."""
        return self.path.with_name(f"{self.path.stem}.previous.npz")

    def load(self, resume, network, data, **run):
        """Return (header, arrays) of the file to go on from, or None if the training begins at its beginning.

        Parameters
        ----------
        resume : bool or "previous"
            See `rso.train`.
        network : Network
        data : Dataset
        **run
            What a training must have in common with the one that was interrupted, beside network and data.
        """
        if not (isinstance(resume, bool) or resume == "previous"):
            raise ValueError(f"resume is {resume!r}; expected False, True or 'previous'")
        if self.path is None:
            if resume:
                raise ValueError(f"resume is {resume!r} and checkpoint is None; expected a checkpoint's path")
            return None
        self.run = _plain(run | {"network": network.description(), "data": data.checksum()})
        path = self.previous if resume == "previous" else self.path
        if not path.exists():
            if resume == "previous":
                raise FileNotFoundError(f"there is no {path}: nothing was written before the last checkpoint")
            return None
        header, arrays = self._read(path)
        if not resume and header["is_finished"]:
            return None
        if not resume:
            raise FileExistsError(f"{path} is the checkpoint of a training that was interrupted, at "
                                  f"{header['place']}; go on with resume=True (--resume), or delete it")
        for name in header["run"] | self.run:
            was, is_now = header["run"].get(name), self.run.get(name)
            if was != is_now:
                raise ValueError(f"{path} is the checkpoint of another training: {name} was {was!r}, and is "
                                 f"{is_now!r}; give the same arguments, or another path")
        return header, arrays

    def _read(self, path):
        try:
            with open(path, "rb") as file:
                arrays = read_npz(file)
            header = json.loads(str(arrays.pop("header")))
            if header["format"] != FORMAT:
                raise ValueError(f"its format is {header['format']!r}; this rso_numba reads {FORMAT}")
            return header, arrays
        except OSError:
            raise
        except Exception as error:  # reading a damaged file raises nearly anything
            other = ("delete it" if path == self.previous or not self.previous.exists() else
                     f"resume='previous' goes on from the one before, {self.previous}")
            raise ValueError(f"{path} is damaged or is no checkpoint ({type(error).__name__}: {error}); "
                             f"{other}") from error

    def write(self, header, arrays, is_finished=False):
        """Write a state; the last one becomes the previous one."""
        if self.path is None:
            return
        header = {"format": FORMAT, "run": self.run, "place": self.place, "is_finished": is_finished} | header
        if self.path.exists():
            with written_beside(self.previous) as beside:
                shutil.copyfile(self.path, beside)
        with written_beside(self.path) as beside:
            np.savez(beside, header=np.array(json.dumps(header, default=_as_list)), **arrays)
        self.due = monotonic() + self.every

    def after_step(self, state):
        """Write what `state()` returns if it is time to, or if the training was told to end.

        Parameters
        ----------
        state : function
            Returns (header, arrays), or None if nothing is new since the last writing.

        Raises
        ------
        KeyboardInterrupt
            If there was a Ctrl-C or SIGTERM.
        """
        if self.path is None or (self.signal is None and monotonic() < self.due):
            return
        new = state()
        if new is not None:
            self.write(*new)
        if self.signal is not None:
            name = signal.Signals(self.signal).name
            raise KeyboardInterrupt(f"{name}; with resume=True the training goes on from {self.path}, "
                                    f"at {self.place}")

    def __enter__(self):
        # Python calls handlers in its main thread only
        if self.path is not None and threading.current_thread() is threading.main_thread():
            self.former = {number: signal.signal(number, self._take_note) for number in SIGNALS}
        return self

    def __exit__(self, *error):
        for number, handler in self.former.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _take_note(self, number, frame):
        self.signal = number
        signal.signal(number, self.former[number] or signal.SIG_DFL)


class SearchCheckpoint(Checkpoint):
    """Checkpoints of a search.

    Parameters
    ----------
    path, every
        See `Checkpoint`.
    network : Network
        With its initial weights, and its input scaling fitted.
    rng : Generator
    history : History

    Attributes
    ----------
    cursor : Cursor or None
        For `rso.algorithm_1`.
    is_finished : bool
        Whether the search that goes on had ended.
    """

    def __init__(self, path, every, network, rng, history):
        super().__init__(path, every)
        self.network, self.rng, self.history = network, rng, history
        self.cursor = None if path is None else Cursor(network)
        self.node = self.waiting = self.state = None
        self.is_finished = False

    def begin(self, resume, data, **run):
        """Return whether the search goes on; if so, prepare network, rng and history. See `load`."""
        saved = self.load(resume, self.network, data, solver="rso", **run)
        if self.path is None:
            return False
        try:
            self.node_of = Graph(self.network).node_of
        except NoDelta:
            self.node_of = {}
        if saved is not None:
            header, arrays = saved
            self.history.restore(header["history"])
            self.is_finished = header["is_finished"]
            self.network.set_state(part("network" if self.is_finished else "initial", arrays))
            set_rng_state(self.rng, header["draws" if self.is_finished else "first_draws"])
            if not self.is_finished:
                self.cursor.go_on(header["visit"], header["draws"], arrays)
        self.first_draws, self.initial = rng_state(self.rng), named("initial", self.network.copied_state())
        return saved is not None

    def begin_layer(self, visit, name):
        """Take note of the network before a layer is searched; return whether that is still to be done.

        Parameters
        ----------
        visit : int
            How many visits the search has made.
        name : str
            Of the layer.
        """
        if self.path is None:
            return True
        before, self.node = self.node, self.node_of.get(name)
        if visit <= self.cursor.first_visit:  # the file has it already
            return visit == self.cursor.first_visit
        if self.node is None or self.node is not before:  # else an evaluator goes on to remember
            self.waiting = self._state(visit=visit, place=f"round {len(self.history.rounds)}, {name}")
        return True

    def after_trial(self):
        """Write what there was at the beginning of a layer, if it is time to; see `after_step`."""
        if self.waiting is not None:
            (header, arrays), self.waiting = self.waiting, None
            header["draws"], batches = self.cursor.draws_of(header["visit"])
            self.state, self.place = (header, arrays | named("batches", batches)), header["place"]
        self.after_step(self._new)

    def __exit__(self, *error):
        super().__exit__(*error)
        if error[0] is not None and self.state is not None:  # the GPU may have failed
            self.write(*self._new())

    def finish(self):
        """Write the end of the search."""
        if self.path is not None and not self.is_finished:
            self.write(*self._state(draws=rng_state(self.rng)), is_finished=True)

    def _new(self):
        new, self.state = self.state, None
        return new

    def _state(self, **header):
        header |= {"first_draws": self.first_draws, "history": self.history.to_dict()}
        return header, self.initial | named("network", self.network.copied_state())


class Cursor:
    """Counts the visits of a search, and skips those that were made before an interruption."""

    def __init__(self, network):
        self.network, self.visit, self.first_visit, self.begun = network, -1, -1, {}

    def go_on(self, first_visit, draws, arrays):
        """Begin with a later visit, from the states of rng (a dict) and of network and batches (arrays)."""
        self.first_visit, self.draws, self.arrays = first_visit, draws, arrays

    def is_done(self, batches):
        """Begin a visit; return whether it was made before the interruption."""
        self.visit += 1
        if self.visit < self.first_visit:
            return True
        if self.visit == self.first_visit:
            self.network.set_state(part("network", self.arrays))
            batches.set_state(part("batches", self.arrays))
            set_rng_state(batches.rng, self.draws)
        self.begun[self.visit] = rng_state(batches.rng), batches.state()
        return False

    def draws_of(self, visit):
        """Return the states of rng and batches at the beginning of a visit."""
        # evaluators that decide trials in groups have begun later ones
        self.begun = {later: states for later, states in self.begun.items() if later >= visit}
        return self.begun[visit]


def rng_state(rng):
    """Return the state of a Generator, a dict."""
    return rng.bit_generator.state


def set_rng_state(rng, state):
    """Give a Generator a state that `rng_state` returned, also after it was JSON."""
    own = rng.bit_generator.state["bit_generator"]
    if state["bit_generator"] != own:
        raise ValueError(f"rng is a Generator with {own}, and the checkpoint of one with "
                         f"{state['bit_generator']}; give rng=None or an int to the same kind")
    rng.bit_generator.state = state


def named(kind, arrays):
    """Return a dict of arrays under names that begin with their kind, for a file that holds several kinds."""
    return {f"{kind}.{name}": array for name, array in arrays.items()}


def part(kind, arrays):
    """Return the arrays of a kind, a dict by the names that `named` was given."""
    return {name.removeprefix(f"{kind}."): array for name, array in arrays.items()
            if name.startswith(f"{kind}.")}


def _plain(value):
    """Return `value` as it comes back from JSON."""
    return json.loads(json.dumps(value, default=_as_list))


def _as_list(array):
    return array.tolist()  # arrays, and NumPy's numbers
