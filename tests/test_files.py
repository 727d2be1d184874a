"""Files of networks: what is refused, why, and in little memory. Damage at random is in test_damage.py."""

import io
import json
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from networks import small_network

from rso_numba.models import Network, build

REFUSED = r"network\.npz is damaged or is not a network saved by Network\.save \("


def saved(tmp_path, network):
    """Return the path of a saved network, and its arrays."""
    path = tmp_path / "network.npz"
    network.save(path)
    with np.load(path) as arrays:
        return path, dict(arrays)


def edit(path, arrays, change):
    """Write the file anew with its description changed: `change` is a function of the dict."""
    description = json.loads(str(arrays["description"]))
    change(description)
    np.savez(path, **(arrays | {"description": np.array(json.dumps(description))}))


def patch_headers(path, signature, offset, value):
    """Write a 16-bit `value` at `offset` of every header of a zip file that begins with `signature`."""
    content, start = bytearray(path.read_bytes()), 0
    while (start := content.find(signature, start)) >= 0:
        struct.pack_into("<H", content, start + offset, value)
        start += len(signature)
    path.write_bytes(content)


# ---- what is refused, and why ----


@pytest.mark.parametrize("format_", [99, "1", None])
def test_another_format_is_refused(tmp_path, format_):
    path, arrays = saved(tmp_path, build("one_conv", (1, 4, 4), rng=0))
    edit(path, arrays, lambda description: description.update(format=format_))
    with pytest.raises(ValueError, match=REFUSED + f"ValueError: its format is {format_!r}; .* reads 1"):
        Network.load(path)


def test_a_file_is_not_decrypted_and_not_decompressed(tmp_path):
    path, arrays = saved(tmp_path, build("one_conv", (1, 4, 4), rng=0))
    np.savez_compressed(path, **arrays)
    with pytest.raises(ValueError, match=REFUSED + "ValueError: its arrays are compressed"):
        Network.load(path)
    np.savez(path, **arrays)
    for signature, offset in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        patch_headers(path, signature, offset, 0x41)  # strong encryption
    with pytest.raises(ValueError, match=REFUSED):
        Network.load(path)


@pytest.mark.parametrize("shape", ["(40000, 10)", "(3, 10)", "(-4, -10)"])
def test_the_header_of_an_array_says_how_long_it_is(tmp_path, shape):
    path, arrays = saved(tmp_path, build("one_conv", (1, 4, 4), rng=0))
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            file = io.BytesIO()
            np.save(file, array)
            if name == "dense1.weight":
                header = str({"descr": "<f4", "fortran_order": False, "shape": eval(shape)})
                file = io.BytesIO(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode())
                file.seek(0, io.SEEK_END)
                file.write(array.tobytes())
            archive.writestr(f"{name}.npy", file.getvalue())
    with pytest.raises(ValueError, match=REFUSED):
        Network.load(path)


@pytest.mark.parametrize("change", [
    lambda description: description["layers"][1].update(filters=300_000),
    lambda description: description["layers"][3]["body"][1].update(filters=300_000),
    lambda description: description.update(image_shape=[300_000, 6, 5]),
    lambda description: description["layers"].extend([{"kind": "Dense", "units": 300_000}] * 2),
    lambda description: description["layers"].extend([{"kind": "Standardize"}] * 5_000),
])
def test_memory_is_taken_for_what_the_file_holds(tmp_path, change):
    path, arrays = saved(tmp_path, small_network("projection"))
    edit(path, arrays, change)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=REFUSED):
            Network.load(path)
        assert tracemalloc.get_traced_memory()[1] < 50 * path.stat().st_size + 2**20
    finally:
        tracemalloc.stop()


def nested(depth):
    start = '{"format": 1, "name": "", "image_shape": [1, 1, 1], "n_classes": 1, "layers": ['
    residual = '{"kind": "Residual", "body": ['
    return np.array(start + residual * depth + '{"kind": "ReLU"}' + "]}" * (depth + 1))


@pytest.mark.parametrize("depth", [200, 3000, 100_000])
def test_a_description_may_be_as_deep_as_it_likes(tmp_path, depth):
    path, arrays = saved(tmp_path, build("one_conv", (1, 4, 4), rng=0))
    np.savez(path, **(arrays | {"description": nested(depth)}))
    with pytest.raises(ValueError, match=REFUSED):
        Network.load(path)


@pytest.mark.parametrize("layer", [
    {"kind": "BatchNorm", "epsilon": -1}, {"kind": "BatchNorm", "epsilon": "x"},
    {"kind": "Standardize", "scaling": "sideways"}, {"kind": "Conv2D", "filters": 2.0},
    {"kind": "Conv2D", "filters": True}, {"kind": ["ReLU"]}, {"kind": "Residual", "body": 5}, "ReLU",
])
def test_a_layer_that_cannot_be_is_refused(tmp_path, layer):
    path, arrays = saved(tmp_path, build("one_conv", (1, 4, 4), rng=0))
    edit(path, arrays, lambda description: description["layers"].insert(1, layer))
    with pytest.raises(ValueError, match=REFUSED):
        Network.load(path)


def test_what_is_no_fault_of_the_file_is_no_damage(tmp_path):
    with pytest.raises(OSError, match="network") as raised:  # a folder; Windows calls it a lack of permission
        (tmp_path / "network.npz").mkdir()
        Network.load(tmp_path / "network.npz")
    assert not isinstance(raised.value, ValueError)
