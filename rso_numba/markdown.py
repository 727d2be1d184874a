"""Tables in Markdown, aligned, so that they can be read as plain text too."""


def table(rows, left=()):
    """Return rows of text as a table in Markdown.

    Parameters
    ----------
    rows : list of list of str
        The first has the names of the columns.
    left : sequence of int
        The columns, counted from 0, that begin at the left. The others end at the right, as numbers do.

    Returns
    -------
    str
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [f"{cell:{'<' if i in left else '>'}{width}}"
                 for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    dashes = ["-" * (width + 2) if i in left else "-" * (width + 1) + ":" for i, width in enumerate(widths)]
    lines.insert(1, f"|{'|'.join(dashes)}|")
    return "\n".join(lines)
