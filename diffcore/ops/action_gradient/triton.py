"""All steps of the ascent on min(Q1, Q2) in one launch, in Triton.

Every step: both critics forward, keeping the activations' slopes; then back to the action through the
critic that attains the row's minimum (through both, half each, on a tie). A block of rows runs at a
time, its activations and slopes in a scratch buffer of the program's own, which stays in L2 (see
reverse_diffusion/triton.py). Within a block of 8 to 32 rows nearly always both critics attain some
row's minimum, so both are gone back through and the other's share is dropped, unless it has none:
the weights, which are the limit, would have to be read anyway.

The norm over the batch needs all rows before any can move. Programs write every block's part of it,
wait for one another, and each adds up all parts in the same order, so that results don't depend on
who came first, nor on how many programs there are. Waiting takes that all programs run at once:
there are no more of them than processors, each takes several blocks where there are more, and the
launch is a cooperative one, which the driver refuses rather than let it wait forever (and which
doesn't mix with another one in another stream).

On paper, for an H100 as in reverse_diffusion/triton.py, hidden 256, three hidden layers, 20 steps.
A row takes 524,000 FMAs a step, forward and back through two critics; a program reads 2 MB of
float32 weights or 1 MB of half precision for it, in 33,000 or 16,000 cycles.

  batch 1     0.37 ms in float32, 0.19 ms in half precision: the weights' way into one processor.
  batch 256   float32, 8 rows a program: 33,000 cycles of FMAs a step, as many as the weights take,
              0.37 ms. Half precision, 16 rows: 0.19 ms, by the weights.
  batch 4096  float32, 32 rows: 131,000 cycles of FMAs a step, 1.5 ms; the weights of 128 programs,
              268 MB a step, take L2 1 ms. Half precision, 32 rows: 134 MB, 0.5 ms.

To be added: latency, some 1,000 cycles at each of 16 layers a step, 0.2 ms, and where the batch's
norm is limited some 2 microseconds a step in which the programs wait for one another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcore.ops import _triton
from diffcore.ops._triton import (
    activate_with_slope,
    add_hidden,
    add_thin,
    at_least,
    at_most,
    dot,
    rounded_operand,
)


def action_gradient(
    state: Tensor,
    action: Tensor,
    q1: list[Tensor],
    q2: list[Tensor],
    activation: str,
    precision: str,
    steps: int,
    lr: float,
    max_norm: float | None,
    clip_mode: str,
    optimizer: str,
    eps: float,
    low: float,
    high: float,
    improved: Tensor,
) -> None:
    """Fills improved ``[B, A]``."""
    device = state.device
    (batch, state_dim), action_dim = state.shape, action.shape[1]
    norm_clip = "none" if max_norm is None else clip_mode
    processors = _triton.processors(device)
    rows = min(32, _triton.rows_per_program(batch, precision, processors))  # 64 spill on sm_80
    blocks = triton.cdiv(batch, rows)
    programs = min(blocks, processors) if norm_clip == "batch" else blocks
    layout = _triton.hidden_layout(len(q1[0]), 128 if rows == 8 else 64, precision)  # more spill
    columns = triton.next_power_of_2(max(16, action_dim))
    weights, biases = _triton.pack_hidden([*q1[2:-2], *q2[2:-2]], layout.width, precision, device)
    first_weights, first_biases, last_weights, last_biases = (
        torch.stack([q1[i], q2[i]]) for i in (0, 1, -2, -1)
    )
    hidden_layers = len(q1) // 2 - 1
    padded = blocks * rows

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    _triton.launch(
        ascent_kernel,
        programs,
        state,
        action,
        first_weights,
        first_biases,
        weights,
        _triton.forward_weights(weights, precision),
        biases,
        last_weights,
        last_biases,
        improved,
        scratch(2, padded, layout.width),
        scratch(programs, 2, rows, layout.width, dtype=weights.dtype),
        scratch(programs, 2, hidden_layers, rows, layout.width),
        scratch(4, padded, columns),
        scratch(padded, dtype=torch.float64),
        scratch(steps, blocks, dtype=torch.float64),
        torch.zeros(1, dtype=torch.int32, device=device),
        batch,
        steps,
        hidden_layers - 1,
        state_dim,
        action_dim,
        len(q1[0]),
        lr,
        max_norm or 0.0,
        eps,
        low,
        high,
        NORM_CLIP=norm_clip,
        ADAM=optimizer == "adam",
        ACTIVATION=activation,
        PRECISION=precision,
        ROWS=rows,
        WIDTH=layout.width,
        COLUMNS=columns,
        BLOCK_A=min(columns, 32),
        BLOCK_N=layout.block_n,
        BLOCK_K=layout.block_k,
        num_warps=8 if rows == 8 else 4,
        num_stages=2 if rows == 16 and precision != "tf32" else 3,  # a third one spills
        **_triton.all_registers(),
        launch_cooperative_grid=norm_clip == "batch",
    )


@triton.jit(do_not_specialize=["batch", "steps", "inner_layers"])
def ascent_kernel(
    state,
    action,
    first_weights,
    first_biases,
    weights,
    forward_weights,
    biases,
    last_weights,
    last_biases,
    improved,
    state_parts,
    hidden_scratch,
    slope_scratch,
    moving,
    row_norms,
    partial_norms,
    arrived,
    batch,
    steps,
    inner_layers,
    state_dim,
    action_dim,
    hidden,
    lr,
    max_norm,
    eps,
    low,
    high,
    NORM_CLIP: tl.constexpr,
    ADAM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """state_parts ``[2, blocks * ROWS, WIDTH]``: what the state adds to the first layers, bias
    included. moving ``[4, blocks * ROWS, COLUMNS]``: actions, gradients, and Adam's moments."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    blocks = tl.cdiv(batch, ROWS)
    # What goes beyond a block's rows is added to addresses in 64 bits, once; the rest in 32.
    rows = tl.full((), ROWS, tl.int64)
    padded = blocks * rows
    local = tl.arange(0, ROWS)[:, None]
    hidden_scratch += program * rows * 2 * WIDTH
    slope_scratch += program * rows * 2 * (inner_layers + 1) * WIDTH
    actions, gradients = moving, moving + padded * COLUMNS
    first_moments, second_moments = moving + padded * 2 * COLUMNS, moving + padded * 3 * COLUMNS

    for block in range(program, blocks, programs):
        row = block * rows
        here = block * ROWS + local < batch
        for critic in range(2):
            for n in range(0, WIDTH, BLOCK_N):
                column = n + tl.arange(0, BLOCK_N)[None, :]
                real = column < hidden
                sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
                sums += tl.load(first_biases + critic * hidden + column, mask=real, other=0.0)
                w = first_weights + (critic * hidden + column) * (state_dim + action_dim)
                states = state + row * state_dim + local * state_dim
                sums = add_thin(sums, states, w, state_dim, here, real)
                parts = state_parts + (critic * padded + row) * WIDTH
                tl.store(parts + (local * WIDTH + column), sums)
        for a in range(0, COLUMNS, BLOCK_A):
            column = a + tl.arange(0, BLOCK_A)[None, :]
            there = here & (column < action_dim)
            x = action + row * action_dim + (local * action_dim + column)
            x = tl.load(x, mask=there, other=0.0)
            at = row * COLUMNS + (local * COLUMNS + column)
            tl.store(actions + at, x)
            tl.store(first_moments + at, tl.zeros((ROWS, BLOCK_A), tl.float32))
            tl.store(second_moments + at, tl.zeros((ROWS, BLOCK_A), tl.float32))
    tl.debug_barrier()

    # Without hoisting: addresses of every layer, kept through all steps, would take all registers.
    for step in tl.range(steps, disable_licm=True):
        for block in range(program, blocks, programs):
            row = block * rows
            squared_norms = block_gradient(
                first_weights,
                weights,
                forward_weights,
                biases,
                last_weights,
                last_biases,
                state_parts + row * WIDTH,
                padded,
                hidden_scratch,
                slope_scratch,
                actions + row * COLUMNS,
                gradients + row * COLUMNS,
                local,
                block * ROWS + local < batch,
                inner_layers,
                state_dim,
                action_dim,
                hidden,
                ACTIVATION,
                PRECISION,
                ROWS,
                WIDTH,
                COLUMNS,
                BLOCK_A,
                BLOCK_N,
                BLOCK_K,
            )
            if NORM_CLIP == "batch":
                tl.store(partial_norms + step * blocks + block, tl.sum(squared_norms))
            if NORM_CLIP == "row":
                tl.store(row_norms + row + local, squared_norms)
        tl.debug_barrier()

        factor = 1.0
        if NORM_CLIP == "batch":
            wait_for_all(arrived, (step + 1) * programs)
            squares = tl.full((), 0.0, tl.float64)
            for first in range(0, blocks, 1024):
                part = first + tl.arange(0, 1024)
                # Past the L1, which may hold what lay here before the others wrote.
                squares += tl.sum(
                    tl.load(
                        partial_norms + step * blocks + part,
                        mask=part < blocks,
                        other=0.0,
                        cache_modifier=".cg",
                    )
                )
            factor = clip_factor(squares, max_norm)

        # Adam's bias corrections in double, as torch has them.
        step_size = (lr / (1.0 - power(0.9, step + 1))).to(tl.float32)
        root_correction = tl.sqrt(1.0 - power(0.999, step + 1)).to(tl.float32)
        for block in range(program, blocks, programs):
            row = block * rows
            for a in range(0, COLUMNS, BLOCK_A):
                at = row * COLUMNS + (local * COLUMNS + a + tl.arange(0, BLOCK_A)[None, :])
                g = tl.load(gradients + at)
                if NORM_CLIP == "batch":
                    g *= factor
                if NORM_CLIP == "row":
                    g *= clip_factor(tl.load(row_norms + row + local), max_norm)
                x = tl.load(actions + at)
                if ADAM:
                    m = 0.1 * g + 0.9 * tl.load(first_moments + at)
                    v = 0.001 * g * g + 0.999 * tl.load(second_moments + at)
                    tl.store(first_moments + at, m)
                    tl.store(second_moments + at, v)
                    denominator = tl.div_rn(tl.sqrt_rn(v), root_correction) + eps
                    x -= step_size * tl.div_rn(m, denominator)
                else:
                    x -= lr * g
                tl.store(actions + at, at_most(at_least(x, low), high))
        tl.debug_barrier()

    for block in range(program, blocks, programs):
        row = block * rows
        for a in range(0, COLUMNS, BLOCK_A):
            column = a + tl.arange(0, BLOCK_A)[None, :]
            x = tl.load(actions + row * COLUMNS + (local * COLUMNS + column))
            there = (block * ROWS + local < batch) & (column < action_dim)
            out = improved + row * action_dim + (local * action_dim + column)
            tl.store(out, x, mask=there)


