"""MLPs on Triton kernels: one or several of a shape on the same rows, forward and backward.

Layout. A program takes a block of rows through all layers of one network, so that a forward pass of
any depth and any number of networks is one launch, and so is the way back to the input. Another one
transposes all weights for a forward pass in float32 (``_triton.outputs_adjoin``). Activations
go from layer to layer through ``saved``, where the backward pass wants them anyway: a program reads
back only what it wrote itself, from L1 or L2. Weights come from L2. A weight's gradient is a sum
over the batch, so there the work is cut by weights: one launch for all layers and networks, in
which a program owns a block of one weight and sums over the batch in a fixed order. Batches that
are too long for that are cut into parts of fixed sizes whose sums a last launch adds up. There are
no atomics: the same call gives the same bits.

Roofline on H100 (132 SMs of 128 FMAs a cycle, some 50 B a cycle each from L2, 1.7 GHz), for twin
critics with 3 hidden layers of 256 at batch 256: forward 256 * 2 * 140e3 = 72 MFMA. 32 programs of
16 rows use 32 SMs: 72e6 / (32 * 128) = 17,500 cycles or 10 us in float32. A program reads its
network's 560 KB of weights: 11,200 cycles or 7 us. So float32 is bound by arithmetic, tensor cores
by L2 from few SMs; what one launch saves beside a launch a layer, 3 * 2.5 us or more, is of the
same order. From batch 1,056 on all SMs have work. Backward to the input costs the same, the
weights' gradient the same arithmetic spread over 80 programs: 72e6 / (80 * 128) = 7,000 cycles or 4
us.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcore.ops._triton import (
    activate_with_slope,
    dot,
    launch,
    operand,
    outputs_adjoin,
    pick,
    round_up,
    transposed,
)

#: Programs that keep every multiprocessor of a large GPU busy. A constant, and not the number that
#: the GPU at hand has, so that sums are cut into the same parts on each.
PROGRAMS = 132

#: Outputs and inputs of a weight's block whose gradient one program sums.
BLOCK = 64

#: Rows of the batch that one accumulator of a weight's gradient sums at most.
MOST_SUMMED_ROWS = 1024

#: Values whose parts one program adds up.
PART_BLOCK = 1024


class Layout(NamedTuple):
    """Where a row of ``saved`` has what: columns of each layer's input and of its slope.

    Every part begins at a multiple of 16 floats and is padded up to the next, so that reads are
    aligned. An identity has no slope, told by -1.
    """

    inputs: tuple[int, ...]
    slopes: tuple[int, ...]
    width: int


@functools.cache
def layout(widths: tuple[int, ...], activations: tuple[str, ...], keep: bool) -> Layout:
    """Of a network with these widths from input to output. Slopes are kept only if `keep`."""
    inputs, slopes, column = [], [], 0
    for width in widths[:-1]:
        inputs.append(column)
        column += round_up(width, 16)
    for width, activation in zip(widths[1:], activations, strict=True):
        has_slope = keep and activation != "identity"
        slopes.append(column if has_slope else -1)
        column += round_up(width, 16) if has_slope else 0
    return Layout(tuple(inputs), tuple(slopes), column)


@functools.cache
def delta_columns(widths: tuple[int, ...]) -> tuple[int, ...]:
    """Where a row of deltas, gradients before activations, has each layer's; then its width."""
    return tuple(itertools.accumulate((round_up(w, 16) for w in widths[1:]), initial=0))


def widths_of(parameters: list[Tensor], layers: int) -> tuple[int, ...]:
    """Widths from input to output of the first network's `layers` layers."""
    return (parameters[0].shape[1], *(bias.shape[0] for bias in parameters[1 : 2 * layers : 2]))


def depth_of_blocks(precision: str) -> int:
    """Terms that matrix products add at a time: without tensor cores they all lie in registers."""
    return 16 if precision == "float32" else 32


def row_settings(networks: int, batch: int, precision: str) -> dict[str, int]:
    """Block sizes of the kernels that take rows through layers: large, but work for every SM."""
    sizes = (32,) if precision == "tf32" else (64, 32)  # 64 spill
    rows = next((r for r in sizes if networks * triton.cdiv(batch, r) >= PROGRAMS), 16)
    columns = 128 if precision == "float32" or rows == 64 else 64  # more spill
    depth = depth_of_blocks(precision)
    return {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "num_warps": 8 if rows == 64 else 4}


