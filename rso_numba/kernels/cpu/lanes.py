"""One number for each of LANES images, held in a vector register.

The compiler turns a simple loop over images into vector instructions by itself. It does not keep the sums
of a convolution in registers across the loops over channels and taps, and that decides its speed. These
functions let a kernel say so: a value of type `Lanes` holds LANES numbers, and 16 float32 are one register of
AVX-512 or two of AVX2. A position names all axes of an array but the last, which must have LANES elements.
"""

import numba
import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils, errors
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, models, register_model

LANES = 16
# Whether 16 values of type Lanes fit into the registers: AVX-512 has 32 of 16 float32, AVX2 16 of 8, NEON 32
# of 4. (NUMBA_CPU_FEATURES says what to compile for, if not for this machine.)
WIDE = "+avx512f" in (get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES)


class Lanes(types.Type):
    """The Numba type of LANES numbers."""

    def __init__(self, dtype):
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    """A Lanes is an LLVM vector."""

    def __init__(self, manager, lanes):
        super().__init__(manager, lanes, ir.VectorType(manager.lookup(lanes.dtype).get_value_type(), LANES))


def _pointer(context, builder, array_type, array, position, lanes=True):
    """Return where array[position] begins: LANES numbers, which is known here and not read, or one number."""
    if array_type.layout != "C":
        raise errors.NumbaTypeError(f"an array in memory order is expected, not {array_type}; copy it first")
    array = cgutils.create_struct_proxy(array_type)(context, builder, array)
    indices, shape = cgutils.unpack_tuple(builder, position), cgutils.unpack_tuple(builder, array.shape)
    place, step = ir.Constant(ir.IntType(64), 0), ir.Constant(ir.IntType(64), LANES if lanes else 1)
    for index, length in zip(reversed(indices), reversed(shape[: len(indices)]), strict=True):
        place = builder.add(place, builder.mul(index, step))
        step = builder.mul(step, length)
    pointer = builder.gep(array.data, [place])
    if lanes:
        return builder.bitcast(pointer, context.get_value_type(Lanes(array_type.dtype)).as_pointer())
    return pointer


def _broadcast(builder, scalar, vector_type):
    undefined = ir.Constant(vector_type, ir.Undefined)
    vector = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    first = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(vector, undefined, first)


@intrinsic
def load(typing_context, array, position):
    """Return array[position], LANES numbers."""

    def generate(context, builder, signature, arguments):
        value = builder.load(_pointer(context, builder, signature.args[0], *arguments))
        value.align = array.dtype.bitwidth // 8  # fastest at multiples of 64 bytes, but correct anywhere
        return value

    return Lanes(array.dtype)(array, position), generate


@intrinsic
def store(typing_context, array, position, value):
    """Write array[position] = value, LANES numbers."""

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, position, value), generate


@intrinsic
def store_nontemporal(typing_context, array, position, value):
    """Write array[position] = value past the caches: for what nobody reads soon, at multiples of 64 bytes.

    An ordinary write to memory that is not in the cache reads it first. `store_fence` must follow.
    """

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature.args[0], *arguments[:2])
        write = builder.store(arguments[2], pointer, align=64)
        write.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(array, position, value), generate


@intrinsic
def store_fence(typing_context):
    """Wait until others can see what this thread has written past the caches."""

    def generate(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def prefetch(typing_context, array, position):
    """Ask for the LANES numbers array[position], so that they are in the cache when they are loaded."""

    def generate(context, builder, signature, arguments):
        integer, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        pointer = builder.bitcast(_pointer(context, builder, signature.args[0], *arguments), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, integer, integer, integer])
        instruction = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        to_read, into_second_level, data = (ir.Constant(integer, i) for i in (0, 2, 1))
        builder.call(instruction, [pointer, to_read, into_second_level, data])
        return context.get_dummy_value()

    return types.void(array, position), generate


@intrinsic
def broadcast(typing_context, number):
    """Return LANES copies of a number."""

    def generate(context, builder, signature, arguments):
        return _broadcast(builder, arguments[0], context.get_value_type(signature.return_type))

    return Lanes(number)(number), generate


@intrinsic
def number(typing_context, array, position):
    """Return array[position], one number.

    No index counts from the end. Numba looks at each of its own for that, and neighbours then need an address
    each, where one would do.
    """

    def generate(context, builder, signature, arguments):
        return builder.load(_pointer(context, builder, signature.args[0], *arguments, lanes=False))

    return array.dtype(array, position), generate


@intrinsic
def first_lanes(typing_context, n, one):
    """Return `one` in the first n lanes, those of images, and 0 in the others."""

    def generate(context, builder, signature, arguments):
        numbers = ir.Constant(ir.VectorType(ir.IntType(64), LANES), list(range(LANES)))
        count = _broadcast(builder, context.cast(builder, arguments[0], n, types.int64), numbers.type)
        ones = _broadcast(builder, arguments[1], context.get_value_type(signature.return_type))
        return builder.select(builder.icmp_signed("<", numbers, count), ones, ir.Constant(ones.type, None))

    return Lanes(one)(n, one), generate