@triton.jit
def power(base, exponent):
    """base ** exponent in float64, for whole exponents."""
    result = tl.full((), 1.0, tl.float64)
    factor = tl.full((), 1.0, tl.float64) * base
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * factor, result)
        factor *= factor
        exponent = exponent // 2
    return result


@triton.jit
def clip_factor(squared_norm, max_norm):
    """torch.nn.utils.clip_grad_norm_'s factor."""
    norm = tl.sqrt(squared_norm).to(tl.float32)
    return at_most(tl.div_rn(max_norm, norm + 1e-6), 1.0)


@triton.jit
def wait_for_all(arrived, target):
    """Returns once `arrived` has been called `target` times, by all programs together.

    What they wrote before is seen afterwards. They must all be running.
    """
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="release", scope="gpu")
    while tl.atomic_add(arrived, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def block_gradient(
    first_weights,
    weights,
    forward_weights,
    biases,
    last_weights,
    last_biases,
    state_parts,
    padded,
    hidden_scratch,
    slope_scratch,
    actions,
    gradients,
    local,
    here,
    inner_layers,
    state_dim,
    action_dim,
    hidden,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes the gradients of -min(Q1, Q2); returns their squared norms, float64 ``[ROWS, 1]``.

    state_parts, actions and gradients begin with the block's first row. local: its rows' numbers.
    """
    FAST: tl.constexpr = PRECISION != "float32"
    INPUTS_FIRST: tl.constexpr = PRECISION == "float32"  # of forward_weights
    inputs = state_dim + action_dim
    other_hidden: tl.constexpr = ROWS * WIDTH  # from one set of hidden activations to the other
    q1 = tl.zeros((ROWS, 1), tl.float32)
    q2 = q1
    for critic in tl.range(2, disable_licm=True):
        slopes = slope_scratch + critic * (inner_layers + 1) * ROWS * WIDTH
        for n in range(0, WIDTH, BLOCK_N):
            column = n + tl.arange(0, BLOCK_N)[None, :]
            real = column < hidden
            parts = state_parts + critic * padded * WIDTH
            sums = tl.load(parts + (local * WIDTH + column))
            w = first_weights + (critic * hidden + column) * inputs + state_dim
            sums = add_thin(sums, actions + local * COLUMNS, w, action_dim, here, real)
            h, slope = activate_with_slope(sums, ACTIVATION, FAST)
            at = local * WIDTH + column
            tl.store(hidden_scratch + at, rounded_operand(h, PRECISION))
            tl.store(slopes + at, slope)
        tl.debug_barrier()
        source = hidden_scratch
        for layer in tl.range(inner_layers, disable_licm=True):
            target = hidden_scratch + ((layer + 1) % 2) * other_hidden
            slopes += ROWS * WIDTH
            which = critic * inner_layers + layer
            for n in range(0, WIDTH, BLOCK_N):
                column = n + tl.arange(0, BLOCK_N)[None, :]
                sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
                sums += tl.load(biases + which * WIDTH + column)
                rows, w = source + local * WIDTH, forward_weights + which * WIDTH * WIDTH
                sums = add_hidden(sums, rows, w, column, INPUTS_FIRST, WIDTH, BLOCK_K, PRECISION)
                h, slope = activate_with_slope(sums, ACTIVATION, FAST)
                at = local * WIDTH + column
                tl.store(target + at, rounded_operand(h, PRECISION))
                tl.store(slopes + at, slope)
            tl.debug_barrier()
            source = target
        q = tl.zeros((ROWS, 1), tl.float32) + tl.load(last_biases + critic)
        for n in range(0, WIDTH, BLOCK_N):
            column = n + tl.arange(0, BLOCK_N)[None, :]
            w = tl.load(last_weights + critic * hidden + column, mask=column < hidden, other=0.0)
            h = tl.load(source + (local * WIDTH + column)).to(tl.float32)
            q += tl.sum(h * w, axis=1, keep_dims=True)
        q1 = tl.where(critic == 0, q, q1)
        q2 = q
        tl.debug_barrier()

    # A NaN reaches the action even where the slopes don't carry it (relu's is 0 or 1).
    unequal = tl.where(q1 == q2, 0.5, q1 + q2)
    share1 = tl.where(q1 < q2, 1.0, tl.where(q2 < q1, 0.0, unequal))
    share2 = tl.where(q2 < q1, 1.0, tl.where(q1 < q2, 0.0, unequal))
    for a in range(0, COLUMNS, BLOCK_A):
        column = a + tl.arange(0, BLOCK_A)[None, :]
        at = local * COLUMNS + column
        tl.store(gradients + at, tl.zeros((ROWS, BLOCK_A), tl.float32))

    for critic in tl.range(2, disable_licm=True):
        share = tl.where(critic == 0, share1, share2)
        if tl.max((here & (share != 0.0)).to(tl.int32)) > 0:
            slopes = slope_scratch + ((critic + 1) * (inner_layers + 1) - 1) * ROWS * WIDTH
            for n in range(0, WIDTH, BLOCK_N):
                column = n + tl.arange(0, BLOCK_N)[None, :]
                real = column < hidden
                w = tl.load(last_weights + critic * hidden + column, mask=real, other=0.0)
                at = local * WIDTH + column
                g = w * tl.load(slopes + at)
                tl.store(hidden_scratch + at, rounded_operand(g, PRECISION))
            tl.debug_barrier()
            source = hidden_scratch
            for i in tl.range(inner_layers, disable_licm=True):
                target = hidden_scratch + ((i + 1) % 2) * other_hidden
                slopes -= ROWS * WIDTH
                w = weights + (critic * inner_layers + inner_layers - 1 - i) * WIDTH * WIDTH
                for n in range(0, WIDTH, BLOCK_N):
                    column = n + tl.arange(0, BLOCK_N)[None, :]
                    sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
                    rows = source + local * WIDTH
                    sums = add_hidden(sums, rows, w, column, True, WIDTH, BLOCK_K, PRECISION)
                    at = local * WIDTH + column
                    g = sums * tl.load(slopes + at)
                    tl.store(target + at, rounded_operand(g, PRECISION))
                tl.debug_barrier()
                source = target
            for a in range(0, COLUMNS, BLOCK_A):
                column = a + tl.arange(0, BLOCK_A)[None, :]
                real = column < action_dim
                g = tl.zeros((ROWS, BLOCK_A), tl.float32)
                for k in range(0, WIDTH, BLOCK_K):
                    inner = k + tl.arange(0, BLOCK_K)
                    h = tl.load(source + (local * WIDTH + inner[None, :]))
                    w_in = tl.load(
                        first_weights
                        + (critic * hidden + inner[:, None]) * inputs
                        + state_dim
                        + column,
                        mask=(inner[:, None] < hidden) & real,
                        other=0.0,
                    )
                    g = dot(h, rounded_operand(w_in, PRECISION), g, PRECISION)
                at = local * COLUMNS + column
                so_far = tl.load(gradients + at) - tl.where(share != 0.0, share * g, 0.0)
                tl.store(gradients + at, so_far)
            tl.debug_barrier()

    squared_norms = tl.zeros((ROWS, 1), tl.float64)
    for a in range(0, COLUMNS, BLOCK_A):
        column = a + tl.arange(0, BLOCK_A)[None, :]
        there = here & (column < action_dim)
        at = local * COLUMNS + column
        g = tl.load(gradients + at, mask=there, other=0.0).to(tl.float64)
        squared_norms += tl.sum(g * g, axis=1, keep_dims=True)
    return squared_norms
