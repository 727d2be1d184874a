"""Damaged files of every kind: each is read or refused by its documented error, in little memory, at once.

Hypothesis thinks of the damage, the same at each run; it shrinks what it finds to the smallest example.
Without `derandomize` it goes on looking at each run.
"""

import gzip
import io
import json
import pickle
import struct
import time
import tracemalloc
import zipfile
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import small_network

from rso_numba import experiments, mnist, sweeps
from rso_numba.models import Network, build

MEMORY = 16 * 2**20  # bytes that reading one of these small files may take
SECONDS = 5  # of this process, in which it has to end


def examples(n):
    return settings(max_examples=n, deadline=None, derandomize=True, database=None, print_blob=False,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damage")


@contextmanager
def memory_below(most):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def read(load, path, content, start):
    """Return what `load` makes of a file of this content, or None for an error that begins with `start`."""
    path.write_bytes(content)
    begin = time.process_time()
    with memory_below(MEMORY):
        try:
            result = load(path)
        except ValueError as error:
            assert str(error).startswith(start.format(path)) and len(str(error)) < 1500
            result = None
    assert time.process_time() - begin < SECONDS
    return result


# ---- damage to bytes ----

STRANGE_NUMBERS = st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1])


def flip(draw, content):
    content[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))


def insert(draw, content):
    at = draw(st.integers(0, len(content)))
    content[at:at] = draw(st.binary(min_size=1, max_size=20))


def delete(draw, content):
    at = draw(st.integers(0, len(content) - 1))
    del content[at : at + draw(st.integers(1, 40))]


def cut(draw, content):
    del content[draw(st.integers(0, len(content))) :]


def repeat(draw, content):
    start, n = draw(st.integers(0, len(content))), draw(st.integers(1, 200))
    at = draw(st.integers(0, len(content)))
    content[at:at] = content[start : start + n]


def overwrite(draw, content):
    """Write a strange number over two or four bytes, near the beginning or the end, where the headers are."""
    form = draw(st.sampled_from(["<I", ">I", "<H", ">H"]))
    at = draw(st.integers(-400, 400)) % len(content)
    number = struct.pack(form, draw(STRANGE_NUMBERS) % 2 ** (8 * struct.calcsize(form)))
    content[at : at + len(number)] = number


@st.composite
def damaged(draw, contents):
    """One of some contents, damaged one to four times."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 4))):
        if content:
            draw(st.sampled_from([flip, insert, delete, cut, repeat, overwrite]))(draw, content)
    return bytes(content)


# ---- IDX ----


def idx(shape, body, magic=b"\0\0\x08"):
    return magic + bytes([len(shape)]) + struct.pack(f">{len(shape)}i", *shape) + body


IDX = [idx(shape, bytes(range(int(np.prod(shape))))) for shape in ((7,), (2, 3, 4), (1, 1, 5, 5))]
PACKED = [gzip.compress(content) for content in IDX]
SIZES = st.one_of(st.integers(-2**31, 2**31 - 1), st.sampled_from([-1, 0, 1, 2**15, 2**16, 2**31 - 1]))


def read_idx(folder, content):
    array = read(mnist.read_idx, folder / "images-idx3-ubyte.gz", content, "{}: ")
    assert array is None or (array.dtype == np.uint8 and array.size <= MEMORY)


@examples(500)
@given(content=damaged(IDX + PACKED + [IDX[0] + PACKED[1], PACKED[0] + PACKED[1]]))
def test_damaged_idx_files(folder, content):
    read_idx(folder, content)


@examples(300)
@given(content=damaged(IDX))
def test_damage_inside_of_gzip(folder, content):
    read_idx(folder, gzip.compress(content, 1))


@examples(300)
@given(shape=st.lists(SIZES, max_size=10), body=st.binary(max_size=30), pack=st.booleans())
def test_idx_headers_that_lie(folder, shape, body, pack):
    content = idx(shape, body)
    read_idx(folder, gzip.compress(content, 1) if pack else content)


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, mnist.MAX_BYTES), (2**31 - 1,)])
def test_a_small_file_that_grows_to_gigabytes_is_refused(folder, shape):
    path = folder / "bomb.gz"
    path.write_bytes(gzip.compress(idx(shape, b"")) + gzip.compress(bytes(2**24)) * 128)  # 2 GB
    assert path.stat().st_size < 3 * 2**20
    with memory_below(200e6), pytest.raises(ValueError, match="bomb.gz: .*(more bytes|over max_bytes)"):
        mnist.read_idx(path)


# ---- networks ----


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({str(self.path)!r})",)


def members_of(arrays):
    """Return the .npy files of arrays, by name; arrays of objects are pickled."""
    members = {}
    for name, array in arrays.items():
        file = io.BytesIO()
        np.save(file, array, allow_pickle=True)
        members[f"{name}.npy"] = file.getvalue()
    return members


def zipped(members, compression=zipfile.ZIP_STORED):
    """Return the zip file of (name, content) pairs."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


@pytest.fixture(scope="module")
def networks(folder):
    """The arrays of saved networks, those with traps in them too, and where the traps make a folder."""
    states, trap = [], folder / "unpickled"
    for network in (build("one_conv", (1, 4, 4), rng=0), small_network("projection")):
        network.save(folder / "network.npz")
        with np.load(folder / "network.npz") as arrays:
            states.append(dict(arrays))
    traps = np.array([Trap(trap)], object)
    states += [states[0] | {name: traps} for name in ("description", "dense1.bias")]
    return states, trap


def load(folder, content, trap):
    start = "{} is damaged or is not a network saved by Network.save ("
    network = read(Network.load, folder / "network.npz", content, start)
    assert not trap.exists()
    if network is not None and np.prod(network.image_shape) < 10**5:
        with suppress(FloatingPointError), np.errstate(all="ignore"):  # of weights that are huge
            network.predict(np.zeros((1, *network.image_shape), np.float32), backend="numpy")


