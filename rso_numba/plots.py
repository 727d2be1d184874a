"""Every picture of the package. Each function returns a matplotlib `Figure`.

The figures know nothing of pyplot, so they can be drawn on machines without a screen: `save` writes
one to a file. A notebook shows a figure that ends a cell once it has run `%matplotlib inline`.

Every picture can be read in grey: line styles and markers differ, not only colours.
"""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .files import written_beside
from .rso import CHOICES, step_of

COLOURS = ("#1f4e79", "#e08214", "#3a923a", "#7b3294", "#c51b7d", "#4d4d4d")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")
COLOUR_MAP = "cividis"  # its brightness grows evenly, so that it can be read in grey

COLUMNS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
AXIS_LABELS = {
    "round": "rounds (RSO) or epochs (SGD)",
    "seconds": "training time (s)",
    "images_forwarded": "images forwarded (SGD also goes back:\nthat costs about twice as much again)",
    "train_loss": "training loss (nats)",
    "test_loss": "test loss (nats)",
    "train_accuracy": "training accuracy",
    "test_accuracy": "test accuracy",
}


def curves(histories, labels=None, column="test_accuracy"):
    """Draw a column of training histories against rounds, against seconds, and against images.

    Parameters
    ----------
    histories : History or sequence of History
        Each with at least one row.
    labels : sequence of str, optional
        Names for the legend; by default the solvers.
    column : {"test_accuracy", "test_loss", "train_accuracy", "train_loss"}

    Returns
    -------
    Figure
        Three panels side by side. Where an axis is logarithmic it leaves out row 0, the network
        before training, which took 0 seconds and 0 images.

    Raises
    ------
    ValueError
        If there is no such column, a history has no row, or the labels are not one for each history.

    Notes
    -----
    An image forwarded is an image whose loss was computed. In SGD each of them also passes
    backward, which costs about as much as two forward passes more.
    """
    figure = Figure(figsize=(14, 4.3), layout="constrained")
    _draw_curves(figure.subplots(1, 3), histories, labels, column)
    return figure


def acceptance(history):
    """Draw which part of the trials of each round were accepted, layer by layer.

    Parameters
    ----------
    history : History
        Of RSO. (SGD has no trials.)

    Returns
    -------
    Figure
    """
    figure = Figure(figsize=(6, 4.3), layout="constrained")
    _draw_acceptance(figure.subplots(), history)
    return figure


def filters(before, after):
    """Draw the filters of a convolution before and after training, on one scale of colours.

    Parameters
    ----------
    before, after : ndarray (C_out, C_in, k, k)
        Copy `before` ahead of the training: a `Parameter.value` changes with the network.

    Returns
    -------
    Figure
        One tile for every output and input channel; the input channels of a filter stand side by side.

    Raises
    ------
    ValueError
        If the arrays are not two stacks of filters of one shape.
    """
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    _draw_filters(figure, figure.subplots(1, 2), before, after)
    return figure


def trial(values, losses, trial):
    """Draw the loss of one mini-batch over the value of one weight, and the three candidates of a trial.

    Parameters
    ----------
    values, losses : ndarray (n,)
        Such as `experiments.scan_weight` computes, on the mini-batch of the trial.
    trial : Trial
        Of a single weight.

    Returns
    -------
    Figure
    """
    figure = Figure(figsize=(6, 4.3), layout="constrained")
    _draw_trial(figure.subplots(), values, losses, trial)
    return figure