# -- a block of rows through layers ----------------------------------------------------------------


@triton.jit
def product(
    rows,
    weight,
    column,
    K: tl.constexpr,
    K_STRIDE: tl.constexpr,
    N_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Sum over k < K of rows[:, k] * weight[k * K_STRIDE + column * N_STRIDE].

    rows: pointers to the rows' first elements, ``[ROWS]``; column: ``[COLUMNS]``.
    """
    sums = tl.zeros((rows.shape[0], column.shape[0]), tl.float32)
    for first in range(0, K, DEPTH):
        k = first + tl.arange(0, DEPTH)
        x = rows[:, None] + k[None, :]
        w = weight + (k[:, None] * K_STRIDE + column[None, :] * N_STRIDE)
        if K % DEPTH == 0:
            a, b = tl.load(x), tl.load(w)
        else:
            a = tl.load(x, mask=k[None, :] < K, other=0.0)
            b = tl.load(w, mask=k[:, None] < K, other=0.0)
        sums = dot(operand(a, PRECISION), operand(b, PRECISION), sums, PRECISION)
    return sums


@triton.jit
def forward_product(
    rows,
    weight,
    column,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """rows W^T for BLOCK columns, with W ``[OUT, IN]`` as `forward_parameters` gives it.

    What comes for columns from OUT on is of no use.
    """
    if PRECISION == "float32":
        STRIDE: tl.constexpr = (OUT + COLUMNS - 1) // COLUMNS * COLUMNS
        return product(rows, weight, column, IN, STRIDE, 1, PRECISION, DEPTH)
    else:
        readable = existing(column, OUT, BLOCK)
        return product(rows, weight, readable, IN, 1, IN, PRECISION, DEPTH)


@triton.jit
def existing(column, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The columns themselves, those from COUNT on replaced by the last: what may be read."""
    if COUNT % BLOCK == 0:
        return column
    else:
        return tl.minimum(column, COUNT - 1)


@triton.jit
def copy_rows(
    source, target, present, WIDTH: tl.constexpr, STORED: tl.constexpr, COLUMNS: tl.constexpr
):
    """WIDTH columns of rows, and zeros from there up to STORED."""
    for first in range(0, STORED, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        copied = present[:, None] & (column < WIDTH)
        values = tl.load(source[:, None] + column, mask=copied, other=0.0)
        tl.store(target[:, None] + column, values, mask=present[:, None] & (column < STORED))


@triton.jit
def forward_layer(
    source,
    weight,
    bias,
    target,
    slopes,
    present,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORED: tl.constexpr,
    KEEP_SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """target = f(source W^T + b), and f' to `slopes`. All three point to rows, ``[ROWS]``.

    weight, and `parameters` below: as `forward_parameters` gives them.
    Rows of the target take STORED columns, those of slopes `padded`; what is in the padding is never
    used.
    """
    BLOCK: tl.constexpr = 16 if OUT <= 16 else COLUMNS
    for first in range(0, OUT, BLOCK):
        column = first + tl.arange(0, BLOCK)
        z = forward_product(source, weight, column, IN, OUT, BLOCK, PRECISION, COLUMNS, DEPTH)
        z += tl.load(bias + existing(column, OUT, BLOCK))[None, :]
        value, slope = activate_with_slope(z, ACTIVATION, PRECISION != "float32")
        if KEEP_SLOPE:
            inside = present[:, None] & (column < (OUT + 15) // 16 * 16)[None, :]
            tl.store(slopes[:, None] + column[None, :], slope, mask=inside)
        inside = present[:, None] & (column < STORED)[None, :]
        tl.store(target[:, None] + column[None, :], value, mask=inside)


@triton.jit
def forward_layers(
    parameters,
    network,
    saved,
    y,
    present,
    PADS_Y: tl.constexpr,
    NETWORKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    ACTIVATIONS: tl.constexpr,
    INPUTS: tl.constexpr,
    SLOPES: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """From the input, in its place in `saved`, through all layers to `y`.

    saved, y: pointers to this program's rows, ``[ROWS]``; present: which of them exist. The others
    may repeat one that does. PADS_Y: whether rows of y are padded too.
    """
    LAYERS: tl.constexpr = len(ACTIVATIONS)
    for layer in tl.static_range(LAYERS):
        tl.debug_barrier()  # the rows that other threads of this program wrote
        forward_layer(
            saved + INPUTS[layer],
            pick(parameters, network, 2 * layer, 2 * LAYERS, NETWORKS),
            pick(parameters, network, 2 * layer + 1, 2 * LAYERS, NETWORKS),
            saved + INPUTS[layer + 1] if layer + 1 < LAYERS else y,
            saved + SLOPES[layer],
            present,
            WIDTHS[layer],
            WIDTHS[layer + 1],
            ACTIVATIONS[layer],
            (WIDTHS[layer + 1] + 15) // 16 * 16
            if layer + 1 < LAYERS or PADS_Y
            else WIDTHS[layer + 1],
            SLOPES[layer] >= 0,
            PRECISION,
            COLUMNS,
            DEPTH,
        )


@triton.jit
def backward_layer(
    source,
    weight,
    slopes,
    target,
    present,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    STORED: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """target = source W, times `slopes` if there are any. All three point to rows, ``[ROWS]``.

    Rows of the target take STORED columns; the last of IN repeats itself.
    """
    BLOCK: tl.constexpr = 16 if IN <= 16 else COLUMNS
    for first in range(0, IN, BLOCK):
        column = first + tl.arange(0, BLOCK)
        readable = existing(column, IN, BLOCK)
        delta = product(source, weight, readable, OUT, IN, 1, PRECISION, DEPTH)
        inside = present[:, None] & (column < STORED)[None, :]
        if HAS_SLOPE:
            delta *= tl.load(slopes[:, None] + column[None, :], mask=inside, other=0.0)
        tl.store(target[:, None] + column[None, :], delta, mask=inside)


@triton.jit
def backward_layers(
    parameters,
    network,
    saved,
    deltas,
    grad_x,
    present,
    WANTS_X: tl.constexpr,
    NETWORKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    SLOPES: tl.constexpr,
    DELTAS: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """From the last layer's delta, in its place in `deltas`, to every layer's and to the input.

    saved, deltas, grad_x: pointers to this program's rows, ``[ROWS]``.
    """
    LAYERS: tl.constexpr = len(SLOPES)
    for i in tl.static_range(1, LAYERS):
        tl.debug_barrier()  # the rows that other threads of this program wrote
        backward_layer(
            deltas + DELTAS[LAYERS - i],
            pick(parameters, network, 2 * (LAYERS - i), 2 * LAYERS, NETWORKS),
            saved + SLOPES[LAYERS - i - 1],
            deltas + DELTAS[LAYERS - i - 1],
            present,
            WIDTHS[LAYERS - i],
            WIDTHS[LAYERS - i + 1],
            (WIDTHS[LAYERS - i] + 15) // 16 * 16,
            SLOPES[LAYERS - i - 1] >= 0,
            PRECISION,
            COLUMNS,
            DEPTH,
        )
    if WANTS_X:
        tl.debug_barrier()
        backward_layer(
            deltas + DELTAS[0],
            pick(parameters, network, 0, 2 * LAYERS, NETWORKS),
            saved,
            grad_x,
            present,
            WIDTHS[0],
            WIDTHS[1],
            WIDTHS[0],
            False,
            PRECISION,
            COLUMNS,
            DEPTH,
        )


@triton.jit
def rows_of_program(batch, ROWS: tl.constexpr):
    """(this program's rows, the last one repeated where there are no more; which of them exist)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return tl.minimum(row, batch - 1).to(tl.int64), row < batch


@triton.jit(do_not_specialize=["batch"])
def forward_kernel(
    x,
    parameters,
    y,
    saved,
    batch,
    NETWORKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    ACTIVATIONS: tl.constexpr,
    INPUTS: tl.constexpr,
    SLOPES: tl.constexpr,
    SAVED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row, present = rows_of_program(batch, ROWS)
    network = tl.program_id(1)
    of_network = network.to(tl.int64) * batch + row
    saved += of_network * SAVED
    PADDED: tl.constexpr = (WIDTHS[0] + 15) // 16 * 16
    copy_rows(x + row * WIDTHS[0], saved, present, WIDTHS[0], PADDED, COLUMNS)
    y += of_network * WIDTHS[len(ACTIVATIONS)]
    forward_layers(
        parameters,
        network,
        saved,
        y,
        present,
        False,
        NETWORKS,
        WIDTHS,
        ACTIVATIONS,
        INPUTS,
        SLOPES,
        PRECISION,
        COLUMNS,
        DEPTH,
    )


@triton.jit(do_not_specialize=["batch"])
def backward_kernel(
    grad_y,
    parameters,
    saved,
    deltas,
    grad_x,
    batch,
    WANTS_X: tl.constexpr,
    NETWORKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    SLOPES: tl.constexpr,
    SAVED: tl.constexpr,
    DELTAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    LAST: tl.constexpr = len(SLOPES) - 1
    OUT: tl.constexpr = WIDTHS[LAST + 1]
    row, present = rows_of_program(batch, ROWS)
    network = tl.program_id(1)
    of_network = network.to(tl.int64) * batch + row
    saved += of_network * SAVED
    deltas += of_network * DELTAS[LAST + 1]
    grad_y += of_network * OUT
    for first in range(0, OUT, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        inside = present[:, None] & (column < (OUT + 15) // 16 * 16)
        delta = tl.load(grad_y[:, None] + column, mask=inside & (column < OUT), other=0.0)
        if SLOPES[LAST] >= 0:
            delta *= tl.load((saved + SLOPES[LAST])[:, None] + column, mask=inside, other=0.0)
        tl.store((deltas + DELTAS[LAST])[:, None] + column, delta, mask=inside)
    if WANTS_X:
        grad_x += of_network * WIDTHS[0]
    backward_layers(
        parameters,
        network,
        saved,
        deltas,
        grad_x,
        present,
        WANTS_X,
        NETWORKS,
        WIDTHS,
        SLOPES,
        DELTAS,
        PRECISION,
        COLUMNS,
        DEPTH,
    )


# -- sums over the batch ---------------------------------------------------------------------------


@triton.jit(do_not_specialize=["batch", "part_rows"])
def weight_gradient_kernel(
    deltas,
    saved,
    gradients,
    partial,
    batch,
    part_rows,
    NETWORKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    INPUTS: tl.constexpr,
    SAVED: tl.constexpr,
    DELTAS: tl.constexpr,
    FIRST_BLOCKS: tl.constexpr,
    OFFSETS: tl.constexpr,
    IN_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A block of one weight's gradient, delta^T input summed over a part of the batch.

    Programs are the blocks of all weights, layer by layer from FIRST_BLOCKS on, times parts, times
    networks. The sum goes to `gradients` or, if IN_PARTS, to [part, network, OFFSETS] of
    `partial`.
    """
    LAYERS: tl.constexpr = len(FIRST_BLOCKS)
    block, part, network = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # The layer and what depends on it are numbers here, not constants, so that what follows is
    # compiled once.
    first_block, fan_in, fan_out = 0, WIDTHS[0], WIDTHS[1]
    input_column, delta_column, offset, bias_offset = INPUTS[0], DELTAS[0], OFFSETS[0], OFFSETS[1]
    weight_gradient = pick(gradients, network, 0, 2 * LAYERS, NETWORKS)
    bias_gradient = pick(gradients, network, 1, 2 * LAYERS, NETWORKS)
    for layer in tl.static_range(1, LAYERS):
        here = block >= FIRST_BLOCKS[layer]
        first_block = tl.where(here, FIRST_BLOCKS[layer], first_block)
        fan_in = tl.where(here, WIDTHS[layer], fan_in)
        fan_out = tl.where(here, WIDTHS[layer + 1], fan_out)
        input_column = tl.where(here, INPUTS[layer], input_column)
        delta_column = tl.where(here, DELTAS[layer], delta_column)
        offset = tl.where(here, OFFSETS[2 * layer], offset)
        bias_offset = tl.where(here, OFFSETS[2 * layer + 1], bias_offset)
        weight = pick(gradients, network, 2 * layer, 2 * LAYERS, NETWORKS)
        bias = pick(gradients, network, 2 * layer + 1, 2 * LAYERS, NETWORKS)
        weight_gradient = tl.where(here, weight, weight_gradient)
        bias_gradient = tl.where(here, bias, bias_gradient)

    blocks_in = tl.maximum(tl.cdiv(fan_in, COLUMNS), 1)
    output = (block - first_block) // blocks_in * OUTPUTS + tl.arange(0, OUTPUTS)
    column = (block - first_block) % blocks_in * COLUMNS + tl.arange(0, COLUMNS)
    # Up to a multiple of 16 there is padding, which may be read: what comes of it isn't stored.
    readable_output = output < tl.multiple_of((fan_out + 15) // 16 * 16, 16)
    readable_column = column < tl.multiple_of((fan_in + 15) // 16 * 16, 16)
    row_of_network = network.to(tl.int64) * batch
    deltas += row_of_network * DELTAS[LAYERS] + tl.multiple_of(delta_column, 16) + output[None, :]
    saved += row_of_network * SAVED + tl.multiple_of(input_column, 16) + column[None, :]
    sums = tl.zeros((OUTPUTS, COLUMNS), tl.float32)
    delta_sums = tl.zeros((DEPTH, OUTPUTS), tl.float32)
    end = tl.minimum((part + 1) * part_rows, batch)
    for first in range(part * part_rows, end, DEPTH):
        row = (first + tl.arange(0, DEPTH))[:, None]
        at = row.to(tl.int64)
        inside = row < end
        delta = tl.load(deltas + at * DELTAS[LAYERS], inside & readable_output[None, :], 0.0)
        values = tl.load(saved + at * SAVED, inside & readable_column[None, :], 0.0)
        delta_sums += delta
        transposed = tl.trans(operand(delta, PRECISION))
        sums = dot(transposed, operand(values, PRECISION), sums, PRECISION)
    if IN_PARTS:
        partial += (part * NETWORKS + network).to(tl.int64) * OFFSETS[2 * LAYERS]
        weight_gradient = partial + offset
        bias_gradient = partial + bias_offset
    inside = (output < fan_out)[:, None] & (column < fan_in)[None, :]
    tl.store(weight_gradient + output[:, None] * fan_in + column[None, :], sums, mask=inside)
    if (block - first_block) % blocks_in == 0:
        tl.store(bias_gradient + output, tl.sum(delta_sums, axis=0), mask=output < fan_out)


@triton.jit(do_not_specialize=["parts"])
def add_parts_kernel(
    partial,
    gradients,
    parts,
    NETWORKS: tl.constexpr,
    SIZES: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of one parameter's gradient from its parts, in order. OFFSETS: in whole blocks."""
    COUNT: tl.constexpr = len(SIZES)
    first = tl.program_id(0) * BLOCK
    network = tl.program_id(1)
    offset, size = 0, SIZES[0]
    gradient = pick(gradients, network, 0, COUNT, NETWORKS)
    for i in tl.static_range(1, COUNT):
        here = first >= OFFSETS[i]
        offset = tl.where(here, OFFSETS[i], offset)
        size = tl.where(here, SIZES[i], size)
        gradient = tl.where(here, pick(gradients, network, i, COUNT, NETWORKS), gradient)
    element = first - offset + tl.arange(0, BLOCK)
    inside = element < size
    sums = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        of_part = partial + (part * NETWORKS + network).to(tl.int64) * OFFSETS[COUNT] + offset
        sums += tl.load(of_part + element, mask=inside, other=0.0)
    tl.store(gradient + element, sums, mask=inside)


# -- launches --------------------------------------------------------------------------------------


def saved_width(parameters: list[Tensor], activations: str, keep: bool) -> int:
    """Floats a row of what `forward` saves. Widths may be symbols, which no cache takes."""
    names = tuple(activations.split(","))
    return layout.__wrapped__(widths_of(parameters, len(names)), names, keep).width


def forward_parameters(
    parameters: list[Tensor], columns: int, precision: str
) -> tuple[Tensor, ...]:
    """Weight, bias, weight, bias, ... as products of blocks of `columns` take them forward."""
    if not outputs_adjoin(precision):
        return tuple(parameters)
    pairs = zip(transposed(parameters[::2], columns), parameters[1::2], strict=True)
    return tuple(itertools.chain.from_iterable(pairs))


def forward(
    x: Tensor, parameters: list[Tensor], activations: str, keep: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """(y ``[N, B, out]``, what `backward` needs, without rows unless `keep`)."""
    names = tuple(activations.split(","))
    widths = widths_of(parameters, len(names))
    batch, networks = len(x), len(parameters) // (2 * len(names))
    kept = layout(widths, names, keep)
    y = x.new_empty(networks, batch, widths[-1])
    # Without `keep` what lies between the layers, for this call only.
    saved = x.new_empty(networks, batch, kept.width)
    if batch:
        settings = row_settings(networks, batch, precision)
        launch(
            forward_kernel,
            (triton.cdiv(batch, settings["ROWS"]), networks),
            x,
            forward_parameters(parameters, settings["COLUMNS"], precision),
            y,
            saved,
            batch,
            networks,
            widths,
            names,
            *kept,
            precision,
            **settings,
        )
    return y, saved if keep else x.new_empty(networks, 0, kept.width)


def backward(
    grad_y: Tensor,
    saved: Tensor,
    parameters: list[Tensor],
    activations: str,
    wants_x: bool,
    wants_parameters: bool,
    precision: str,
) -> list[Tensor]:
    """[gradient of x (empty unless wanted), then, if wanted, of every parameter]."""
    names = tuple(activations.split(","))
    widths = widths_of(parameters, len(names))
    networks, batch = grad_y.shape[:2]
    kept, columns = layout(widths, names, True), delta_columns(widths)
    make = torch.empty_like if batch else torch.zeros_like
    gradients = [make(p) for p in parameters] if wants_parameters else []
    grad_x = grad_y.new_empty(networks, batch if wants_x else 0, widths[0])
    if batch:
        deltas = grad_y.new_empty(networks, batch, columns[-1])
        settings = row_settings(networks, batch, precision)
        launch(
            backward_kernel,
            (triton.cdiv(batch, settings["ROWS"]), networks),
            grad_y,
            tuple(parameters),
            saved,
            deltas,
            grad_x,
            batch,
            wants_x,
            networks,
            widths,
            kept.slopes,
            kept.width,
            columns,
            precision,
            **settings,
        )
        if wants_parameters:
            weight_gradients(deltas, saved, gradients, widths, kept, precision)
    return [grad_x[0] if networks == 1 else grad_x.sum(0), *gradients]


def weight_gradients(
    deltas: Tensor,
    saved: Tensor,
    gradients: list[Tensor],
    widths: tuple[int, ...],
    kept: Layout,
    precision: str,
) -> None:
    """Fills `gradients`, of weight, bias, weight, bias, ..., network after network."""
    networks, batch = deltas.shape[:2]
    pairs = list(itertools.pairwise(widths))
    blocks = [triton.cdiv(o, BLOCK) * max(1, triton.cdiv(i, BLOCK)) for i, o in pairs]
    first_blocks = tuple(itertools.accumulate(blocks[:-1], initial=0))
    sizes = tuple(size for i, o in pairs for size in (i * o, o))
    offsets = tuple(itertools.accumulate((round_up(size, PART_BLOCK) for size in sizes), initial=0))
    # Enough parts for every SM, but none of few rows, nor of so many that rounding errors pile up.
    wanted = triton.cdiv(2 * PROGRAMS, sum(blocks) * networks)
    parts = max(min(wanted, triton.cdiv(batch, 512)), triton.cdiv(batch, MOST_SUMMED_ROWS))
    depth = depth_of_blocks(precision)
    part_rows = round_up(triton.cdiv(batch, parts), depth)
    partial = deltas.new_empty(parts if parts > 1 else 0, networks, offsets[-1])
    launch(
        weight_gradient_kernel,
        (sum(blocks), parts, networks),
        deltas,
        saved,
        tuple(gradients),
        partial,
        batch,
        part_rows,
        networks,
        widths,
        kept.inputs,
        kept.width,
        delta_columns(widths),
        first_blocks,
        offsets,
        parts > 1,
        precision,
        OUTPUTS=BLOCK,
        COLUMNS=BLOCK,
        DEPTH=depth,
    )
    if parts > 1:
        launch(
            add_parts_kernel,
            (offsets[-1] // PART_BLOCK, networks),
            partial,
            tuple(gradients),
            parts,
            networks,
            sizes,
            offsets,
            PART_BLOCK,
        )