def test_the_trap_works(folder, networks):
    _, trap = networks
    path = folder / "trap.npz"
    path.write_bytes(zipped(members_of({"a": np.array([Trap(trap)], object)}).items()))
    with np.load(path, allow_pickle=True) as arrays:
        assert arrays["a"] is not None and trap.exists()
    trap.rmdir()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@examples(500)
@given(data=st.data())
def test_damaged_networks(folder, networks, data):
    states, trap = networks
    contents = [zipped(members_of(state).items()) for state in states]
    load(folder, data.draw(damaged(contents + [pickle.dumps(Trap(trap))])), trap)


# flags, method and sizes stand at other places in the header before a member and in the directory at the end
PLACES = {b"PK\3\4": {"flags": 6, "method": 8, "stored": 18, "size": 22, "name": 26},
          b"PK\1\2": {"flags": 8, "method": 10, "stored": 20, "size": 24, "name": 28, "offset": 42},
          b"PK\5\6": {"entries": 8, "all": 10, "size": 12, "offset": 16, "comment": 20}}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@examples(300)
@given(data=st.data())
def test_zip_files_that_lie(folder, networks, data):
    draw, (states, trap) = data.draw, networks
    members = list(members_of(draw(st.sampled_from(states))).items())
    for _ in range(draw(st.integers(0, 3))):
        i, j = (draw(st.integers(0, len(members) - 1)) for _ in range(2))
        (name, content), (other, _) = members[i], members[j]
        members[i] = draw(st.sampled_from([(other, content), ("../" + name, content), (name[:-4], content),
                                           ("x", content), (name, b""), (name, pickle.dumps(Trap(trap)))]))
        if draw(st.booleans()):
            members[i], members[j] = members[j], members[i]
    methods = [zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2,
               zipfile.ZIP_LZMA]
    content = bytearray(zipped(members, draw(st.sampled_from(methods))))
    for _ in range(draw(st.integers(0, 3))):
        signature = draw(st.sampled_from(sorted(PLACES)))
        starts = [i for i in range(len(content)) if content.startswith(signature, i)]
        at = draw(st.sampled_from(starts)) + draw(st.sampled_from(sorted(PLACES[signature].values())))
        form = draw(st.sampled_from(["<H", "<I"]))
        number = draw(STRANGE_NUMBERS) % 2 ** (8 * struct.calcsize(form))
        content[at : at + struct.calcsize(form)] = struct.pack(form, number)
    load(folder, bytes(content), trap)


DTYPES = ["<f4", ">f4", "<f8", "|O", "O", "<c8", "|V4", "|V2147483647", "|S0", "<U1", "<M8[s]", "|b1", "x"]
SHAPES = st.one_of(
    st.lists(SIZES, max_size=4).map(tuple), st.lists(st.integers(0, 5), max_size=4).map(tuple),
    st.sampled_from([(10**40,), (2.0,), (True,), (None,), "", 3, ((1,),), (0,) * 70]))


@pytest.mark.filterwarnings("ignore")  # NumPy's of strange headers
@examples(300)
@given(data=st.data())
def test_headers_of_arrays_that_lie(folder, networks, data):
    draw, (states, trap) = data.draw, networks
    members = members_of(draw(st.sampled_from(states)))
    name = draw(st.sampled_from(sorted(members)))
    header = {"descr": draw(st.sampled_from(DTYPES)), "fortran_order": draw(st.booleans())}
    header = bytearray(repr(header | {"shape": draw(SHAPES)}).encode() + b"\n")
    if draw(st.booleans()):
        draw(st.sampled_from([flip, insert, delete, cut]))(draw, header)
    version = draw(st.sampled_from([b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\xff\xff"]))
    length = draw(st.sampled_from([len(header), len(header), 0, 0xFFFF]))
    content = b"\x93NUMPY" + version + struct.pack("<H", length) + header
    members[name] = content + draw(st.sampled_from([b"", members[name][128:], pickle.dumps(Trap(trap))]))
    load(folder, zipped(members.items()), trap)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
              st.sampled_from([10**9, 10**40]), st.builds(lambda: {"kind": "Residual", "body": []})),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5)


def places(value):
    """Return the container and the key of everything in a JSON value."""
    found = []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        found.append((value, key))
        if isinstance(inner, (dict, list)):
            found += places(inner)
    return found


@examples(300)
@given(data=st.data())
def test_descriptions_that_lie(folder, networks, data):
    draw, (states, trap) = data.draw, networks
    state = draw(st.sampled_from(states[:2]))
    text = str(state["description"])
    if draw(st.booleans()):
        description = json.loads(text)
        for _ in range(draw(st.integers(1, 2))):
            container, key = draw(st.sampled_from(places(description)))
            container[key] = draw(JSON)
        text = json.dumps(description)
    else:
        text = draw(damaged([text.encode()])).decode("utf-8", "replace").replace("\0", " ")
    load(folder, zipped(members_of(state | {"description": np.array(text)}).items()), trap)


# ---- sweeps ----


@examples(300)
@given(data=st.data())
def test_damaged_sweeps(folder, data):
    path = folder / "sweep.csv"
    path.unlink(missing_ok=True)
    row = dict.fromkeys(sweeps.COLUMNS, 1) | {"data": "né", "rounds": 2}
    sweeps._add(path, [row | {"round": i} for i in range(3)])
    content = data.draw(damaged([path.read_bytes()]))
    rows = read(experiments.read_sweep, path, content, "{} is no file of a sweep (")
    assert rows is None or all(isinstance(row, dict) for row in rows)
