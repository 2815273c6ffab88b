"""The whole reverse chain in one launch, in Triton.

A program takes a block of rows through all steps and layers. Weights stream through shared memory
from L2, where all programs find them. x, the predicted x0 and the hidden activations of its rows lie
in a scratch buffer of the program's own in global memory, which L2 and L1 hold. They can't stay in
registers: Triton has no way to index a tile, so the slices of one layer's results that the next
layer's product loops over have to be read back from memory. Holding a layer's input as one operand
instead would take weight tiles of full depth, [hidden, n], whose float32 operands alone exceed the
registers at hidden 256. What the scratch costs beside the weights is small: `2 rows / hidden` of
their bytes, and one barrier a layer, whose latency the first weights have anyway.

All that doesn't depend on x is taken out of the loop: the state's part of the first layer is
computed once per row, the time embedding's part beforehand, as a table with a row per step.

On paper, for an H100 (132 processors at 1.755 GHz, each 128 float32 FMAs and at most 64 bytes from
L2 a cycle; 5.5 TB/s from L2 together), hidden 256, three hidden layers, K = 100. A step multiplies
by 2 x 256 x 256 weights: 131,000 FMAs a row and, a program, 512 KB of float32 or 256 KB of half
precision. Tensor cores, 1,000 FMAs a cycle in TF32 and 2,000 in half precision, take 64 rows through
a step in the time that their weights take, so that with up to 64 rows the weights are the limit.

  batch 1     1 program, limited by the weights' way into one processor. float32: 8,200 cycles a
              step, 0.5 ms the chain; half precision 0.25 ms.
  batch 256   float32, 8 rows a program: 32 programs, 8,200 cycles of FMAs a step, as many as the
              weights take: 0.5 ms. 16 rows would double the FMAs, 4 leave the weights as they are.
              Half precision, 16 rows, the least that tensor cores take: 0.25 ms, by the weights.
  batch 4096  float32, 32 rows: 128 programs, 33,000 cycles of FMAs a step, 1.9 ms; their weights,
              64 MB a step, take L2 1.2 ms. Half precision, 64 rows: 64 programs, limited by each
              processor's own path again, 0.25 ms; with 32 rows twice as many programs would read
              32 MB a step, which L2 gives in 0.6 ms.

Hence `_triton.rows_per_program`. To be added: the latency of some 1,000 cycles with which every
layer starts, 4 times a step, 0.2 ms the chain; that and the first weights of a layer aren't fetched
while the one before it still runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcore.ops import _triton
from diffcore.ops._activations import ACTIVATIONS
from diffcore.ops._triton import (
    activate,
    add_hidden,
    add_thin,
    at_least,
    at_most,
    dot,
    load_seed,
    normals,
    rounded_operand,
)


def reverse_diffusion(
    state: Tensor,
    x_init: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    parameters: list[Tensor],
    coefficients: Tensor,
    embedding: Tensor,
    noise_scale: float,
    clip: float,
    activation: str,
    precision: str,
    trajectory: Tensor | None,
    actions: Tensor,
) -> None:
    """Fills actions ``[B, A]`` and, if given, trajectory ``[steps + 1, B, A]``."""
    batch, state_dim = state.shape
    hidden, action_dim = parameters[4].shape[0], actions.shape[1]
    first_weight, inner = parameters[4], parameters[6:-2]
    rows = _triton.rows_per_program(batch, precision, _triton.processors(state.device))
    most_columns = 256 if rows == 8 else 128  # more spill, with 32 rows on AMD even these
    if rows == 32 and not _triton.on_nvidia():
        most_columns = 64
    layout = _triton.hidden_layout(hidden, most_columns, precision)
    programs = triton.cdiv(batch, rows)
    step_bias = _step_bias(parameters, embedding, activation, action_dim, state_dim)
    weights, biases = _triton.pack_hidden(inner, layout.width, precision, state.device)
    last_weight, last_bias = parameters[-2:]
    columns = triton.next_power_of_2(max(16, action_dim))
    if _triton.outputs_adjoin(precision):
        (last_weight,) = _triton.transposed([last_weight], columns)
    scratch = state.new_empty(programs * rows, layout.width + 2 * columns)
    hidden_scratch = torch.empty(
        2 * programs * rows * layout.width, dtype=weights.dtype, device=state.device
    )
    seed_value, seed_pointer = _triton.seed_arguments(seed)
    _triton.launch(
        chain_kernel,
        programs,
        state,
        x_init,
        noise,
        seed_value,
        seed_pointer,
        first_weight,
        step_bias,
        _triton.forward_weights(weights, precision),
        biases,
        last_weight,
        last_bias,
        coefficients,
        scratch,
        hidden_scratch,
        trajectory,
        actions,
        batch,
        len(coefficients),
        len(inner) // 2,
        state_dim,
        action_dim,
        first_weight.shape[1],
        hidden,
        noise_scale,
        clip,
        DRAWS=noise is None and noise_scale != 0,
        ACTIVATION=activation,
        PRECISION=precision,
        ROWS=rows,
        WIDTH=layout.width,
        COLUMNS=columns,
        BLOCK_A=min(columns, 32),
        BLOCK_N=layout.block_n,
        BLOCK_K=layout.block_k,
        num_warps=4 if rows == 8 else 8,
        num_stages=3,
        **_triton.all_registers(),
    )


def _step_bias(
    parameters: list[Tensor], embedding: Tensor, activation: str, action_dim: int, state_dim: int
) -> Tensor:
    """``[steps, hidden]``: what a step adds to the first layer, W_t time_mlp(embedding) + b."""
    w0, b0, w1, b1, weight, bias = parameters[:6]
    with torch.autocast(embedding.device.type, enabled=False):
        pre = torch.addmm(b0, embedding, w0.T)
        time = torch.addmm(b1, ACTIVATIONS[activation].forward(pre), w1.T)
        return torch.addmm(bias, time, weight[:, action_dim : weight.shape[1] - state_dim].T)


@triton.jit(do_not_specialize=["batch", "steps", "inner_layers", "seed_value"])
def chain_kernel(
    state,
    x_init,
    noise,
    seed_value,
    seed_pointer,
    first_weight,
    step_bias,
    weights,
    biases,
    last_weight,
    last_bias,
    coefficients,
    scratch,
    hidden_scratch,
    trajectory,
    actions,
    batch,
    steps,
    inner_layers,
    state_dim,
    action_dim,
    first_inputs,
    hidden,
    noise_scale,
    clip,
    DRAWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    FAST: tl.constexpr = PRECISION != "float32"
    INPUTS_FIRST: tl.constexpr = PRECISION == "float32"
    program = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, ROWS)[:, None]
    row = program * ROWS + local
    here = row < batch
    seed = load_seed(seed_value, seed_pointer)
    batch = batch.to(tl.int64)  # of what it is multiplied with, steps, there may be many

    # The program's own memory: state_part [ROWS, WIDTH], x and x0 [ROWS, COLUMNS]; hidden twice.
    scratch += program * ROWS * (WIDTH + 2 * COLUMNS)
    state_part = scratch + local * WIDTH
    x_rows = scratch + ROWS * WIDTH + local * COLUMNS
    x0_rows = x_rows + ROWS * COLUMNS
    hidden_scratch += program * 2 * ROWS * WIDTH

    for n in range(0, WIDTH, BLOCK_N):
        column = n + tl.arange(0, BLOCK_N)[None, :]
        sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
        w = first_weight + column * first_inputs + (first_inputs - state_dim)
        sums = add_thin(sums, state + row * state_dim, w, state_dim, here, column < hidden)
        tl.store(state_part + column, sums)

    for a in range(0, COLUMNS, BLOCK_A):
        column = a + tl.arange(0, BLOCK_A)[None, :]
        there = here & (column < action_dim)
        if x_init is None:
            x = tl.where(there, normals(seed, row, 0, column), 0.0)
        else:
            x = tl.load(x_init + row * action_dim + column, mask=there, other=0.0)
        tl.store(x_rows + column, x)
        tl.store(x0_rows + column, tl.zeros((ROWS, BLOCK_A), tl.float32))
        if trajectory is not None:
            tl.store(trajectory + row * action_dim + column, x, mask=there)
    tl.debug_barrier()

    # Without hoisting: addresses of every layer, kept through all steps, would take all registers.
    for step in tl.range(steps, disable_licm=True):
        # x and state meet float32 weights in any precision: the layer is thin, and x is what the
        # chain refines.
        for n in range(0, WIDTH, BLOCK_N):
            column = n + tl.arange(0, BLOCK_N)[None, :]
            real = column < hidden
            sums = tl.load(state_part + column)
            sums += tl.load(step_bias + step * hidden + column, mask=real, other=0.0)
            w = first_weight + column * first_inputs
            sums = add_thin(sums, x_rows, w, action_dim, here, real)
            h = rounded_operand(activate(sums, ACTIVATION, FAST), PRECISION)
            tl.store(hidden_scratch + local * WIDTH + column, h)
        tl.debug_barrier()

        source = hidden_scratch
        for layer in tl.range(inner_layers, disable_licm=True):
            target = hidden_scratch + ((layer + 1) % 2) * ROWS * WIDTH
            for n in range(0, WIDTH, BLOCK_N):
                column = n + tl.arange(0, BLOCK_N)[None, :]
                sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
                sums += tl.load(biases + layer * WIDTH + column)
                h_rows, w = source + local * WIDTH, weights + layer * WIDTH * WIDTH
                sums = add_hidden(sums, h_rows, w, column, INPUTS_FIRST, WIDTH, BLOCK_K, PRECISION)
                h = rounded_operand(activate(sums, ACTIVATION, FAST), PRECISION)
                tl.store(target + local * WIDTH + column, h)
            tl.debug_barrier()
            source = target

        for a in range(0, COLUMNS, BLOCK_A):
            column = a + tl.arange(0, BLOCK_A)[None, :]
            real = column < action_dim
            there = here & real
            eps = tl.zeros((ROWS, BLOCK_A), tl.float32)
            eps += tl.load(last_bias + column, mask=real, other=0.0)
            for k in range(0, WIDTH, BLOCK_K):
                inner = k + tl.arange(0, BLOCK_K)
                h = tl.load(source + local * WIDTH + inner[None, :])
                if INPUTS_FIRST:
                    at = inner[:, None] * COLUMNS + column
                else:
                    at = column * hidden + inner[:, None]
                exists = real & (inner[:, None] < hidden)
                w = tl.load(last_weight + at, mask=exists, other=0.0)
                eps = dot(h, rounded_operand(w, PRECISION), eps, PRECISION)

            x = tl.load(x_rows + column)
            x0_previous = tl.load(x0_rows + column)
            c0 = tl.load(coefficients + step * 7)
            c1 = tl.load(coefficients + step * 7 + 1)
            c2 = tl.load(coefficients + step * 7 + 2)
            c3 = tl.load(coefficients + step * 7 + 3)
            c4 = tl.load(coefficients + step * 7 + 4)
            c5 = tl.load(coefficients + step * 7 + 5)
            c6 = tl.load(coefficients + step * 7 + 6)
            x0 = at_most(at_least(c0 * x - c1 * eps, -clip), clip)
            x = c2 * x0 + c3 * x + c4 * eps + c6 * x0_previous
            if noise is not None:
                at = (step * batch + row) * action_dim + column
                x += c5 * noise_scale * tl.load(noise + at, mask=there, other=0.0)
            elif DRAWS:
                x += c5 * noise_scale * normals(seed, row, step + 1, column)
            tl.store(x_rows + column, x)
            tl.store(x0_rows + column, x0)
            if trajectory is not None:
                at = ((step + 1) * batch + row) * action_dim + column
                tl.store(trajectory + at, x, mask=there)
        tl.debug_barrier()

    for a in range(0, COLUMNS, BLOCK_A):
        column = a + tl.arange(0, BLOCK_A)[None, :]
        x = tl.load(x_rows + column)
        x = at_most(at_least(x, -clip), clip)
        tl.store(actions + row * action_dim + column, x, mask=here & (column < action_dim))
