"""Tables of results: what is trained, what a line of the file says, and what the pages show."""

import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from rso_numba import ablations, build, datasets, markdown, pages, results, rso, sgd, tables
from rso_numba.__main__ import main
from rso_numba.history import History, Round
from rso_numba.rows import Row, train

# a table of two rows, whose trainings say that they have begun, and last
LONG_TABLE = """
import sys, time
from rso_numba import __main__, datasets, results, tables

def trained(*_):
    print("begun", flush=True)
    time.sleep(600)

datasets.load = lambda *_: datasets.load_digits().subset(70, 30, rng=0)
results._trained = trained
tables.TABLES["notebook"] = tables.TABLES["notebook"][:2]
sys.exit(__main__.main(sys.argv[1:]))
"""

N_WEIGHTS = 210  # of one_conv on 4 x 4 images
ROWS = (
    Row("whole", "one_conv", 8, 2, "notebook"),
    Row("begun", "one_conv", 8, 2, "authors", {"hold": "filter"}, schedule=4),
    Row("sgd", "one_conv", 16, 3, "notebook", {"learning_rate": 0.1, "momentum": 0.5}, "sgd"),
)


def run(path, data, rows=ROWS, seeds=2, **named):
    return list(results.run(rows, path, data, seeds, backend="numpy", **named))


def without_seconds(lines):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def finished(few, tmp_path_factory):
    """The file of a table that was made at once."""
    path = tmp_path_factory.mktemp("table") / "table.csv"
    run(path, few)
    return path


# ---- the trainings ----


def test_a_line_has_the_figures_of_the_training(finished, few):
    lines = results.read(finished)
    assert [(line["row"], line["seed"]) for line in lines] == [
        (name, seed) for seed in "01" for name in ("whole", "begun", "sgd")]
    for line in lines:
        seed = int(line["seed"])
        rng = np.random.default_rng([seed, 1])
        if line["row"] == "sgd":
            network = build("one_conv", (1, 4, 4), rng=seed, preset="notebook")
            history = sgd.train(network, few, 3, 16, 0.1, 0.5, backend="numpy", rng=rng)
        elif line["row"] == "whole":
            network = build("one_conv", (1, 4, 4), rng=seed, preset="notebook")
            history = rso.train(network, few, 2, 8, "notebook", backend="numpy", rng=rng)
        else:  # the annealing is made for 4 rounds
            network = build("one_conv", (1, 4, 4), rng=seed, preset="authors")
            history = rso.train(network, few, 4, 8, "authors", hold="filter", backend="numpy", rng=rng,
                                on_round=lambda row: row.round == 2)
        last, accuracies = history.rounds[-1], history["test_accuracy"]
        assert float(line["final_test_accuracy"]) == pytest.approx(accuracies[-1], rel=1e-5)
        assert float(line["best_test_accuracy"]) == pytest.approx(max(accuracies[1:]), rel=1e-5)
        by_round = list(map(float, line["test_accuracy_by_round"].split()))
        np.testing.assert_allclose(by_round, accuracies, rtol=1e-5)
        for name in ("train_loss", "test_loss"):
            assert float(line[name]) == pytest.approx(getattr(last, name), rel=1e-5)
        for name in ("images_forwarded", "weights_visited", "accepted"):
            assert int(line[name]) == getattr(last, name)
        assert (line["rounds"], line["schedule"]) == {"sgd": ("3", "3"), "whole": ("2", "2"),
                                                      "begun": ("2", "4")}[line["row"]]
        assert line["numpy"] == np.__version__ and line["backend"] == "numpy" and line["threads"] == ""


# in the last round of the second row; then in the third. A search goes on from the beginning of a layer
@pytest.mark.parametrize("method, n_calls, n_of_all, most_again", [
    ("add_trial", 2 * 210 + 196 + 150, 2 * 2 * (210 + 196), 160), ("add_step", 7, 2 * 3 * 5, 0)])
