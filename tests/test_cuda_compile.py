"""Every CUDA kernel through the whole compiler, to PTX and to machine code; this needs no GPU.

What the simulator cannot see shows here: float64 arithmetic, sums that do not fit in registers, code that the
compiler refuses. `pytest -s` prints the registers a thread takes.
"""

import re

import pytest
from numba import config, float32, float64, int32, int64, types

if config.ENABLE_CUDASIM:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)
pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install -e '.[cuda]'")
core = pytest.importorskip("cuda.core", reason="needs cuda-core: pip install -e '.[cuda]'")
pytest.importorskip("cuda.bindings.nvjitlink", reason="needs nvJitLink: pip install -e '.[cuda]'")

from numba import cuda  # noqa: E402
from numba.cuda import dispatcher  # noqa: E402
from numba.cuda.cudadrv import nvvm  # noqa: E402

if not nvvm.is_available():
    pytest.skip("needs the CUDA toolkit: pip install -e '.[cuda]'", allow_module_level=True)

from rso_numba.kernels.cuda import (  # noqa: E402
    activations,
    convolution,
    delta,
    dense,
    device,
    fusion,
    last_layer,
    layout,
    norms,
    pools,
    softmax,
)

MODULES = activations, convolution, delta, dense, device, fusion, last_layer, layout, norms, pools, softmax
CAPABILITIES = [(9, 0), (7, 5)]  # H100, and the oldest that CUDA 13 compiles for
REGISTERS = 65536 // device.THREADS // 3  # with at most this many, three CUDA blocks run side by side


def _array(dimensions, dtype=float32):
    return types.Array(dtype, dimensions, "C")


BATCHNORM = [_array(4), _array(4), *[_array(1)] * 5, int64, _array(4)]
LOSS = [_array(3), _array(1, int64)]
PART = types.UniTuple(int64, 4)
RECORDS = _array(2, float64)
SIGNATURES = {
    "probe_kernel": [_array(1)],
    "pack_kernel": [_array(2), _array(3)],
    "unpack_kernel": [_array(3), _array(2)],
    "scale_shift_kernel": [_array(4), _array(1), _array(1), _array(4)],
    "dense_kernel": [_array(3), _array(2), _array(1), _array(3), PART, _array(3)],
    "dense_weight_kernel": [_array(3), _array(3), _array(3)],
    "statistics_kernel": [_array(4), int64, _array(3, float64)],
    "product_kernel": [_array(4), _array(4), _array(1), _array(1), int64, _array(3, float64)],
    "batchnorm_gradient_kernel": BATCHNORM,
    "add_kernel": [_array(1)] * 3,
    "relu_kernel": [_array(1), _array(1)],
    "relu_gradient_kernel": [_array(1), _array(1), _array(1)],
    "maxpool_kernel": [_array(5), _array(5)],
    "maxpool_gradient_kernel": [_array(5)] * 4,
    "avgpool_kernel": [_array(5), _array(5)],
    "avgpool_gradient_kernel": [_array(5), _array(5)],
    "globalmax_kernel": [_array(4), _array(3)],
    "globalmax_gradient_kernel": [_array(4), _array(3), _array(3), _array(4)],
    "globalmean_kernel": [_array(4), _array(3)],
    "globalmean_gradient_kernel": [_array(3), _array(4)],
    "cross_entropy_kernel": [*LOSS, _array(1)],
    "loss_sums_kernel": [*LOSS, _array(1, float64)],
    "cross_entropy_gradient_kernel": [*LOSS, _array(3)],
    "candidates_kernel": [int64, _array(1), int64, int64, float32, float32, int64, _array(1, int64),
                          _array(2), _array(2), RECORDS],
    "decide_kernel": [int64, _array(1), int64, float32, float32, int64, _array(1, float64), int64, RECORDS],
    "merge_kernel": [_array(4), _array(4)],
    "norm_kernel": [_array(3, float64), int64, int64, _array(1), _array(1), float32, _array(3), _array(2),
                    _array(2)],
    "follow_kernel": [_array(3), int64, int64, int64, float32, _array(2)],
    "epilogue_kernel": [_array(5), _array(2), _array(2), int64, int64, _array(5)],
    "add_epilogue_kernel": [_array(5), _array(2), _array(2), int64, int64, int64, _array(5), int64,
                            _array(5)],
    "add_to_channel_kernel": [_array(5), _array(2), _array(2), int64, int64, int64, _array(5)],
    "copy_channel_kernel": [_array(4), int64, int64, _array(4)],
    "replace_channel_kernel": [_array(3), int64, _array(3), _array(3)],
    "slot_kernel": [_array(3), _array(3), _array(1, int64), int64, _array(3), _array(3), _array(2, int32),
                    _array(1, int64), _array(1, int64)],
    "last_layer_kernel": [
        _array(2, int64), _array(1), types.Tuple((float32, int64)), _array(3), _array(3), _array(2, int32),
        _array(1, int64), _array(2, int64), _array(1), _array(1, int64), _array(1), RECORDS],
}
# these add or decide in float64
SUMS = {"statistics_kernel", "product_kernel", "loss_sums_kernel", "norm_kernel", "candidates_kernel",
        "decide_kernel", "last_layer_kernel"}


def _kernels():
    found = {}
    for module in MODULES:
        found.update({name: kernel for name, kernel in vars(module).items() if name.endswith("_kernel")
                      and not name.startswith("_")})
    signatures = dict(SIGNATURES)
    for key, kernel in convolution.CONV2D_KERNELS.items():
        found[f"conv2d_kernel{key}"] = kernel
        signatures[f"conv2d_kernel{key}"] = [_array(4), _array(4), _array(1), _array(4), PART, _array(4)]
    for size, kernel in convolution.CONV2D_WEIGHT_KERNELS.items():
        found[f"conv2d_weight_kernel({size})"] = kernel
        signatures[f"conv2d_weight_kernel({size})"] = [_array(5), _array(5), _array(5)]
    return found, signatures


KERNELS, ALL_SIGNATURES = _kernels()


def test_every_kernel_is_compiled_here():
    assert set(KERNELS) == set(ALL_SIGNATURES)


@pytest.mark.parametrize("capability", CAPABILITIES, ids="{0[0]}.{0[1]}".format)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name, capability, monkeypatch):
    class Device:
        compute_capability = capability

    # device functions are compiled for the current device, and there may be none
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: Device)
    signature = types.void(*ALL_SIGNATURES[name])
    ptx, _ = cuda.compile_ptx(KERNELS[name].py_func, signature, cc=capability)
    assert name in SUMS or ".f64" not in ptx, "a float64 literal or argument makes the arithmetic float64"
    options = core.LinkerOptions(arch=f"sm_{capability[0]}{capability[1]}", verbose=True)
    linker = core.Linker(core.ObjectCode.from_ptx(ptx.encode()), options=options)
    linker.link("cubin")
    log = linker.get_info_log()
    registers = int(re.search(r"[Uu]sed (\d+) registers", log)[1])
    spills = [int(size) for size in re.findall(r"(\d+) bytes spill", log)]
    stack, shared = (max(map(int, re.findall(pattern, log)), default=0)
                     for pattern in (r"(\d+) bytes stack", r"(\d+) bytes smem"))
    print(f"{name:29} {options.arch}  {registers:3} registers, {sum(spills)} bytes spilled, "
          f"{stack} bytes of stack, {shared} bytes of shared memory")
    assert len(spills) == 2 and not any(spills), log
    assert stack == 0, log
    assert registers <= (REGISTERS if name != "last_layer_kernel" else 65536 // last_layer.MANY_THREADS)
