"""Random Fourier features on Triton kernels, forward and backward.

Layout. Forward, a program makes a block of rows and features: a matrix product, then sines and
cosines of the sums while they are in registers. Backward, a program takes a block of rows from the
features' gradients to the arguments' and on to the input's; frequencies' gradients are the weight
gradients of an MLP of one layer. What the way back needs is the slope, scale * f'(argument); for
"cos_sin" the features are each other's slopes.

The sines and cosines are within 1 ulp of those of the argument as rounded to float32, whatever its
size: `sincos` reduces arguments below 12,867 by four parts of pi / 2 and larger ones by as many
bits of 1 / (2 pi) as they need. A block with such an argument takes several times as long.

Roofline on H100 (67 TFLOP/s in float32, 3.35 TB/s) for 256 inputs and 512 features at batch 4,096:
4096 * 512 * 256 * 2 = 1.1 GFLOP and some 40 * 4096 * 512 = 84 MFLOP of sines and cosines, 17 us;
4.2 MB in, 8.4 MB out and as much for the slopes, 6 us. Arithmetic bounds it in float32, memory with
tensor cores, where sines and cosines, 2 us, are in the shade of either. With 23 inputs, as from a
state, the product shrinks to 100 MFLOP and memory bounds all precisions: 17 MB, 5 us.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from diffcore.ops._triton import launch, outputs_adjoin, round_up, sincos, transposed
from diffcore.ops.mlp.triton import (
    PROGRAMS,
    Layout,
    backward_layer,
    copy_rows,
    depth_of_blocks,
    existing,
    forward_product,
    row_settings,
    rows_of_program,
    weight_gradients,
)


@triton.jit(do_not_specialize=["batch"])
def forward_kernel(
    x,
    omega,
    bias,
    y,
    slopes,
    scale,
    batch,
    KIND: tl.constexpr,
    KEEP: tl.constexpr,
    IN: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row, present = rows_of_program(batch, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rows = x + row * IN
    z = forward_product(rows, omega, column, IN, FEATURES, COLUMNS, PRECISION, COLUMNS, DEPTH)
    if bias is not None:
        z += tl.load(bias + existing(column, FEATURES, COLUMNS))[None, :]
    sine, cosine = sincos(z)
    inside = present[:, None] & (column < FEATURES)[None, :]
    if KIND == "cos_sin":
        pair = y + row[:, None] * (2 * FEATURES) + column[None, :]
        tl.store(pair, scale * cosine, mask=inside)
        tl.store(pair + FEATURES, scale * sine, mask=inside)
    else:
        at = row[:, None] * FEATURES + column[None, :]
        tl.store(y + at, scale * (sine if KIND == "sin" else cosine), mask=inside)
        if KEEP:
            tl.store(slopes + at, scale * (cosine if KIND == "sin" else -sine), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def backward_kernel(
    grad_y,
    x,
    omega,
    saved,
    deltas,
    inputs,
    grad_x,
    batch,
    KIND: tl.constexpr,
    WANTS_X: tl.constexpr,
    WANTS_OMEGA: tl.constexpr,
    IN: tl.constexpr,
    FEATURES: tl.constexpr,
    INPUTS: tl.constexpr,
    DELTAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The arguments' gradients to `deltas`, a copy of x to `inputs`, the gradient of x to `grad_x`.

    Rows of deltas and inputs are as long as `weight_gradients` reads.
    """
    row, present = rows_of_program(batch, ROWS)
    deltas += row * DELTAS
    WIDTH: tl.constexpr = 2 * FEATURES if KIND == "cos_sin" else FEATURES
    grad_y += row * WIDTH
    saved += row * WIDTH
    for first in range(0, FEATURES, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        inside = present[:, None] & (column < FEATURES)
        of_first = tl.load(grad_y[:, None] + column, mask=inside, other=0.0)
        saved_first = tl.load(saved[:, None] + column, mask=inside, other=0.0)
        if KIND == "cos_sin":
            of_sine = tl.load(grad_y[:, None] + FEATURES + column, mask=inside, other=0.0)
            sine = tl.load(saved[:, None] + FEATURES + column, mask=inside, other=0.0)
            delta = of_sine * saved_first - of_first * sine
        else:
            delta = of_first * saved_first
        tl.store(deltas[:, None] + column, delta, mask=present[:, None] & (column < DELTAS))
    if WANTS_OMEGA:
        copy_rows(x + row * IN, inputs + row * INPUTS, present, IN, INPUTS, COLUMNS)
    if WANTS_X:
        tl.debug_barrier()  # the rows that other threads of this program wrote
        backward_layer(
            deltas,
            omega,
            deltas,
            grad_x + row * IN,
            present,
            IN,
            FEATURES,
            IN,
            False,
            PRECISION,
            COLUMNS,
            DEPTH,
        )


# -- launches --------------------------------------------------------------------------------------


def forward(
    x: Tensor,
    omega: Tensor,
    bias: Tensor | None,
    kind: str,
    scale: float,
    keep: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(y ``[B, width]``, the slopes ``[B, features]``; without rows unless `keep` asks for them).

    "cos_sin" never keeps any.
    """
    batch, features = len(x), len(omega)
    keep = keep and kind != "cos_sin"
    y = x.new_empty(batch, 2 * features if kind == "cos_sin" else features)
    slopes = x.new_empty(batch if keep else 0, features)
    if batch and features:
        columns = 64
        tall = triton.cdiv(batch, 64) * triton.cdiv(features, columns) >= PROGRAMS
        rows = 64 if tall else 32
        if outputs_adjoin(precision):
            (omega,) = transposed([omega], columns)
        launch(
            forward_kernel,
            (triton.cdiv(batch, rows), triton.cdiv(features, columns)),
            x,
            omega,
            bias,
            y,
            slopes,
            scale,
            batch,
            kind,
            keep,
            x.shape[1],
            features,
            precision,
            ROWS=rows,
            COLUMNS=columns,
            DEPTH=depth_of_blocks(precision),
        )
    return y, slopes


def backward(
    grad_y: Tensor,
    x: Tensor,
    omega: Tensor,
    saved: Tensor,
    kind: str,
    wants_x: bool,
    wants_omega: bool,
    wants_bias: bool,
    precision: str,
) -> list[Tensor]:
    """Gradients of x, omega and bias, those that aren't wanted empty.

    `saved`: the slopes, for "cos_sin" y.
    """
    (batch, fan_in), features = x.shape, len(omega)
    wants_parameters = wants_omega or wants_bias
    some = batch > 0 and features > 0
    make = x.new_empty if some else x.new_zeros
    grad_x = make(batch if wants_x else 0, fan_in)
    grad_omega = make(features if wants_parameters else 0, fan_in)
    grad_bias = make(features if wants_parameters else 0)
    if some:
        inputs = x.new_empty(1, batch if wants_parameters else 0, round_up(fan_in, 16))
        deltas = x.new_empty(1, batch, round_up(features, 16))
        settings = row_settings(1, batch, precision)
        launch(
            backward_kernel,
            triton.cdiv(batch, settings["ROWS"]),
            grad_y,
            x,
            omega,
            saved,
            deltas,
            inputs,
            grad_x,
            batch,
            kind,
            wants_x,
            wants_parameters,
            fan_in,
            features,
            inputs.shape[2],
            deltas.shape[2],
            precision,
            **settings,
        )
        if wants_parameters:
            kept = Layout(inputs=(0,), slopes=(-1,), width=inputs.shape[2])
            gradients = [grad_omega, grad_bias]
            weight_gradients(deltas, inputs, gradients, (fan_in, features), kept, precision)
    return [
        grad_x,
        grad_omega if wants_omega else x.new_empty(0, fan_in),
        grad_bias if wants_bias else x.new_empty(0),
    ]
