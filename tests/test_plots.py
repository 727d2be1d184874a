"""Pictures: what is drawn is what was given, with named axes; short histories do no harm."""

import matplotlib.image
import numpy as np
import pytest

from rso_numba import plots
from rso_numba.history import History, Round
from rso_numba.rso import Trial


def history_of(solver, n_rounds, seconds=1.0, images=1000):
    history = History(solver)
    for i in range(n_rounds + 1):
        acceptance = {"dense1": 0.5 / i, "conv1": 0.25 / i} if solver == "rso" and i > 0 else {}
        history.rounds.append(Round(i, seconds * i, images * i, 10 * i, 5 * i, 2.0 - 0.1 * i, 0.1 * i,
                                    2.5 - 0.1 * i, 0.09 * i, acceptance))
    return history


def trial_of(choice, delta=0.5, w=2.0, before=2.0):
    after = {"keep": w, "plus": w + delta, "minus": w - delta}[choice]
    losses = tuple(1.0 if name == choice else 1.5 for name in ("keep", "plus", "minus"))
    return Trial(1, "conv1", "weight", (0, 1, 2, 2), delta, losses, choice, before, after)


def points(line):
    return np.column_stack(line.get_data())


def assert_labelled(axes):
    for ax in axes:
        assert ax.get_xlabel() and ax.get_ylabel()


def test_curves_show_the_columns():
    rso, sgd = history_of("rso", 3, seconds=2.0), history_of("sgd", 4, images=1500)
    figure = plots.curves([rso, sgd], column="test_loss")
    assert len(figure.axes) == 3
    assert_labelled(figure.axes)
    assert {ax.get_ylabel() for ax in figure.axes} == {"test loss (nats)"}
    for ax, against in zip(figure.axes, ("round", "seconds", "images_forwarded"), strict=True):
        assert ax.get_xlabel() == plots.AXIS_LABELS[against]
        assert ax.get_xscale() == "linear"
        for line, history in zip(ax.lines, (rso, sgd), strict=True):
            assert np.array_equal(points(line), np.column_stack([history[against], history["test_loss"]]))
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["RSO", "SGD"]


def test_curves_of_very_different_cost_are_logarithmic_and_leave_out_row_0():
    rso, sgd = history_of("rso", 3, seconds=20.0, images=10**6), history_of("sgd", 4)
    by_round, by_seconds, by_images = plots.curves([rso, sgd], labels=["a", "b"]).axes
    assert [ax.get_xscale() for ax in (by_round, by_seconds, by_images)] == ["linear", "log", "log"]
    assert np.array_equal(points(by_round.lines[0])[:, 0], [0, 1, 2, 3])
    assert np.array_equal(points(by_seconds.lines[0]), np.column_stack([[20, 40, 60], [0.09, 0.18, 0.27]]))
    assert np.array_equal(points(by_images.lines[1])[:, 0], [1000, 2000, 3000, 4000])
    assert [text.get_text() for text in by_round.get_legend().get_texts()] == ["a", "b"]


def test_curves_can_be_told_apart_without_colour():
    lines = plots.curves([history_of("rso", 2) for _ in range(6)], labels="abcdef").axes[0].lines
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 6


@pytest.mark.parametrize("histories", [history_of("rso", 3), [history_of("rso", 0)],
                                       [history_of("rso", 0), history_of("sgd", 5)]])
def test_curves_of_one_history_and_of_row_0(histories, tmp_path):
    figure = plots.curves(histories)
    expected = 1 if hasattr(histories, "rounds") else len(histories)
    assert all(len(ax.lines) == expected for ax in figure.axes)
    assert all(len(line.get_xdata()) > 0 for ax in figure.axes for line in ax.lines)
    plots.save(figure, tmp_path / "curves.png")


def test_curves_refuse_what_they_cannot_draw():
    with pytest.raises(ValueError, match="column is 'speed'; expected one of train_loss"):
        plots.curves(history_of("rso", 1), column="speed")
    with pytest.raises(ValueError, match="the history of SGD has no row yet"):
        plots.curves([history_of("rso", 1), History("sgd")])
    with pytest.raises(ValueError, match="1 labels for 2 histories"):
        plots.curves([history_of("rso", 1)] * 2, labels=["one"])


def test_acceptance_is_in_percent_by_layer():
    (ax,) = plots.acceptance(history_of("rso", 2)).axes
    assert_labelled([ax])
    assert [line.get_label() for line in ax.lines] == ["dense1", "conv1"]
    assert np.array_equal(points(ax.lines[0]), [[1, 50], [2, 25]])
    assert np.array_equal(points(ax.lines[1]), [[1, 25], [2, 12.5]])
    assert ax.get_ylim() == (0, 100)


def test_acceptance_before_the_first_round_says_so():
    (ax,) = plots.acceptance(history_of("rso", 0)).axes
    assert not ax.lines
    assert ax.texts[0].get_text() == "no round of RSO has ended yet"


@pytest.mark.parametrize("shape, tiles", [((4, 1, 3, 3), (2, 2)), ((16, 3, 3, 3), (6, 9)),
                                          ((1, 1, 1, 1), (1, 1))])
