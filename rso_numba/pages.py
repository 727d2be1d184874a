"""The tables of results in Markdown, and the pages that they stand on: README.md and tutorials/RESULTS.md.

`python -m rso_numba.pages` writes them there anew from the CSV files in data/results, and draws the figure.
"""

import re
from pathlib import Path
from statistics import fmean

import numpy as np

from . import markdown, plots, results, tables
from .ablations import MODELS, SETTINGS
from .files import written_beside

TOP = Path(__file__).parents[1]
RESULTS = TOP / "data/results"
PAGES = TOP / "README.md", TOP / "tutorials/RESULTS.md"


def render(name, lines):
    """Return the lines of a table of results in Markdown, the mean and the range of all seeds for each row.

    Parameters
    ----------
    name : str
        Of the table.
    lines : list of dict
        See `results.read`. Rows without a line are left out.

    Returns
    -------
    str
    """
    return _ablations(lines) if name == "ablations" else _published_table(tables.TABLES[name], lines)


def _published_table(rows, lines):
    cells = [["row", "rounds", "seeds", "test accuracy (min..max)", "published accuracy",
              "best over rounds", "test loss", "published loss", "seconds", "published seconds",
              "images forwarded", "weight visits", "weights changed"]]
    for row in rows:
        own = [line for line in lines if line["row"] == row.name]
        for rounds in sorted({int(line["rounds"]) for line in own}):
            cells.append(_cells(row, rounds, [line for line in own if line["rounds"] == str(rounds)]))
    return markdown.table(cells, left=(0,))


def _cells(row, rounds, lines):
    made_for = lines[0]["schedule"]
    return [row.name, str(rounds) if made_for == str(rounds) else f"{rounds} of {made_for}", str(len(lines)),
            _spread(lines), _published(row, rounds, "accuracy", ".4f"),
            _mean(lines, "best_test_accuracy", ".4f"),
            _mean(lines, "test_loss", ".3f"), _published(row, rounds, "loss", ".3f"),
            _mean(lines, "seconds", ",.1f"), _published(row, rounds, "seconds", ",.0f"),
            *(_mean(lines, name, ",.0f") for name in ("images_forwarded", "weights_visited", "accepted"))]


def _published(row, rounds, figure, form):
    """Return a published figure, with its rounds if these are known to be others; "-" if there is none."""
    for published in sorted(row.published, key=lambda published: published.rounds != rounds):
        value = getattr(published, figure)
        if value is not None:
            after = "" if published.rounds in (rounds, None) else f" (round {published.rounds})"
            return f"{value:{form}}{after}"
    return "-"


def _ablations(lines):
    """Return one line a setting, with all models side by side and what follows."""
    cells = [["setting", *(f"{model}: {what}" for model in MODELS for what in
                           ("test accuracy (min..max)", "best over rounds", "seconds")), "what follows"]]
    for setting in SETTINGS:
        own = {model: [line for line in lines if line["row"] == setting.row(model).name] for model in MODELS}
        if any(own.values()):
            cells.append([setting.name, *(cell for model in MODELS for cell in _measured(own[model])),
                          setting.finding or "-"])
    return markdown.table(cells, left=(0, len(cells[0]) - 1))


def _measured(lines):
    if not lines:
        return ["-"] * 3
    return [_spread(lines), _mean(lines, "best_test_accuracy", ".4f"), _mean(lines, "seconds", ",.1f")]


def _spread(lines):
    accuracies = [float(line["final_test_accuracy"]) for line in lines]
    if len(lines) == 1:
        return f"{accuracies[0]:.4f} (1 seed)"
    return f"{fmean(accuracies):.4f} ({min(accuracies):.4f}..{max(accuracies):.4f})"


def _mean(lines, column, form):
    return f"{fmean(float(line[column]) for line in lines):{form}}"


def with_tables(text, folder=RESULTS):
    """Return the text of a page with its tables made anew.

    Parameters
    ----------
    text : str
        A table stands between two lines, `<!-- table NAME -->` and `<!-- end -->`.
    folder : path
        Of the CSV files.
    """
    def made(match):
        table = render(match[1], results.read(Path(folder, f"{match[1]}.csv")))
        return f"<!-- table {match[1]} -->\n{table}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)


def figure_of(folder=RESULTS):
    """Return a figure of the notebook's table, a panel for each of its networks that RSO has trained."""
    lines, panels = results.read(Path(folder, "notebook.csv")), {}
    searched = {line["model"] for line in lines if line["solver"] == "rso"}
    for row in tables.NOTEBOOK:
        own = [line for line in lines if (line["row"], line["rounds"]) == (row.name, str(row.rounds))]
        if own and row.model in searched:
            accuracies = [[float(a) for a in line["test_accuracy_by_round"].split()[1:]] for line in own]
            images = int(own[0]["images_forwarded"]) / row.rounds * np.arange(1, row.rounds + 1)
            label = f"{row.solver.upper()}, batch {row.batch_size}"
            panels.setdefault(row.model, {})[label] = images, accuracies
    return plots.by_images(panels)


if __name__ == "__main__":
    for page in PAGES:
        text = with_tables(page.read_text(encoding="utf-8"))
        with written_beside(page) as beside:
            beside.write_text(text, encoding="utf-8")
    plots.save(figure_of(), TOP / "tutorials/images/results.png", dpi=62)