def overview(histories, searched, before, after, scan=None, title=""):
    """Draw a comparison on one page: curves above; acceptance, filters and one trial below.

    Parameters
    ----------
    histories : sequence of History
        For the curves.
    searched : History
        Of RSO, for the acceptance.
    before, after : ndarray (C_out, C_in, k, k)
        See `filters`.
    scan : tuple (values, losses, trial), optional
        See `trial`; without it that panel is left empty.
    title : str

    Returns
    -------
    Figure
    """
    figure = Figure(figsize=(14, 8.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    if title:
        figure.suptitle(title, fontsize=16)
    grid = figure.add_gridspec(2, 3)
    _draw_curves([figure.add_subplot(grid[0, i]) for i in range(3)], histories, None, "test_accuracy")
    _draw_acceptance(figure.add_subplot(grid[1, 0]), searched)
    middle = grid[1, 1].subgridspec(1, 2)
    _draw_filters(figure, [figure.add_subplot(middle[0, i]) for i in range(2)], before, after)
    if scan is not None:
        _draw_trial(figure.add_subplot(grid[1, 2]), *scan)
    return figure


def by_images(panels):
    """Draw test accuracy against images forwarded: the mean of several trainings, and their range.

    Parameters
    ----------
    panels : dict of dict
        By its title, the lines of each panel; by its label, each line: (images, accuracies), arrays of shape
        (n,) and (n_trainings, n).

    Returns
    -------
    Figure
    """
    figure = Figure(figsize=(14, 5.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        for i, (label, (images, accuracies)) in enumerate(lines.items()):
            ax.plot(images, np.mean(accuracies, axis=0), label=label, **_line(i))
            ax.fill_between(images, np.min(accuracies, axis=0), np.max(accuracies, axis=0), alpha=0.2,
                            color=COLOURS[i % len(COLOURS)], linewidth=0)
        ax.set_xscale("log")
        ax.legend(fontsize=11, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
        _finish(ax, "images forwarded", AXIS_LABELS["test_accuracy"] if ax is axes[0] else "", title)
    return figure


def save(figure, path, dpi=100):
    """Write a figure to `path`; its ending (.png, .pdf, .svg) is the format. A former file is replaced.

    Parameters
    ----------
    figure : Figure
    path : str or path
    dpi : float
        Pixels per inch, for formats made of pixels.
    """
    with written_beside(path) as beside:
        figure.savefig(beside, dpi=dpi)


def _draw_curves(axes, histories, labels, column):
    histories = [histories] if hasattr(histories, "rounds") else list(histories)
    labels = [history.solver.upper() for history in histories] if labels is None else list(labels)
    if len(labels) != len(histories):
        raise ValueError(f"there are {len(labels)} labels for {len(histories)} histories; expected as many")
    if column not in COLUMNS:
        raise ValueError(f"column is {column!r}; expected one of {', '.join(COLUMNS)}")
    for label, history in zip(labels, histories, strict=True):
        if not history.rounds:
            raise ValueError(f"the history of {label} has no row yet; train first")
    for ax, against in zip(axes, ("round", "seconds", "images_forwarded"), strict=True):
        totals = [history[against][-1] for history in histories if history[against][-1] > 0]
        logarithmic = against != "round" and len(totals) > 0 and max(totals) > 5 * min(totals)
        first = 1 if logarithmic else 0
        for i, (label, history) in enumerate(zip(labels, histories, strict=True)):
            ax.plot(history[against][first:], history[column][first:], label=label, **_line(i),
                    markevery=1 + len(history.rounds) // 12)
        if logarithmic:
            ax.set_xscale("log")
        elif against == "round":
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if column.endswith("accuracy"):
            ax.set_ylim(0, 1.02)
        _finish(ax, AXIS_LABELS[against], AXIS_LABELS[column])
    if histories:
        axes[0].legend(fontsize=12, frameon=False)


def _draw_acceptance(ax, history):
    rows = [row for row in history.rounds if row.acceptance]  # row 0 has had no trial yet
    layers = list(dict.fromkeys(layer for row in rows for layer in row.acceptance))
    for i, layer in enumerate(layers):
        rounds = [row.round for row in rows if layer in row.acceptance]
        percent = [100 * row.acceptance[layer] for row in rows if layer in row.acceptance]
        ax.plot(rounds, percent, label=layer, **_line(i))
    if layers:
        ax.legend(fontsize=12, frameon=False, ncols=1 + (len(layers) - 1) // 4)
    else:
        ax.text(0.5, 0.5, "no round of RSO has ended yet", fontsize=12, ha="center", transform=ax.transAxes)
    ax.set_ylim(0, 100)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(ax, "round", "accepted trials (%)", "How many steps are kept")


def _draw_filters(figure, axes, before, after):
    before, after = np.asarray(before), np.asarray(after)
    if before.ndim != 4 or before.shape != after.shape:
        raise ValueError(f"before has shape {before.shape} and after {after.shape}; "
                         "expected the same (C_out, C_in, k, k) twice")
    limit = max(np.abs(before).max(), np.abs(after).max()) or 1
    for ax, stack, title in zip(axes, (before, after), ("Filters before", "and after"), strict=True):
        picture = ax.imshow(_tiles(stack), cmap=COLOUR_MAP, vmin=-limit, vmax=limit, interpolation="nearest")
        ax.set_title(title, fontsize=13)
        ax.set_axis_off()
    bar = figure.colorbar(picture, ax=axes, location="bottom", shrink=0.8)
    bar.set_label("weight", fontsize=12)
    bar.ax.tick_params(labelsize=11)


def _tiles(stack):
    """Return filters (C_out, C_in, k, k) as one picture, with gaps of NaN (drawn in white) between them."""
    n_filters, n_channels, k, _ = stack.shape
    columns = n_channels * int(np.ceil(np.sqrt(n_filters / n_channels)))  # whole filters in every row
    rows = -(-n_filters * n_channels // columns)
    side, gap = 4 * k, 2  # a weight is 4 x 4 pixels, so that a gap can be narrower than a weight
    picture = np.full((rows * (side + gap) - gap, columns * (side + gap) - gap), np.nan)
    for i, tile in enumerate(stack.reshape(-1, k, k)):
        top, left = i // columns * (side + gap), i % columns * (side + gap)
        picture[top : top + side, left : left + side] = tile.repeat(4, axis=0).repeat(4, axis=1)
    return picture


def candidates(trial):
    """Return (w, w + Delta, w - Delta) of a trial, the weights that the three losses belong to."""
    # from the value that was kept, because `before` has not had its weight decay
    w = trial.after - step_of(CHOICES.index(trial.choice), trial.losses) * trial.delta
    return w, w + trial.delta, w - trial.delta


def _draw_trial(ax, values, losses, trial):
    ax.plot(values, losses, color="0.45", linewidth=1.5)
    choices = (("keep", "w"), ("plus", "w + Δ"), ("minus", "w − Δ"))
    for i, (value, loss) in enumerate(zip(candidates(trial), trial.losses, strict=True)):
        choice, name = choices[i]
        kept = choice == trial.choice
        ax.plot([value], [loss], linestyle="", marker=MARKERS[i], color=COLOURS[i],
                markersize=13 if kept else 9, markeredgecolor="black" if kept else COLOURS[i],
                markeredgewidth=2, label=f"{name}: {loss:.4f}" + (" (kept)" if kept else ""))
    if trial.choice == "vertex":  # its loss was not computed
        ax.axvline(trial.after, color="black", linestyle=":", linewidth=2, label="towards the vertex (kept)")
    ax.legend(fontsize=12, frameon=False)
    ax.margins(y=0.12)
    weight = f"{trial.layer}.{trial.parameter}[{', '.join(map(str, trial.index))}]"
    _finish(ax, f"value of {weight}", "loss of one mini-batch (nats)", "One trial")


def _line(i):
    return dict(color=COLOURS[i % len(COLOURS)], linestyle=LINES[i % len(LINES)],
                marker=MARKERS[i % len(MARKERS)], markersize=6, linewidth=2)


def _finish(ax, xlabel, ylabel, title=""):
    ax.set_xlabel(xlabel, fontsize=12)
    ax.set_ylabel(ylabel, fontsize=12)
    ax.set_title(title, fontsize=13)
    ax.tick_params(labelsize=11)
    ax.grid(color="0.9")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