def test_filters_share_one_scale_and_show_every_weight(shape, tiles):
    before = np.random.default_rng(0).normal(size=shape)
    after = 3 * before
    figure = plots.filters(before, after)
    pictures = [ax.images[0] for ax in figure.axes if ax.images]
    limit = np.abs(after).max()
    assert [picture.get_clim() for picture in pictures] == [(-limit, limit)] * 2
    assert figure.axes[-1].get_xlabel() == "weight"
    for picture, stack in zip(pictures, (before, after), strict=True):
        shown = np.ma.filled(picture.get_array(), np.nan)
        side = 4 * shape[-1]
        assert shown.shape == tuple(n * (side + 2) - 2 for n in tiles)
        assert np.array_equal(shown[:side:4, :side:4], stack[0, 0])  # the first filter is at the top left
        values, counts = np.unique(shown[~np.isnan(shown)], return_counts=True)
        assert np.array_equal(values, np.unique(stack)) and set(counts) == {16}


def test_filters_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"\(4, 9\)"):
        plots.filters(np.zeros((4, 9)), np.zeros((4, 9)))
    plots.filters(np.zeros((4, 1, 3, 3)), np.zeros((4, 1, 3, 3)))  # nothing but zeros has no largest weight


@pytest.mark.parametrize("choice", ["keep", "plus", "minus"])
def test_trial_marks_the_candidates_and_the_kept_one(choice):
    values, losses = np.linspace(1, 3, 5), np.linspace(2, 1, 5)
    trial = trial_of(choice, before=2.1)  # weight decay stands between `before` and w
    (ax,) = plots.trial(values, losses, trial).axes
    assert_labelled([ax])
    assert ax.get_xlabel() == "value of conv1.weight[0, 1, 2, 2]"
    curve, *marks = ax.lines
    assert np.array_equal(points(curve), np.column_stack([values, losses]))
    marked = np.concatenate([points(mark) for mark in marks])
    assert np.array_equal(marked, np.column_stack([[2, 2.5, 1.5], trial.losses]))
    kept = [mark for mark in marks if "(kept)" in mark.get_label()]
    assert [points(mark).tolist() for mark in kept] == [[[trial.after, 1.0]]]
    assert kept[0].get_markersize() > min(mark.get_markersize() for mark in marks)
    assert len({mark.get_marker() for mark in marks}) == 3


def test_trial_of_the_vertex_marks_where_the_weight_went():
    trial = Trial(1, "conv1", "weight", (0, 1, 2, 2), 0.5, (1.0, 1.25, 1.75), "vertex", 2.1, 2.0625)
    (ax,) = plots.trial(np.linspace(1, 3, 5), np.linspace(2, 1, 5), trial).axes
    marks, (kept,) = ax.lines[1:4], ax.lines[4:]
    assert np.array_equal(np.concatenate([points(mark) for mark in marks])[:, 0], [2, 2.5, 1.5])
    assert kept.get_label() == "towards the vertex (kept)" and set(kept.get_xdata()) == {2.0625}


@pytest.mark.parametrize("n_rounds", [0, 3])
def test_overview_is_one_page_of_1400_pixels(n_rounds, tmp_path):
    rso, sgd = history_of("rso", n_rounds, images=10**6), history_of("sgd", 9)
    stack = np.random.default_rng(0).normal(size=(4, 1, 3, 3))
    scan = (np.linspace(1, 3, 5), np.linspace(2, 1, 5), trial_of("plus"))
    plots.save(plots.overview([rso, sgd], rso, stack, stack, scan, "digits"), tmp_path / "overview.png")
    assert matplotlib.image.imread(tmp_path / "overview.png").shape[1] == 1400
    assert [path.name for path in tmp_path.iterdir()] == ["overview.png"]
    assert len(plots.overview([sgd], rso, stack, stack).axes) == 7  # without a trial
    assert len(plots.overview([sgd], rso, stack, stack, scan).axes) == 8


def test_by_images_shows_mean_and_range_of_every_line():
    lines = {"few": ([10, 20], [[0.1, 0.4], [0.3, 0.6]]), "many": ([100, 200], [[0.5, 0.7]])}
    figure = plots.by_images({"one_conv": lines, "two_conv": {"few": lines["few"]}})
    assert [ax.get_title() for ax in figure.axes] == ["one_conv", "two_conv"]
    few, many = figure.axes[0].get_lines()
    np.testing.assert_allclose(points(few), [[10, 0.2], [20, 0.5]])
    np.testing.assert_allclose(points(many), [[100, 0.5], [200, 0.7]])
    assert (few.get_label(), many.get_label()) == ("few", "many")
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} == {(10, 0.1), (10, 0.3), (20, 0.4), (20, 0.6)}
    assert figure.axes[0].get_xscale() == "log"


def test_a_failed_save_keeps_the_former_file(tmp_path):
    path = tmp_path / "figure.png"
    path.write_text("former")
    figure = plots.acceptance(history_of("rso", 1))
    with pytest.raises(ValueError, match="dpi"):
        plots.save(figure, path, dpi=-1)
    assert path.read_text() == "former" and len(list(tmp_path.iterdir())) == 1
