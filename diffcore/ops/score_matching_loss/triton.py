"""Diff-SR's score matching loss with its gradients on Triton kernels.

With W_s the rows d * S + s of the weight, [features, hidden], and g_s the loss's slope at
coordinate s of the score, one number a row, four launches, in float32 after one that transposes W:

  score   Z_s = hidden W_s^T + b_s    score_s = sum_d psi Z_s    grad psi = sum_s g_s Z_s
  hidden  grad hidden = sum_s (g_s psi) W_s
  weight  dW_s = (g_s psi)^T hidden   db_s = sum of g_s psi over the batch
  add     what the first two summed over groups of coordinates; the loss

zeta, [batch, features, state], never exists. A program of `score` holds Z_s of a block of rows and
all features in registers: score_s is a sum along its rows, after which g_s is known and Z_s joins
psi's gradient before the next coordinate replaces it. Features beyond one block are passed over
twice. In the other two g_s psi is made from its factors as the product reads it. Each is a matrix
product of the same size. Sums that would leave SMs idle are cut into at most MOST_GROUPS groups of
coordinates. All sums are made in a fixed order, without atomics.

Roofline on H100 for batch 256, 256 features, 17 coordinates, 512 hidden: 256 * 256 * 17 * 512 = 570
MFMA a product; at 132 * 128 FMAs a cycle 34,000 cycles or 20 us each in float32, 60 us in all. (A
fourth product would be needed if zeta were made again for psi's gradient.) W, 8.9 MB, is read by
each of 8 blocks of 32 rows: 71 MB from L2 at some 5.5 TB/s, 13 us for `score` and for `hidden`.
That is the limit with tensor cores, whose 1.1 GFLOP a product take 3 us and less; blocks of 64
rows, which would halve it, need more registers than there are. `weight` reads little and writes 8.9
MB: 3 us.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from diffcore.ops._triton import dot, launch, operand, outputs_adjoin, transposed
from diffcore.ops.mlp.triton import (
    MOST_SUMMED_ROWS,
    PROGRAMS,
    depth_of_blocks,
    existing,
    product,
    rows_of_program,
)

#: Groups of coordinates whose gradients of psi and hidden are summed apart; each takes batch *
#: (features + hidden) floats of memory.
MOST_GROUPS = 8

#: Features whose part of zeta one program holds.
MOST_FEATURES = 256

#: Values that one program of the last launch adds up.
ADDED = 1024


@triton.jit
def zeta_block(
    hidden,
    weight,
    bias,
    s,
    FIRST: tl.constexpr,
    STATE: tl.constexpr,
    FEATURES: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Z_s of rows and of BLOCK features from FIRST on, of the last one again where there are none.

    weight: in float32 ``[STATE * HIDDEN, FEATURES padded to blocks]`` (`outputs_adjoin`).
    """
    feature = existing(tl.arange(0, BLOCK), FEATURES - FIRST, BLOCK)
    if PRECISION == "float32":
        PADDED: tl.constexpr = (FEATURES + BLOCK - 1) // BLOCK * BLOCK
        weight += s * HIDDEN * PADDED + FIRST
        zeta = product(hidden, weight, feature, HIDDEN, PADDED, 1, PRECISION, DEPTH)
    else:
        weight += FIRST * STATE * HIDDEN + s * HIDDEN
        stride: tl.constexpr = STATE * HIDDEN
        zeta = product(hidden, weight, feature, HIDDEN, 1, stride, PRECISION, DEPTH)
    return zeta + tl.load(bias + (FIRST + feature) * STATE + s)[None, :]