def test_an_interrupted_table_goes_on(finished, few, tmp_path, monkeypatch, method, n_calls, n_of_all,
                                      most_again):
    original, calls = getattr(History, method), []

    def interrupted(*arguments):
        original(*arguments)
        calls.append(arguments)
        if len(calls) == n_calls:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(History, method, interrupted)
    path = tmp_path / "table.csv"
    with pytest.raises(KeyboardInterrupt):
        run(path, few)
    n_lines = len(results.read(path))
    assert 0 < n_lines < 6 and len(list(tmp_path.glob("*.checkpoint.npz"))) == 1
    assert len(run(path, few)) == 6 - n_lines
    assert without_seconds(results.read(path)) == without_seconds(results.read(finished))
    assert list(tmp_path.iterdir()) == [path]
    assert len(calls) <= n_of_all + most_again
    assert run(path, few) == []


def test_rounds_end_a_search_early_under_the_same_annealing(finished, few, tmp_path):
    path = tmp_path / "table.csv"
    run(path, few, rounds=1, seeds=1)
    lines, whole = results.read(path), results.read(finished)
    assert [(line["rounds"], line["schedule"]) for line in lines] == [("1", "2"), ("1", "4"), ("3", "3")]
    for short, long in zip(lines, whole, strict=False):
        assert long["test_accuracy_by_round"].startswith(short["test_accuracy_by_round"])
    run(path, few, seeds=1)  # rows of other rounds are other rows
    assert len(results.read(path)) == 5


def test_trainings_at_once_are_those_in_turn(finished, few, tmp_path):
    path = tmp_path / "table.csv"
    lines = run(path, few, n_jobs=2)
    assert results.read(path) == lines and list(tmp_path.iterdir()) == [path]

    def sorted_lines(lines):
        return sorted(without_seconds(lines), key=lambda line: (line["row"], line["seed"]))

    assert sorted_lines(lines) == sorted_lines(results.read(finished))


@pytest.mark.parametrize("unit, length", [("filter", 28), ("layer", 2), ("network", 1)])
def test_larger_steps_are_compared_by_images(few, unit, length):
    row = Row("unit", "one_conv", 8, 2, overrides={"unit": unit})
    history = train(row, few, 0, backend="numpy")
    assert history["weights_visited"] == [0, N_WEIGHTS, 2 * N_WEIGHTS]
    assert history["images_forwarded"] == [0, 3 * 8 * N_WEIGHTS, 2 * 3 * 8 * N_WEIGHTS]
    # the same as in so many rounds of their own
    network = build("one_conv", (1, 4, 4), rng=0)
    trials = rso.trials(network, few, 2 * N_WEIGHTS // length, 8, unit=unit, evaluation="full",
                        backend="numpy", rng=np.random.default_rng([0, 1]))
    assert sum(trial.accepted for trial in trials) == history["accepted"][-1]
    assert network.evaluate(few.test_images, few.test_labels, "numpy")[0] == history["test_loss"][-1]


# ---- the file ----


def history_of(*accuracies):
    history = History("rso")
    history.rounds = [Round(i, 10.0 * i, 100 * i, 20 * i, 5 * i, 0.5, 0.5, 0.25, accuracy)
                      for i, accuracy in enumerate(accuracies)]
    return history


def line_of(row, seed, *accuracies):
    return results.measured(row, seed, history_of(*accuracies), results.origin("numpy"))


def test_a_history_from_elsewhere_becomes_a_line(tmp_path):
    made_by = results.origin("numpy") | {"machine": "another one", "backend": "cuda", "commit": "abc"}
    line = results.measured(ROWS[0], 7, history_of(0.1, 0.9, 0.8), made_by)
    results.add(tmp_path / "a.csv", line)
    (read,) = results.read(tmp_path / "a.csv")
    assert read == line and tuple(read) == results.COLUMNS
    assert (read["final_test_accuracy"], read["best_test_accuracy"]) == ("0.8", "0.9")
    assert (read["seed"], read["machine"], read["overrides"]) == ("7", "another one", "{}")
    with pytest.raises(ValueError, match="has 1 rounds, and the row 'whole' 2"):
        line_of(ROWS[0], 0, 0.1, 0.5)


