"""What the texts point to exists: links, headings, and the files that the glossary names."""

import json
import re
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
FOLDERS = "data", "rso_numba", "tutorials"
PAGES = sorted([*TOP.glob("*.md"), *(path for folder in FOLDERS for path in (TOP / folder).rglob("*.md"))])
NOTEBOOKS = sorted(path for path in (TOP / "tutorials").rglob("*.ipynb")
                   if ".ipynb_checkpoints" not in path.parts)


def text_of(path):
    """Return the text of a page, or of all cells of a notebook that hold text."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def anchor(heading):
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda path: path.relative_to(TOP).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", text_of(page), flags=re.DOTALL)  # code may look like a link
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link):  # the network is not asked
            continue
        target, _, heading = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{link} does not exist"
        if heading:
            headings = re.findall(r"^#+ (.*)$", text_of(path), re.MULTILINE)
            assert heading in map(anchor, headings), f"{link}: no such heading"


def test_the_glossary_names_files_that_exist():
    folder = TOP / "rso_numba"
    rows = [line.split(" | ") for line in (folder / "GLOSSARY.md").read_text(encoding="utf-8").splitlines()
            if line.startswith("| ") and not line.startswith("| word")]
    assert len(rows) > 50
    for word, meaning, where, *_ in rows:
        named = re.findall(r"`([\w/]+(?:\.py|/))`", where)
        assert named and meaning, word
        for name in named:
            assert (folder / name).exists() or (TOP / name).exists(), f"{word}: {name} does not exist"


def test_the_glossary_names_each_word_once():
    words = re.findall(r"^\| ([^|]+?) \|", (TOP / "rso_numba/GLOSSARY.md").read_text(encoding="utf-8"), re.M)
    words = [word for line in words for word in line.split(", ") if line != "word"]
    assert len(set(words)) == len(words)