def _as_lanes(context, builder, number, number_type, lanes_type):
    if isinstance(number_type, Lanes):
        return number
    number = context.cast(builder, number, number_type, lanes_type.dtype)
    return _broadcast(builder, number, context.get_value_type(lanes_type))


@intrinsic
def multiply(typing_context, a, x):
    """Return a * x, where a is a number or a Lanes, and x is a Lanes."""

    def generate(context, builder, signature, arguments):
        a_value = _as_lanes(context, builder, arguments[0], a, x)
        return builder.fmul(a_value, arguments[1], flags=("contract",))

    return x(a, x), generate


@intrinsic
def multiply_add(typing_context, a, x, total):
    """Return a * x + total in one instruction, where a is a number or a Lanes, and x and total are Lanes."""

    def generate(context, builder, signature, arguments):
        a_value, x_value, total_value = arguments
        a_value = _as_lanes(context, builder, a_value, a, x)
        product = builder.fmul(a_value, x_value, flags=("contract",))
        return builder.fadd(product, total_value, flags=("contract",))

    return total(a, x, total), generate


@intrinsic
def add(typing_context, a, b):
    """Return a + b, two Lanes."""

    def generate(context, builder, signature, arguments):
        return builder.fadd(*arguments, flags=("contract",))

    return a(a, b), generate


@intrinsic
def maximum(typing_context, a, b):
    """Return the larger of two Lanes, number by number: `formulas.maximum`."""

    def generate(context, builder, signature, arguments):
        a_value, b_value = arguments
        is_first = builder.or_(builder.fcmp_ordered(">=", a_value, b_value),
                               builder.fcmp_unordered("uno", a_value, a_value))
        return builder.select(is_first, a_value, b_value)

    return a(a, b), generate


@intrinsic
def relu_gradient(typing_context, y, dy):
    """Return the numbers of dy where those of y are positive, else 0: `formulas.relu_gradient`."""

    def generate(context, builder, signature, arguments):
        none = ir.Constant(arguments[0].type, None)
        return builder.select(builder.fcmp_ordered(">", arguments[0], none), arguments[1], none)

    return dy(y, dy), generate


@intrinsic
def where_equal(typing_context, a, b, if_equal, otherwise):
    """Return the numbers of if_equal where a == b, else those of otherwise, all of them Lanes."""

    def generate(context, builder, signature, arguments):
        is_equal = builder.fcmp_ordered("==", arguments[0], arguments[1])
        return builder.select(is_equal, arguments[2], arguments[3])

    return a(a, b, if_equal, otherwise), generate


@intrinsic
def sum_lanes(typing_context, value):
    """Return the sum of the LANES numbers."""

    def generate(context, builder, signature, arguments):
        places = [ir.Constant(ir.IntType(32), lane) for lane in range(LANES)]
        numbers = [builder.extract_element(arguments[0], place) for place in places]
        while len(numbers) > 1:  # add neighbours, then the sums of neighbours: log2(LANES) steps
            numbers = [builder.fadd(a, b) for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
        return numbers[0]

    return value.dtype(value), generate


if numba.config.DISABLE_JIT:  # the same in plain Python, on arrays of LANES numbers

    def load(array, position):  # noqa: F811
        """Return array[position], LANES numbers."""
        return array[position].copy()

    def store(array, position, value):  # noqa: F811
        """Write array[position] = value, LANES numbers."""
        array[position] = value

    store_nontemporal = store

    def store_fence():  # noqa: F811
        """Nothing is written past the caches."""

    def prefetch(array, position):  # noqa: F811
        """There is no need to ask."""

    def broadcast(number):  # noqa: F811
        """Return LANES copies of a number."""
        return np.full(LANES, number)

    def number(array, position):  # noqa: F811
        """Return array[position], one number."""
        return array[position]

    def first_lanes(n, one):  # noqa: F811
        """Return `one` in the first n lanes and 0 in the others."""
        return np.where(np.arange(LANES) < n, one, 0 * one)

    def multiply(a, x):  # noqa: F811
        """Return a * x."""
        return x.dtype.type(a) * x if np.ndim(a) == 0 else a * x

    def multiply_add(a, x, total):  # noqa: F811
        """Return a * x + total."""
        return multiply(a, x) + total

    def add(a, b):  # noqa: F811
        """Return a + b."""
        return a + b

    def maximum(a, b):  # noqa: F811
        """Return the larger of two Lanes, number by number."""
        return np.where((a >= b) | (a != a), a, b)

    def relu_gradient(y, dy):  # noqa: F811
        """Return the numbers of dy where those of y are positive, else 0."""
        return np.where(y > 0, dy, y.dtype.type(0))

    def where_equal(a, b, if_equal, otherwise):  # noqa: F811
        """Return the numbers of if_equal where a == b, else those of otherwise."""
        return np.where(a == b, if_equal, otherwise)

    def sum_lanes(value):  # noqa: F811
        """Return the sum of the LANES numbers."""
        return value.sum()