def test_a_row_that_was_made_otherwise_is_an_error(finished, few):
    row = replace(ROWS[0], batch_size=16)
    with pytest.raises(ValueError, match="the row 'whole' with batch_size '8', expected '16'"):
        run(finished, few, [row])


@pytest.mark.parametrize("content", ["a,b\n1,2\n", ",".join(results.COLUMNS) + "\n1,2\n", "\xff"])
def test_a_file_that_has_no_results_is_an_error(few, tmp_path, content):
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="a.csv is no file of results"):
        run(path, few)
    assert path.read_bytes() == content.encode("latin-1")


def test_rounds_that_a_row_is_not_made_for(few, tmp_path):
    with pytest.raises(ValueError, match="rounds is 3; expected at most 2, for which the row 'whole'"):
        run(tmp_path / "a.csv", few, rounds=3)


# ---- the command ----


@pytest.fixture
def small_table(few, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "load", lambda *_: few)
    monkeypatch.setitem(tables.TABLES, "notebook", ROWS)
    return ["table", "notebook", "--backend", "numpy", "--no-progress", "--out", str(tmp_path)]


def test_the_command_prints_and_writes_a_table(small_table, capsys, tmp_path):
    assert main([*small_table, "--quick", "--only", "whole", "sgd"]) == 0
    out, err = capsys.readouterr()
    lines = results.read(tmp_path / "notebook.csv")
    assert [line["row"] for line in lines] == ["whole", "sgd"]
    assert out == pages.render("notebook", lines) + "\n" and len(out.splitlines()) == 4
    assert "rso-numba: whole, seed 0: test accuracy" in err and err.count("\n") == 2
    assert main([*small_table, "--seeds", "1", "--only", "whole"]) == 0
    again = capsys.readouterr()
    assert (again.out, again.err) == (out, "")


def test_an_interrupted_command_prints_what_there_is(small_table, capsys, monkeypatch, tmp_path):
    add = results.add

    def interrupted(*arguments):
        add(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "add", interrupted)
    assert main(small_table) == 130
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3 and "| whole " in out
    assert "interrupted" in err and "the same command goes on" in err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that a process can catch")