@triton.jit(do_not_specialize=["batch"])
def score_kernel(
    psi,
    hidden,
    weight,
    bias,
    offset,
    score_weight,
    slopes,
    losses,
    grad_psi,
    batch,
    scale,
    WANTS_PSI: tl.constexpr,
    STATE: tl.constexpr,
    FEATURES: tl.constexpr,
    HIDDEN: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A block of rows and a group of coordinates: slopes, loss, and its part of psi's gradient."""
    row, present = rows_of_program(batch, ROWS)
    group = tl.program_id(1)
    hidden += row * HIDDEN
    psi += row * FEATURES
    grad_psi += (group.to(tl.int64) * batch + row) * FEATURES
    row_weight = tl.load(score_weight + row)
    loss = tl.zeros((ROWS,), tl.float32)
    grad = tl.zeros((ROWS, BLOCK), tl.float32)
    first_coordinate = group * STATE // GROUPS
    for s in range(first_coordinate, (group + 1) * STATE // GROUPS):
        score = tl.zeros((ROWS,), tl.float32)
        zeta = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in tl.static_range(0, FEATURES, BLOCK):
            feature = first + tl.arange(0, BLOCK)
            zeta = zeta_block(
                hidden, weight, bias, s, first, STATE, FEATURES, HIDDEN, PRECISION, BLOCK, DEPTH
            )
            exists = (feature < FEATURES)[None, :]
            factor = tl.load(psi[:, None] + feature[None, :], mask=exists, other=0.0)
            score += tl.sum(factor * zeta, axis=1)
        residual = row_weight * score + tl.load(offset + row * STATE + s)
        slope = row_weight * residual
        tl.store(slopes + row * STATE + s, slope, mask=present)
        loss += residual * residual
        if WANTS_PSI:
            if FEATURES <= BLOCK:
                grad += slope[:, None] * zeta
            else:
                for first in tl.static_range(0, FEATURES, BLOCK):
                    feature = first + tl.arange(0, BLOCK)
                    zeta = zeta_block(
                        hidden,
                        weight,
                        bias,
                        s,
                        first,
                        STATE,
                        FEATURES,
                        HIDDEN,
                        PRECISION,
                        BLOCK,
                        DEPTH,
                    )
                    inside = present[:, None] & (feature < FEATURES)[None, :]
                    at = grad_psi[:, None] + feature[None, :]
                    sums = scale * slope[:, None] * zeta
                    if s > first_coordinate:
                        sums += tl.load(at, mask=inside)
                    tl.store(at, sums, mask=inside)
    if WANTS_PSI and FEATURES <= BLOCK:
        feature = tl.arange(0, BLOCK)
        inside = present[:, None] & (feature < FEATURES)[None, :]
        tl.store(grad_psi[:, None] + feature[None, :], scale * grad, mask=inside)
    part = group * tl.num_programs(0) + tl.program_id(0)
    tl.store(losses + part, tl.sum(tl.where(present, loss, 0.0)))


@triton.jit(do_not_specialize=["batch"])
def hidden_kernel(
    psi,
    weight,
    slopes,
    grad_hidden,
    batch,
    scale,
    STATE: tl.constexpr,
    FEATURES: tl.constexpr,
    HIDDEN: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A block of rows and columns of hidden's gradient, from a group of coordinates."""
    row, present = rows_of_program(batch, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    readable = existing(column, HIDDEN, COLUMNS)
    group = tl.program_id(2)
    psi += row * FEATURES
    slopes += row * STATE
    BLOCKS: tl.constexpr = (FEATURES + DEPTH - 1) // DEPTH
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    # One loop over coordinates and blocks of features, so that loads run ahead across coordinates.
    first = group * STATE // GROUPS * BLOCKS
    for i in range(first, (group + 1) * STATE // GROUPS * BLOCKS):
        s = i // BLOCKS
        feature = i % BLOCKS * DEPTH + tl.arange(0, DEPTH)
        at = psi[:, None] + feature[None, :]
        output = feature.to(tl.int64) * STATE + s
        rows = weight + (output * HIDDEN)[:, None] + readable[None, :]
        if FEATURES % DEPTH == 0:
            factor, w = tl.load(at), tl.load(rows)
        else:
            factor = tl.load(at, mask=(feature < FEATURES)[None, :], other=0.0)
            w = tl.load(rows, mask=(feature < FEATURES)[:, None], other=0.0)
        factor *= tl.load(slopes + s)[:, None]
        sums = dot(operand(factor, PRECISION), operand(w, PRECISION), sums, PRECISION)
    target = grad_hidden + (group.to(tl.int64) * batch + row) * HIDDEN
    inside = present[:, None] & (column < HIDDEN)[None, :]
    tl.store(target[:, None] + column[None, :], scale * sums, mask=inside)


@triton.jit(do_not_specialize=["batch"])
def weight_kernel(
    psi,
    hidden,
    slopes,
    grad_weight,
    grad_bias,
    batch,
    scale,
    WANTS_WEIGHT: tl.constexpr,
    WANTS_BIAS: tl.constexpr,
    STATE: tl.constexpr,
    FEATURES: tl.constexpr,
    HIDDEN: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A block of dW_s and, with the first columns, of db_s: sums over the batch.

    PART rows are summed at a time, lest rounding errors pile up along the batch.
    """
    s = tl.program_id(0)
    feature = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    of_psi = psi + existing(feature, FEATURES, OUTPUTS)[None, :]
    of_hidden = hidden + existing(column, HIDDEN, COLUMNS)[None, :]
    total = tl.zeros((OUTPUTS, COLUMNS), tl.float32)
    bias_sums = tl.zeros((DEPTH, OUTPUTS), tl.float32)
    for part in range(0, batch, PART):
        sums = tl.zeros((OUTPUTS, COLUMNS), tl.float32)
        end = tl.minimum(part + PART, batch)
        for first in range(part, end, DEPTH):
            row = (first + tl.arange(0, DEPTH)).to(tl.int64)
            exists = row < end
            slope = tl.load(slopes + row * STATE + s, mask=exists, other=0.0)[:, None]
            delta = slope * tl.load(of_psi + row[:, None] * FEATURES, exists[:, None], 0.0)
            bias_sums += delta
            if WANTS_WEIGHT:
                values = tl.load(of_hidden + row[:, None] * HIDDEN, exists[:, None], 0.0)
                transposed = tl.trans(operand(delta, PRECISION))
                sums = dot(transposed, operand(values, PRECISION), sums, PRECISION)
        total += sums
    output = feature.to(tl.int64) * STATE + s
    if WANTS_WEIGHT:
        inside = (feature < FEATURES)[:, None] & (column < HIDDEN)[None, :]
        tl.store(grad_weight + output[:, None] * HIDDEN + column[None, :], scale * total, inside)
    if WANTS_BIAS:
        inside = (feature < FEATURES) & (tl.program_id(2) == 0)
        tl.store(grad_bias + output, scale * tl.sum(bias_sums, axis=0), mask=inside)


@triton.jit
def add_parts(parts, target, first, size, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """target = the sum of COUNT parts that follow one another, BLOCK elements from `first` on."""
    element = first + tl.arange(0, BLOCK).to(tl.int64)
    inside = element < size
    sums = tl.zeros((BLOCK,), tl.float32)
    for part in range(COUNT):
        sums += tl.load(parts + part * size + element, mask=inside, other=0.0)
    tl.store(target + element, sums, mask=inside)


@triton.jit(do_not_specialize=["loss_parts", "batch", "psi_size", "hidden_size"])
def add_kernel(
    losses,
    loss,
    loss_parts,
    batch,
    psi_parts,
    grad_psi,
    psi_size,
    hidden_parts,
    grad_hidden,
    hidden_size,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program 0: the loss. The others: a block of psi's or of hidden's gradient from its groups."""
    block = tl.program_id(0)
    psi_blocks = tl.cdiv(psi_size, BLOCK)
    if block == 0:
        sums = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, loss_parts, BLOCK):
            part = start + tl.arange(0, BLOCK)
            sums += tl.load(losses + part, mask=part < loss_parts, other=0.0)
        tl.store(loss, (tl.sum(sums) / batch).to(tl.float32))
    elif block <= psi_blocks:
        first = (block - 1).to(tl.int64) * BLOCK
        add_parts(psi_parts, grad_psi, first, psi_size, GROUPS, BLOCK)
    else:
        first = (block - 1 - psi_blocks).to(tl.int64) * BLOCK
        add_parts(hidden_parts, grad_hidden, first, hidden_size, GROUPS, BLOCK)


# -- launches --------------------------------------------------------------------------------------


def loss_and_gradients(
    psi: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    offset: Tensor,
    score_weight: Tensor,
    loss: Tensor,
    grad_psi: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    *,
    wanted: list[bool],
    precision: str,
) -> None:
    """Fills the loss and those of its four gradients that are `wanted`."""
    (batch, features), width, state = psi.shape, hidden.shape[1], offset.shape[1]
    wants_psi, wants_hidden, wants_weight, wants_bias = wanted
    rows = 32
    depth = depth_of_blocks(precision)
    row_blocks = triton.cdiv(batch, rows)
    groups = min(state, MOST_GROUPS, triton.cdiv(2 * PROGRAMS, row_blocks))
    scale = 2 / batch
    sizes = (state, features, width, groups, precision)
    slopes = psi.new_empty(batch, state)
    losses = psi.new_empty(groups, row_blocks)
    block = max(16, min(MOST_FEATURES, triton.next_power_of_2(features)))
    forward_weight = weight
    if outputs_adjoin(precision):
        (forward_weight,) = transposed([weight.view(features, state * width)], block)
    psi_parts, hidden_parts = (
        grad if groups == 1 else grad.new_empty(groups, *grad.shape)
        for grad in (grad_psi, grad_hidden)
    )
    launch(
        score_kernel,
        (row_blocks, groups),
        *(psi, hidden, forward_weight, bias, offset, score_weight),
        slopes,
        losses,
        psi_parts,
        batch,
        scale,
        wants_psi,
        *sizes,
        ROWS=rows,
        BLOCK=block,
        DEPTH=depth,
        num_warps=8,
    )
    if wants_hidden:
        launch(
            hidden_kernel,
            (row_blocks, triton.cdiv(width, 128), groups),
            psi,
            weight,
            slopes,
            hidden_parts,
            batch,
            scale,
            *sizes,
            ROWS=rows,
            COLUMNS=128,
            DEPTH=depth,
            num_warps=4 if precision == "float32" else 8,
        )
    if wants_weight or wants_bias:
        launch(
            weight_kernel,
            (state, triton.cdiv(features, 64), triton.cdiv(width, 64) if wants_weight else 1),
            psi,
            hidden,
            slopes,
            grad_weight,
            grad_bias,
            batch,
            scale,
            wants_weight,
            wants_bias,
            state,
            features,
            width,
            MOST_SUMMED_ROWS,
            precision,
            OUTPUTS=64,
            COLUMNS=64,
            DEPTH=depth,
        )
    psi_size, hidden_size = (0 if groups == 1 else grad.numel() for grad in (grad_psi, grad_hidden))
    launch(
        add_kernel,
        1 + triton.cdiv(psi_size, ADDED) + triton.cdiv(hidden_size, ADDED),
        losses,
        loss,
        losses.numel(),
        batch,
        psi_parts,
        grad_psi,
        psi_size,
        hidden_parts,
        grad_hidden,
        hidden_size,
        groups,
        ADDED,
    )
