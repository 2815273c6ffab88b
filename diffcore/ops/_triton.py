"""What the Triton kernels share: elementwise functions, noise, matrix products, launches.

Imported inside the ops' bodies only: importing Triton is slow. Functions under ``@triton.jit`` are
the same functions as ``csrc/cpu/activations.h`` and ``philox.h``, written out instead of taken from
Triton's own ``tl.exp``, ``tl.log`` and ``tl.sin``: those are the GPU's approximations
(``lg2.approx`` alone would move a normal by 1e-3), differ between vendors, and the ones of
libdevice don't run in the interpreter. Triton contracts ``a * b + c`` to one rounding where it
likes and its interpreter never does, so nothing here may need either.

Tuning is by rules on shapes, in each op's file, and not by ``triton.autotune``: that would time
kernels within the first call of every shape, which waits for the device and can't be captured in a
CUDA graph.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

#: What operands of matrix products are kept in, by precision.
OPERAND_DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


#: Inputs and outputs of a weight that one program transposes.
TRANSPOSED_BLOCK = 64

#: Numbers that one program rounds.
ROUNDED_BLOCK = 1024


# -- launches --------------------------------------------------------------------------------------


def launch(kernel: Any, programs: int | tuple[int, ...], *args: Any, **settings: Any) -> None:
    """Runs `programs` programs of a kernel on the device of its first argument.

    On that device's current stream, which Triton asks torch for.
    """
    grid = (programs,) if isinstance(programs, int) else programs
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **settings)


def on_nvidia() -> bool:
    """Whether kernels are compiled, and for NVIDIA: AMD has other warps and registers."""
    return not knobs.runtime.interpret and driver.active.get_current_target().backend == "cuda"


def all_registers() -> dict[str, int]:
    """Settings of a launch with one block a processor, which may have all the registers there are.

    NVIDIA's assembler would spill a few to fit further blocks beside it.
    """
    return {"maxnreg": 255} if on_nvidia() else {}


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter programs run one after the other: 1."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def seed_arguments(seed: Tensor | None) -> tuple[int, Tensor | None]:
    """(value, tensor on the device) for `load_seed`. A seed on the device is read by the kernel.

    Nothing waits for it here, and a captured CUDA graph draws anew at every replay.
    """
    if seed is None:
        return 0, None
    return (int(seed), None) if seed.is_cpu else (0, seed)


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@triton.jit
def pick(tensors, index, FIRST: tl.constexpr, STRIDE: tl.constexpr, COUNT: tl.constexpr):
    """tensors[FIRST + index * STRIDE], one of COUNT, by an index that only the program knows."""
    picked = tensors[FIRST]
    for i in tl.static_range(1, COUNT):
        picked = tl.where(index == i, tensors[FIRST + i * STRIDE], picked)
    return picked


# -- matrix products -------------------------------------------------------------------------------


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """float32 x as `dot` takes it.

    TF32 has the upper 10 of float32's 23 bits of mantissa. Tensor cores leave out the lower ones by
    themselves, which takes every number closer to zero, by up to 2^-10.
    """
    if PRECISION == "float16":
        return x.to(tl.float16)
    elif PRECISION == "bfloat16":
        return x.to(tl.bfloat16)
    else:
        return x


@triton.jit
def rounded_operand(x, PRECISION: tl.constexpr):
    """The same, but TF32 too is rounded to nearest, with ties away from zero, as the CUDA kernels do.

    For what is stored once and multiplied many times: three instructions a number are more than the
    products that would otherwise do with one. Below 2^-100 the lower bits may be left out after all.
    """
    if PRECISION == "tf32":
        # Half a unit of the last bit that stays is 2^-11 of x without its mantissa. Of NaN that is an
        # infinity: as numbers they add up to NaN, where bits could become those of another number.
        power = (x.to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)
        up = x + power * 0.00048828125
        return (up.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    else:
        return operand(x, PRECISION)


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """sums + a b, with float32 sums, of what `operand` gives."""
    if PRECISION == "float32":
        return tl.dot(a, b, sums, input_precision="ieee")
    elif PRECISION == "tf32":
        return tl.dot(a, b, sums, input_precision="tf32")
    else:
        return tl.dot(a, b, sums)


def outputs_adjoin(precision: str) -> bool:
    """Whether forward products take weights as ``[inputs, outputs]``, not the way PyTorch keeps them.

    Without tensor cores each lane of a warp reads from shared memory the weights of a few outputs for
    the same inputs. Where the inputs are contiguous, as in ``[outputs, inputs]``, all 32 lanes want
    the same banks, for Triton swizzles only what tensor cores read. Those have no such wish. Kernels
    say ``PRECISION == "float32"``.
    """
    return precision == "float32"


def transposed(weights: list[Tensor], columns: int) -> list[Tensor]:
    """Copies ``[inputs, padded outputs]`` of weights ``[outputs, inputs]``, made in one launch.

    Padded with zeros to whole blocks of `columns`, so that reads of blocks need no mask. Nor are the
    inputs contiguous then where there is but one output.
    """
    outputs, inputs = zip(*(w.shape for w in weights), strict=True)
    padded = tuple(round_up(o, columns) for o in outputs)
    sizes = [p * i for p, i in zip(padded, inputs, strict=True)]
    offsets = tuple(itertools.accumulate(sizes, initial=0))
    copies = weights[0].new_empty(offsets[-1])
    blocks = [
        triton.cdiv(p, TRANSPOSED_BLOCK) * triton.cdiv(i, TRANSPOSED_BLOCK)
        for p, i in zip(padded, inputs, strict=True)
    ]
    launch(
        transpose_kernel,
        (max(blocks), len(weights)),
        copies,
        tuple(weights),
        outputs,
        inputs,
        padded,
        offsets,
        TRANSPOSED_BLOCK,
    )
    return [
        copies.narrow(0, first, size).view(i, p)
        for first, size, i, p in zip(offsets, sizes, inputs, padded, strict=False)
    ]


@triton.jit
def transpose_kernel(
    transposed,
    weights,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    PADDED: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of one weight, ``[outputs, inputs]``, to its place in `transposed`."""
    block, which = tl.program_id(0), tl.program_id(1)
    COUNT: tl.constexpr = len(OUTPUTS)
    weight = pick(weights, which, 0, 1, COUNT)
    outputs, inputs = pick(OUTPUTS, which, 0, 1, COUNT), pick(INPUTS, which, 0, 1, COUNT)
    padded, offset = pick(PADDED, which, 0, 1, COUNT), pick(OFFSETS, which, 0, 1, COUNT)
    blocks_in = tl.maximum(tl.cdiv(inputs, BLOCK), 1)
    output = (block // blocks_in * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    column = (block % blocks_in * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    inside = (output < outputs) & (column < inputs)
    values = tl.load(weight + output * inputs + column, mask=inside, other=0.0)
    inside = (output < padded) & (column < inputs)
    tl.store(transposed + offset + column * padded + output, values, mask=inside)


# -- hidden layers of equal width ------------------------------------------------------------------


class HiddenLayout(NamedTuple):
    """How layers of one width are cut into blocks of outputs and of inputs."""

    width: int  # padded, so that nothing inside has to be masked
    block_n: int
    block_k: int


def hidden_layout(hidden: int, most_columns: int, precision: str) -> HiddenLayout:
    """With blocks of at most so many outputs, of whatever else a kernel has to keep in registers."""
    width = max(16, triton.next_power_of_2(hidden)) if hidden <= 64 else round_up(hidden, 64)
    power = width & -width  # the largest power of 2 that divides it
    block_k = {"float32": 16, "tf32": 32}.get(precision, 64)
    return HiddenLayout(width, min(power, most_columns), min(power, block_k))


def rows_per_program(batch: int, precision: str, processors: int) -> int:
    """Rows of a program that keeps them through a whole chain of layers.

    The smallest power of 2 that fills the device in one wave, up to 32 in float32; for tensor cores,
    which need 16, up to 64 and half as many programs as processors. The arithmetic for it is in
    reverse_diffusion/triton.py.
    """
    if precision == "float32":
        least, most, wanted = 8, 32, processors
    else:
        least, most, wanted = 16, 64, max(1, processors // 2)
    rows: int = triton.next_power_of_2(triton.cdiv(batch, wanted))
    return max(least, min(most, rows))


def pack_hidden(
    parameters: list[Tensor], width: int, precision: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(weights ``[layers, width, width]``, biases ``[layers, width]``) of [weight, bias, ...].

    Padded with zeros, the weights in what they are multiplied in.
    """
    weights, biases = parameters[::2], parameters[1::2]
    dtype = OPERAND_DTYPES[precision]
    if weights and len(biases[0]) == width:
        packed_weights, packed_biases = torch.stack(weights).to(dtype), torch.stack(biases)
    else:
        packed_weights = torch.zeros(len(weights), width, width, dtype=dtype, device=device)
        packed_biases = torch.zeros(len(weights), width, device=device)
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            packed_weights[i, : weight.shape[0], : weight.shape[1]] = weight
            packed_biases[i, : len(bias)] = bias
    if precision == "tf32" and weights:
        count = packed_weights.numel()
        programs = triton.cdiv(count, ROUNDED_BLOCK)
        launch(round_kernel, programs, packed_weights, count, precision, ROUNDED_BLOCK)
    return packed_weights, packed_biases


@triton.jit
def round_kernel(x, COUNT: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    """Rounds float32 x in its place."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = tl.load(x + i, mask=i < COUNT, other=0.0)
    tl.store(x + i, rounded_operand(here, PRECISION), mask=i < COUNT)


def forward_weights(weights: Tensor, precision: str) -> Tensor:
    """Packed weights as forward products take them (`outputs_adjoin`)."""
    if not outputs_adjoin(precision):
        return weights
    return weights.mT.clone(memory_format=torch.contiguous_format)


@triton.jit
def add_hidden(
    sums,
    source,
    weight,
    column,
    INPUTS_FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums + source weight if INPUTS_FIRST, else source weight^T, for a block of columns ``[1, N]``.

    source: addresses ``[R, 1]`` of the rows of a ``[R, WIDTH]`` scratch of `rounded_operand`;
    weight: address of a ``[WIDTH, WIDTH]`` matrix of `pack_hidden`. Nothing is masked.
    """
    for k in range(0, WIDTH, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        h = tl.load(source + inner[None, :])
        if INPUTS_FIRST:
            w = tl.load(weight + inner[:, None] * WIDTH + column)
        else:
            w = tl.load(weight + column * WIDTH + inner[:, None])
        sums = dot(h, w, sums, PRECISION)
    return sums


@triton.jit
def add_thin(sums, x, weight, inputs, here, real):
    """sums + x w^T for few inputs, in float32 whatever the precision.

    x: addresses ``[R, 1]`` of the rows, read where `here`; weight: addresses ``[1, N]`` of the
    outputs' rows of weights, read where `real`. One input at a time: `dot` would pad them to 16, and
    its operands take registers that wide blocks don't have.
    """
    for k in range(inputs):
        part = tl.load(x + k, mask=here, other=0.0)
        w = tl.load(weight + k, mask=real, other=0.0)
        sums += part * w
    return sums


# -- elementwise functions on float32 --------------------------------------------------------------


@triton.jit
def at_least(x, limit):
    """max(x, limit) that keeps NaN."""
    return tl.maximum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_most(x, limit):
    """min(x, limit) that keeps NaN."""
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def limit_exponent(x):
    """Into [-87, 88], where exp is finite and normal."""
    return at_most(at_least(x, -87.0), 88.0)


@triton.jit
def reduce_exp(x):
    """(exp(r) - 1, 2^n) with exp(x) = 2^n exp(r), for x in [-87, 88]."""
    # Added to 1.5 * 2^23, x / ln 2 is rounded to an integer in the sum's lowest bits.
    rounded = x * 1.44269504 + 12582912.0
    n = rounded - 12582912.0
    # ln 2 in two parts, the first exact in few bits, so that n * ln 2 is subtracted without loss.
    r = x - n * 0.693359375
    r = r + n * 2.12194440e-4
    q = 1.9875691500e-4
    q = q * r + 1.3981999507e-3
    q = q * r + 8.3334519073e-3
    q = q * r + 4.1665795894e-2
    q = q * r + 1.6666665459e-1
    q = q * r + 5.0000001201e-1
    power = ((rounded.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    return q * (r * r) + r, power


@triton.jit
def exp_in_range(x, FAST: tl.constexpr):
    """exp(x) for x in [-87, 88]. FAST: the GPU's own, up to 1e-5 off for large x."""
    if FAST:
        return tl.exp2(x * 1.44269504)
    else:
        e, power = reduce_exp(x)
        return (e + 1.0) * power


@triton.jit
def exp(x, FAST: tl.constexpr = False):
    """exp(x), with x limited to [-87, 88]."""
    return exp_in_range(limit_exponent(x), FAST)


@triton.jit
def expm1(x):
    """exp(x) - 1 without cancellation near 0."""
    e, power = reduce_exp(limit_exponent(x))
    return e * power + (power - 1.0)


@triton.jit
def log(x):
    """Natural logarithm of positive normal x."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    f2 = f * f
    p = 7.0376836292e-2
    p = p * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    e = exponent.to(tl.float32)
    y = p * f * f2 + e * -2.12194440e-4 - 0.5 * f2
    return e * 0.693359375 + (f + y)


@triton.jit
def sine_polynomial(r2):
    """(sin(r) - r) / r^3 for |r| up to a little over pi / 4."""
    return (-1.9515295891e-4 * r2 + 8.3321608736e-3) * r2 - 1.6666654611e-1


@triton.jit
def cosine_polynomial(r2):
    """(cos(r) - 1 + r^2 / 2) / r^4 for |r| up to a little over pi / 4."""
    return (2.443315711809948e-5 * r2 - 1.388731625493765e-3) * r2 + 4.166664568298827e-2


@triton.jit
def sine_from_quarter(quarter, sine, cosine):
    """sin(n pi / 2 + r) from the sine and cosine of r. For cos, a quarter turn on, n is one more."""
    value = tl.where((quarter & 1) == 1, cosine, sine)
    return tl.where((quarter & 2) == 2, -value, value)


@triton.jit
def sincos_of_turns(u):
    """sin and cos of 2 pi u for u in [0, 1): whole quarters are taken off exactly beforehand."""
    rounded = u * 4.0 + 12582912.0
    quarter = rounded.to(tl.int32, bitcast=True)
    r = (u - (rounded - 12582912.0) * 0.25) * 6.28318531
    r2 = r * r
    s = sine_polynomial(r2) * r2 * r + r
    c = cosine_polynomial(r2) * (r2 * r2) + (1.0 - 0.5 * r2)
    return sine_from_quarter(quarter, s, c), sine_from_quarter(quarter + 1, s, c)


@triton.jit
def quarter_words(i):
    """32-bit word i of 1 / (2 pi) = 0.159..., in binary; i from -1 to 6."""
    w = (i - i).to(tl.uint64)
    w = tl.where(i == 0, 0x28BE60DB, w)
    w = tl.where(i == 1, 0x9391054A, w)
    w = tl.where(i == 2, 0x7F09D5F4, w)
    w = tl.where(i == 3, 0x7D4D3770, w)
    w = tl.where(i == 4, 0x36D8A566, w)
    w = tl.where(i == 5, 0x4F10E410, w)
    return tl.where(i == 6, 0x7F9458EA, w)


@triton.jit
def subtract_quarters_of_large(x):
    """(n, high, low) with x = n pi / 2 + high + low modulo 2 pi, for |x| from 2^13 on.

    Payne and Hanek: x is a 24-bit integer times 2^k, and of its product with 1 / (2 pi) only the 64
    bits behind the point are computed, from the three words of 1 / (2 pi) that reach them.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) & 0xFF) - 126
    word = (exponent >> 5) - 1
    shift = (exponent & 31).to(tl.uint64)
    w0, w1, w2, w3 = (
        quarter_words(word),
        quarter_words(word + 1),
        quarter_words(word + 2),
        quarter_words(word + 3),
    )
    # 32 bits each from `shift` on; a word and its successor side by side, so that 0 needs no care.
    high = (((w0 << 32) | w1) << shift) >> 32
    middle = (((w1 << 32) | w2) << shift) >> 32
    low = (((w2 << 32) | w3) << shift) >> 32
    mantissa = (((bits << 8) | -0x80000000).to(tl.uint32, bitcast=True)).to(tl.uint64)
    turns = ((mantissa * high) << 32) + mantissa * middle + ((mantissa * low) >> 32)
    # The upper two bits count quarters; rounding to the nearest leaves a signed rest.
    n = (turns + 0x2000000000000000) >> 62
    rest = (turns - (n << 62)).to(tl.int64, bitcast=True)
    r = rest.to(tl.float64) * 3.4061215800865545e-19  # 2^-62 pi / 2
    sign = tl.where(bits < 0, -1.0, 1.0)
    r_high = r.to(tl.float32)
    r_low = (r - r_high.to(tl.float64)).to(tl.float32)
    quarter = n.to(tl.int32)
    quarter = tl.where(bits < 0, -quarter, quarter)
    finite = tl.abs(x) < float("inf")
    return quarter, tl.where(finite, sign * r_high, float("nan")), sign * r_low


@triton.jit
def sincos(x):
    """sin and cos of x, within 1 ulp for every x; NaN for infinities.

    A block with any number beyond 2^13 quarter turns takes several times as long. Up to 16 numbers a
    thread fit in registers.
    """
    rounded = x * 0.636619772 + 12582912.0
    n = rounded - 12582912.0
    quarter = rounded.to(tl.int32, bitcast=True)
    # pi / 2 is a sum of four parts, the first three of 11 bits: their products with n are exact, with
    # or without an fma, and so are the differences. `low` is what `r` rounds away.
    r = (x - n * 1.5703125) - n * 4.837512969970703e-4
    third = n * 7.549533620476723e-08
    high = r - third
    low = (r - high) - third - n * 2.5633440682570896e-12
    far = tl.abs(x) >= 12867.0
    if tl.max(far.to(tl.int32)) > 0:
        far_quarter, far_high, far_low = subtract_quarters_of_large(x)
        quarter = tl.where(far, far_quarter, quarter)
        high = tl.where(far, far_high, high)
        low = tl.where(far, far_low, low)
    # sin(r + low) and cos(r + low), each a large term plus a small sum, so that only the last
    # addition rounds much: sin = r + (r^3 p + low cos r), cos = w + (what w = 1 - r^2 / 2 rounds
    # away + ...).
    r2 = high * high
    half_square = 0.5 * r2
    w = 1.0 - half_square
    s = high + (sine_polynomial(r2) * r2 * high + low * w)
    c = w + (cosine_polynomial(r2) * (r2 * r2) + (((1.0 - w) - half_square) - low * high))
    return sine_from_quarter(quarter, s, c), sine_from_quarter(quarter + 1, s, c)


# -- activations -----------------------------------------------------------------------------------


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """(sigmoid(x), sigmoid(-x))"""
    e = exp(-x, FAST)
    s = 1.0 / (1.0 + e)
    return s, e * s


@triton.jit
def tanh(x, FAST: tl.constexpr):
    """An odd polynomial below 0.625; 1 - 2 / (exp(2|x|) + 1) with the sign put back above."""
    x2 = x * x
    p = -5.70498872745e-3
    p = p * x2 + 2.06390887954e-2
    p = p * x2 - 5.37397155531e-2
    p = p * x2 + 1.33314422036e-1
    p = p * x2 - 3.33332819422e-1
    small = p * x2 * x + x
    magnitude = tl.abs(x)
    big = 1.0 - 2.0 / (exp(magnitude + magnitude, FAST) + 1.0)
    return tl.where(magnitude < 0.625, small, tl.where(x < 0.0, -big, big))


@triton.jit
def mish_parts(x, FAST: tl.constexpr):
    """(x from -87 on, e, n, n + 2) with tanh(log(1 + e^x)) = n / (n + 2), n = e (e + 2).

    Above 20 the quotient is 1 in float32. Below -87 mish is 0 to float32's last normal digit, but x
    times an exponential that can't get any smaller would not be: x itself stops there.
    """
    x = at_least(x, -87.0)
    e = exp_in_range(at_most(x, 20.0), FAST)
    n = e * (e + 2.0)
    return x, e, n, n + 2.0


@triton.jit
def gelu_parts(x):
    """(x within its limits, exp(-x^2 / 2), the normal distribution function).

    The tail Phi(-|x|) is the exponential times a function that is smooth over the whole range, so
    that small values aren't differences of large ones. Beyond 13.19 the exponential is below
    float32's normal numbers.
    """
    limited = at_most(at_least(x, -13.19), 13.19)
    magnitude = tl.abs(limited)
    # x^2 and what it rounds away, which the exponential would magnify, by parts of x whose products
    # are exact.
    high = (limited.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    rest = limited - high
    high_square = high * high
    cross = (high + high) * rest + rest * rest
    square = high_square + cross
    rounded_away = (high_square - square) + cross
    e = exp(-0.5 * square)
    e = e - e * 0.5 * rounded_away
    # (|x| + 3) Phi(-|x|) / exp(-x^2 / 2) as a polynomial in (|x| - 3) / (|x| + 3), to 4e-8.
    inverse = 1.0 / (magnitude + 3.0)
    q = 1.0 - 6.0 * inverse
    p = -2.725993400e-4
    p = p * q - 9.120256291e-4
    p = p * q + 1.077569788e-3
    p = p * q + 6.929901894e-3
    p = p * q - 1.047948003e-2
    p = p * q - 4.725730047e-2
    p = p * q + 2.300192565e-1
    p = p * q - 5.093322396e-1
    p = p * q + 7.290836573e-1
    tail = e * (p * inverse)
    return limited, e, tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, FAST: tl.constexpr = False):
    """The activation named ACTIVATION of float32 x. NaN in gives NaN out; nothing overflows.

    FAST takes the GPU's own exponential: for results that are rounded to half precision anyway.
    """
    if ACTIVATION == "identity":
        return x
    elif ACTIVATION == "relu":
        return at_least(x, 0.0)
    elif ACTIVATION == "elu":
        return tl.where(x > 0.0, x, expm1(x))
    elif ACTIVATION == "silu":
        s, _ = sigmoid(x, FAST)
        return at_least(x, -87.0) * s
    elif ACTIVATION == "tanh":
        return tanh(x, FAST)
    elif ACTIVATION == "mish":
        x, _, n, n_plus_2 = mish_parts(x, FAST)
        return x * (n / n_plus_2)
    elif ACTIVATION == "gelu":
        _, _, distribution = gelu_parts(x)
        return at_least(x, -13.19) * distribution
    elif ACTIVATION == "sin":
        sine, _ = sincos(x)
        return sine
    else:
        tl.static_assert(ACTIVATION == "cos", "unknown activation")
        _, cosine = sincos(x)
        return cosine


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr, FAST: tl.constexpr = False):
    """(activation, its derivative) at float32 x. The slopes of identity and relu hide a NaN."""
    if ACTIVATION == "identity":
        return x, tl.full(x.shape, 1.0, tl.float32)
    elif ACTIVATION == "relu":
        return at_least(x, 0.0), tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "elu":
        return tl.where(x > 0.0, x, expm1(x)), tl.where(x > 0.0, 1.0, exp(x, FAST))
    elif ACTIVATION == "silu":
        s, opposite = sigmoid(x, FAST)
        y = at_least(x, -87.0) * s
        return y, at_most(y, 88.0) * opposite + s
    elif ACTIVATION == "tanh":
        y = tanh(x, FAST)
        return y, 1.0 - y * y
    elif ACTIVATION == "mish":
        x, e, n, n_plus_2 = mish_parts(x, FAST)
        inverse = 1.0 / n_plus_2
        t = n * inverse
        # mish'(x) = t + 4 x e (1 + e) / (n + 2)^2
        slope = (at_most(x, 20.0) * inverse * 4.0) * ((e * e + e) * inverse) + t
        return x * t, slope
    elif ACTIVATION == "gelu":
        limited, e, distribution = gelu_parts(x)
        slope = limited * 0.398942280 * e + distribution  # 1 / sqrt(2 pi)
        return at_least(x, -13.19) * distribution, slope
    elif ACTIVATION == "sin":
        return sincos(x)
    else:
        tl.static_assert(ACTIVATION == "cos", "unknown activation")
        sine, cosine = sincos(x)
        return cosine, -sine


# -- noise -----------------------------------------------------------------------------------------


@triton.jit
def load_seed(value, pointer):
    """The key of a call's noise, from `seed_arguments`."""
    if pointer is None:
        return value
    else:
        return tl.load(pointer)


@triton.jit
def normals(seed, row, step, column):
    """The library's normals at (row, step, column), as in ``diffcore/ops/_philox.py``.

    row: int64 ``[R, 1]``; column: int32 ``[1, C]``. Every column draws its block of four by itself
    and keeps one: at a kernel's few columns cheaper than an exchange between threads.
    """
    block, row = tl.broadcast((column >> 2).to(tl.uint32), row)
    zero = block - block
    w0, w1, w2, w3 = tl.philox(
        seed,
        block,
        (row & 0xFFFFFFFF).to(tl.uint32),
        (zero + step).to(tl.uint32),
        (row >> 32).to(tl.uint32),
    )
    second = (column & 2) == 2
    u1 = ((tl.where(second, w2, w0) >> 8).to(tl.int32) + 1).to(tl.float32) * 5.9604644775390625e-08
    u2 = (tl.where(second, w3, w1) >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    sine, cosine = sincos_of_turns(u2)
    radius = tl.sqrt_rn(-2.0 * log(u1))
    return radius * tl.where((column & 1) == 1, sine, cosine)
