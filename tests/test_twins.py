"""The backends are twins: `plain.py`, `cpu/` and `cuda/` define the same functions, as their source shows."""

import ast
import importlib.util
from pathlib import Path

import pytest

KERNELS = Path(importlib.util.find_spec("rso_numba").origin).parent / "kernels"
ONLY_ONE_HAS = {"cpu": {"lanes", "memory", "tiles", "winograd"}, "cuda": {"device", "graphs"}}
twins = pytest.mark.parametrize("backend", ONLY_ONE_HAS)


def functions(path):
    """Return the functions that a file defines, in its order: name -> its arguments as text."""
    tree = ast.parse(path.read_text())
    return {node.name: ast.unparse(node.args) for node in tree.body if isinstance(node, ast.FunctionDef)}


def files(backend):
    return {path.stem: functions(path) for path in (KERNELS / backend).glob("*.py")}


PUBLIC = {name: arguments for name, arguments in functions(KERNELS / "plain.py").items()
          if not name.startswith("_")}


def test_every_backward_follows_its_forward():
    names = list(PUBLIC)
    for name in names:
        if name.endswith("_backward") and name.replace("_backward", "_forward") in PUBLIC:
            assert names[names.index(name) - 1] == name.replace("_backward", "_forward")


@twins
def test_a_backend_has_the_functions_of_plain_in_their_order(backend):
    tree = ast.parse((KERNELS / backend / "__init__.py").read_text())
    (listed,) = (ast.literal_eval(node.value) for node in tree.body
                 if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")
    assert listed == list(PUBLIC)
    imported = [name.name for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert sorted(imported) == sorted(PUBLIC)


@twins
def test_arguments_have_the_same_names_order_and_defaults(backend):
    found = {name: arguments for defined in files(backend).values() for name, arguments in defined.items()
             if name in PUBLIC}
    assert found == PUBLIC


@twins
def test_functions_stand_in_the_order_of_plain(backend):
    for file, defined in files(backend).items():
        own = [name for name in defined if name in PUBLIC]
        assert own == [name for name in PUBLIC if name in own], file


def test_twin_folders_have_the_same_files_with_the_same_functions():
    cpu, cuda = ({file: [name for name in defined if name in PUBLIC]
                  for file, defined in files(backend).items() if file not in only}
                 for backend, only in ONLY_ONE_HAS.items())
    assert cpu == cuda