def test_sigterm_ends_the_processes_of_jobs(tmp_path):
    arguments = ["table", "notebook", "--quick", "--jobs", "2", "--out", str(tmp_path)]
    command = [sys.executable, "-c", LONG_TABLE, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            n_begun = 0
            while n_begun < 2 and (line := process.stdout.readline()):
                n_begun += line.count("begun")  # two processes may share a line
            process.terminate()
            _, err = process.communicate(timeout=60)  # the pipes are open as long as one of them lives
        finally:
            process.kill()
    assert process.returncode == 130 and "the same command goes on" in err


@pytest.mark.parametrize("arguments, said", [
    (["table", "mine"], "there is no table 'mine'; expected one of notebook, paper, ablations, better"),
    (["table", "notebook", "--only", "x", "y"], "no row of the table 'notebook' has 'x' or 'y' in its name"),
    (["table", "notebook", "--seeds", "0"], "seeds is 0"),
    (["table", "notebook", "--rounds", "3"], "rounds is 3"),
    (["table", "notebook", "--jobs", "0"], "n_jobs is 0"),
    (["table", "notebook", "--jobs", "2", "--threads", "1"], "--threads is 1 and --jobs 2; expected one"),
])
def test_errors_are_one_line(small_table, capsys, tmp_path, arguments, said):
    assert main([*arguments, *small_table[2:]]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err
    assert list(tmp_path.iterdir()) == []


# ---- the rows ----


@pytest.mark.parametrize("name", tables.TABLES)
def test_rows_can_be_trained(name):
    rows = tables.TABLES[name]
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        network = build(row.model, rng=0, preset=row.settings)
        assert row.rounds <= (row.schedule or row.rounds) and network.n_weights > 0
        if row.solver == "sgd":
            sgd.check_settings(**row.overrides)


def test_an_ablation_changes_one_thing():
    authors = ablations.SETTINGS[0].row("one_conv").settings
    for setting in ablations.SETTINGS:
        for model in setting.models:
            row = setting.row(model)
            changed = {name for name, value in vars(row.settings).items() if value != getattr(authors, name)}
            if row.batch_size != ablations.MODELS[model]["batch_size"]:
                changed.add("batch_size")
            if setting.name.startswith("unit="):  # compared with each other
                together = {"unit", "batches", "annealing", "weight_decay"}
                assert changed | {"unit"} == together and row.rounds == 1
            elif not setting.name.startswith("preset"):
                assert len(changed) == 1, setting.name


def test_published_figures_of_the_notebook():
    published = {row.name: row.published for row in tables.NOTEBOOK}
    expected = {"one_conv": [(32, 212, 0.632, 0.8075), (64, 345, 0.553, 0.8353), (256, 1641, 0.372, 0.8929),
                             (512, 2834, 0.297, 0.9152), (1024, 5046, 0.301, 0.9148)],
                "two_conv": [(32, 1457, 0.513, 0.8504), (512, 19186, 0.193, 0.9397),
                             (1000, 36464, 0.126, 0.9604)]}
    for model, figures in expected.items():
        for batch_size, seconds, loss, accuracy in figures:
            (one,) = published.pop(f"RSO, {model}, batch {batch_size}")
            assert (one.rounds, one.seconds, one.loss, one.accuracy) == (10, seconds, loss, accuracy)
    for batch_size, seconds in ((256, 5240), (1000, 73042)):
        (one,) = published.pop(f"RSO, original, batch {batch_size}")
        assert (one.rounds, one.seconds, one.loss, one.accuracy) == (1, seconds, None, None)
    assert list(published.values()) == [()] * 3
    for row in tables.NOTEBOOK:
        assert row.preset == "notebook" and row.rounds == 10
        searched = {"test_statistics": "first_2000"} if row.model == "original" else {}
        assert row.overrides == ({"learning_rate": 0.01} if row.solver == "sgd" else searched)


def test_published_figures_of_the_paper():
    *searches, gradients = tables.PAPER
    assert [row.batch_size for row in searches] == [1000, 2000, 5000]
    for row in searches:
        assert [(one.rounds, one.accuracy) for one in row.published] == [(5, 0.98), (50, 0.9912)]
        assert (row.rounds, row.schedule, row.preset, row.overrides) == (5, 50, "authors", {"hold": "filter"})
    assert [one.accuracy for one in gradients.published] == [0.9927]
    assert (gradients.batch_size, gradients.rounds, gradients.overrides["momentum"]) == (128, 50, 0.9)


# ---- the pages ----


def cells_of(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_a_table_in_markdown():
    table = markdown.table([["a", "bb"], ["ccc", "d"]], left=(0,))
    assert table.splitlines() == ["| a   | bb |", "|-----|---:|", "| ccc |  d |"]


def test_a_rendered_row_has_mean_and_range_beside_what_was_published():
    row = tables.NOTEBOOK[0]
    lines = [line_of(row, 0, *[0.1] * 9, 0.9, 0.8), line_of(row, 1, *[0.1] * 10, 0.7)]
    header, _, cells = cells_of(pages.render("notebook", lines))
    assert dict(zip(header, cells, strict=True)) == {
        "row": "RSO, one_conv, batch 32", "rounds": "10", "seeds": "2",
        "test accuracy (min..max)": "0.7500 (0.7000..0.8000)", "published accuracy": "0.8075",
        "best over rounds": "0.8000", "test loss": "0.250", "published loss": "0.632", "seconds": "100.0",
        "published seconds": "212", "images forwarded": "1,000", "weight visits": "200",
        "weights changed": "50"}


def test_what_was_published_of_other_rounds_says_so():
    row = tables.PAPER[0]
    lines = [line_of(replace(row, rounds=n), 0, *[0.1] * n, 0.5) for n in (50, 5, 7)]
    published = [(cells[1], cells[4]) for cells in cells_of(pages.render("paper", lines))[2:]]
    assert published == [("5 of 50", "0.9800"), ("7 of 50", "0.9800 (round 5)"), ("50", "0.9912")]
    lines = [line_of(tables.PAPER[-1], 0, *[0.1] * 50, 0.5)]  # of SGD the paper does not say after how many
    assert cells_of(pages.render("paper", lines))[2][4] == "0.9927"


def test_ablations_have_both_networks_side_by_side():
    setting = ablations.SETTINGS[1]
    lines = [line_of(setting.row("one_conv"), 0, *[0.1] * 5, 0.5),
             line_of(setting.row("two_conv"), 0, *[0.2] * 3)]
    _, _, cells = cells_of(pages.render("ablations", lines))
    assert cells == [setting.name, "0.5000 (1 seed)", "0.5000", "50.0", "0.2000 (1 seed)",
                     "0.2000", "20.0", setting.finding or "-"]


def test_tables_on_a_page_are_made_anew(tmp_path):
    results.add(tmp_path / "paper.csv", line_of(tables.PAPER[0], 0, *[0.1] * 5, 0.5))
    begin, end = "<!-- table paper -->\n", "<!-- end -->"
    text = f"before\n{begin}old\n{end}\nbetween\n{begin}{end}\nafter\n"
    table = pages.render("paper", results.read(tmp_path / "paper.csv")) + "\n"
    expected = f"before\n{begin}{table}{end}\nbetween\n{begin}{table}{end}\nafter\n"
    assert pages.with_tables(text, tmp_path) == expected


def test_the_figure_has_a_panel_for_each_network(tmp_path):
    rso_row, other, sgd_row = (tables.NOTEBOOK[i] for i in (0, 6, 9))
    for row in (rso_row, other, sgd_row):
        results.add(tmp_path / "notebook.csv", line_of(row, 0, 0.1, *[0.5] * 9, 0.9))
    shorter, alone = replace(rso_row, rounds=2), tables.NOTEBOOK[12]  # are left out
    results.add(tmp_path / "notebook.csv", line_of(shorter, 1, 0.1, 0.2, 0.3))
    results.add(tmp_path / "notebook.csv", line_of(alone, 0, 0.1, *[0.5] * 10))
    axes = pages.figure_of(tmp_path).axes
    assert [ax.get_title() for ax in axes] == ["one_conv", "two_conv"]
    assert [line.get_label() for line in axes[1].get_lines()] == ["RSO, batch 32", "SGD, batch 32"]
    images, accuracies = axes[0].get_lines()[0].get_data()
    assert list(images) == [100 * i for i in range(1, 11)] and list(accuracies) == [*[0.5] * 9, 0.9]


@pytest.mark.parametrize("name", tables.TABLES)
def test_what_was_measured_is_of_the_rows_as_they_are(name):
    rows = {row.name: row for row in tables.TABLES[name]}
    for line in results.read(pages.RESULTS / f"{name}.csv"):
        row = results.shortened(rows[line["row"]], int(line["rounds"]))
        expected = results.of_row(row, int(line["seed"]))
        assert {column: line[column] for column in expected} == expected


@pytest.mark.parametrize("page, names", [("README.md", ["notebook", "paper"]),
                                         ("RESULTS.md", ["notebook", "paper", "better", "ablations"])])
def test_pages_show_what_was_measured(page, names):
    (page,) = (path for path in pages.PAGES if path.name == page)
    text = page.read_text(encoding="utf-8")
    assert pages.with_tables(text) == text, "make the pages anew: python -m rso_numba.pages"
    assert [line.split()[2] for line in text.splitlines() if line.startswith("<!-- table ")] == names
