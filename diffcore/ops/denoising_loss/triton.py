"""The denoising loss with its gradients on Triton kernels, and the noise that it draws.

Layout. One launch takes blocks of rows from the level's embedding through the time MLP, the
corrupted action and the trunk to the loss, and straight back again; what the layers need on the way
lies in memory that only the block's own program reads back, from L1 or L2. Two launches sum the
weights' gradients of both MLPs over the batch, one the loss. See ``ops/mlp/triton.py``, whose parts
these are.

Roofline on H100 for batch 256, hidden 256, 3 hidden layers, state 17, action 6: a row takes 162e3
FMAs forward, as many back and as many for the weights' gradients. 16 programs of 16 rows on as many
SMs: 256 * 324e3 / (16 * 128) = 40,500 cycles or 24 us in float32; weights of 650 KB twice from L2
at some 50 B a cycle: 26,000 cycles or 15 us, the limit with tensor cores. The same work launched
layer by layer would use all SMs but takes 25 launches of 2.5 us and more. From batch 2,112 on,
every SM has work.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from diffcore.ops._triton import all_registers, launch, load_seed, round_up, seed_arguments
from diffcore.ops._triton import normals as draw_normals
from diffcore.ops.mlp.triton import (
    backward_layers,
    copy_rows,
    delta_columns,
    forward_layers,
    forward_parameters,
    layout,
    row_settings,
    rows_of_program,
    weight_gradients,
    widths_of,
)


@triton.jit(do_not_specialize=["batch", "level_count"])
def rows_kernel(
    state,
    action,
    noise,
    weight,
    t,
    levels,
    embedding,
    time_parameters,
    trunk_parameters,
    time_forward,
    trunk_forward,
    time_saved,
    trunk_saved,
    time_deltas,
    trunk_deltas,
    grad_input,
    losses,
    grad_state,
    grad_action,
    batch,
    level_count,
    scale,
    PER_ROW: tl.constexpr,
    BACKWARD: tl.constexpr,
    WANTS_STATE: tl.constexpr,
    WANTS_ACTION: tl.constexpr,
    STATE: tl.constexpr,
    ACTION: tl.constexpr,
    TIME: tl.constexpr,
    GRAD_INPUT: tl.constexpr,
    TIME_WIDTHS: tl.constexpr,
    TIME_ACTIVATIONS: tl.constexpr,
    TIME_INPUTS: tl.constexpr,
    TIME_SLOPES: tl.constexpr,
    TIME_SAVED: tl.constexpr,
    TIME_DELTAS: tl.constexpr,
    TRUNK_WIDTHS: tl.constexpr,
    TRUNK_ACTIVATIONS: tl.constexpr,
    TRUNK_INPUTS: tl.constexpr,
    TRUNK_SLOPES: tl.constexpr,
    TRUNK_SAVED: tl.constexpr,
    TRUNK_DELTAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row, present = rows_of_program(batch, ROWS)
    level = tl.load(t + row)
    known = (level >= 0) & (level < level_count)
    level = tl.where(known, level, 0)
    signal = tl.load(levels + 2 * level, mask=known, other=float("nan"))[:, None]
    spread = tl.load(levels + 2 * level + 1, mask=known, other=float("nan"))[:, None]
    action += row * ACTION
    noise += row * ACTION
    time_saved += row * TIME_SAVED
    trunk_saved += row * TRUNK_SAVED
    time_deltas += row * TIME_DELTAS[len(TIME_ACTIVATIONS)]
    trunk_deltas += row * TRUNK_DELTAS[len(TRUNK_ACTIVATIONS)]
    grad_input += row * GRAD_INPUT

    TIME_PADDED: tl.constexpr = (TIME + 15) // 16 * 16
    # The trunk's input: [corrupted action, time features, state].
    copy_rows(embedding + level * TIME, time_saved, present, TIME, TIME_PADDED, COLUMNS)
    forward_layers(
        time_forward,
        0,
        time_saved,
        trunk_saved + ACTION,
        present,
        False,
        1,
        TIME_WIDTHS,
        TIME_ACTIVATIONS,
        TIME_INPUTS,
        TIME_SLOPES,
        PRECISION,
        COLUMNS,
        DEPTH,
    )
    for first in range(0, ACTION, 16):
        column = first + tl.arange(0, 16)[None, :]
        inside = present[:, None] & (column < ACTION)
        clean = tl.load(action[:, None] + column, mask=inside, other=0.0)
        z = tl.load(noise[:, None] + column, mask=inside, other=0.0)
        tl.store(trunk_saved[:, None] + column, signal * clean + spread * z, mask=inside)
    REST: tl.constexpr = (ACTION + TIME + STATE + 15) // 16 * 16 - ACTION - TIME
    copy_rows(state + row * STATE, trunk_saved + ACTION + TIME, present, STATE, REST, COLUMNS)

    # eps takes the place of the last layer's delta, and then becomes it.
    LAST: tl.constexpr = len(TRUNK_ACTIVATIONS) - 1
    eps = trunk_deltas + TRUNK_DELTAS[LAST]
    forward_layers(
        trunk_forward,
        0,
        trunk_saved,
        eps,
        present,
        True,
        1,
        TRUNK_WIDTHS,
        TRUNK_ACTIVATIONS,
        TRUNK_INPUTS,
        TRUNK_SLOPES,
        PRECISION,
        COLUMNS,
        DEPTH,
    )
    tl.debug_barrier()  # eps was written by other threads of this program
    slope = 2.0 * scale
    if weight is not None:
        row_weight = tl.load(weight + row)
        slope *= row_weight[:, None]
    loss = tl.zeros((ROWS,), tl.float32)
    for first in range(0, ACTION, 16):
        column = first + tl.arange(0, 16)[None, :]
        inside = present[:, None] & (column < ACTION)
        residual = tl.load(eps[:, None] + column, mask=inside, other=0.0)
        residual -= tl.load(noise[:, None] + column, mask=inside, other=0.0)
        loss += tl.sum(residual * residual, axis=1)
        tl.debug_barrier()  # several threads may have read the same eps
        tl.store(eps[:, None] + column, slope * residual, mask=inside)
    if weight is not None:
        loss *= row_weight
    if PER_ROW:
        tl.store(losses + row, scale * loss, mask=present)
    else:
        tl.store(losses + tl.program_id(0), scale * tl.sum(loss))

    if BACKWARD:
        backward_layers(
            trunk_parameters,
            0,
            trunk_saved,
            trunk_deltas,
            grad_input,
            present,
            True,
            1,
            TRUNK_WIDTHS,
            TRUNK_SLOPES,
            TRUNK_DELTAS,
            PRECISION,
            COLUMNS,
            DEPTH,
        )
        tl.debug_barrier()  # grad_input was written by other threads of this program
        if WANTS_ACTION:
            grad_action += row * ACTION
            for first in range(0, ACTION, 16):
                column = first + tl.arange(0, 16)[None, :]
                inside = present[:, None] & (column < ACTION)
                grad = tl.load(grad_input[:, None] + column, mask=inside, other=0.0)
                tl.store(grad_action[:, None] + column, signal * grad, mask=inside)
        if WANTS_STATE:
            of_state = grad_input + ACTION + TIME
            copy_rows(of_state, grad_state + row * STATE, present, STATE, STATE, COLUMNS)
        OF_FEATURES: tl.constexpr = TIME_DELTAS[len(TIME_ACTIVATIONS) - 1]
        of_features = time_deltas + OF_FEATURES
        copy_rows(grad_input + ACTION, of_features, present, TIME, TIME_PADDED, COLUMNS)
        backward_layers(
            time_parameters,
            0,
            time_saved,
            time_deltas,
            grad_input,
            present,
            False,
            1,
            TIME_WIDTHS,
            TIME_SLOPES,
            TIME_DELTAS,
            PRECISION,
            COLUMNS,
            DEPTH,
        )


@triton.jit(do_not_specialize=["seed_value", "rows", "columns"])
def normals_kernel(
    z, seed_value, seed_pointer, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    drawn = draw_normals(load_seed(seed_value, seed_pointer), row, 0, column)
    tl.store(z + row * columns + column, drawn, mask=(row < rows) & (column < columns))


# -- launches --------------------------------------------------------------------------------------


def normals(seed: Tensor, z: Tensor) -> None:
    """Fills z ``[rows, columns]`` with step 0 of the seed's noise."""
    rows, columns = z.shape
    grid = (triton.cdiv(rows, 32), triton.cdiv(columns, 16))
    launch(normals_kernel, grid, z, *seed_arguments(seed), rows, columns, ROWS=32, COLUMNS=16)


def loss_and_gradients(
    state: Tensor,
    action: Tensor,
    noise: Tensor,
    weight: Tensor | None,
    t: Tensor,
    levels: Tensor,
    embedding: Tensor,
    activation: str,
    per_row: bool,
    grads: list[Tensor],
    wanted: list[bool],
    parameters: list[Tensor],
    precision: str,
) -> Tensor:
    """The loss, a row's each if `per_row`; fills `grads` with those of it or their sum.

    Of [state, action, *parameters] those that are wanted. A row whose level doesn't exist can't raise
    an error without waiting for the device: it makes the loss, its own gradients and the parameters'
    NaN.
    """
    (batch, state_dim), action_dim = state.shape, action.shape[1]
    backward, wants_parameters = any(wanted), any(wanted[2:])
    time, trunk = parameters[:4], parameters[4:]
    names = (
        (activation, "identity"),
        (*[activation] * (len(trunk) // 2 - 1), "identity"),
    )
    widths = [widths_of(p, len(n)) for p, n in zip((time, trunk), names, strict=True)]
    kept = [layout(w, n, backward) for w, n in zip(widths, names, strict=True)]
    columns = [delta_columns(w) for w in widths]
    # As ensembles of one: what `weight_gradients` takes.
    saved = [state.new_empty(1, batch, k.width) for k in kept]
    deltas = [state.new_empty(1, batch, c[-1]) for c in columns]
    grad_input = state.new_empty(batch if backward else 0, round_up(widths[1][0], 16))
    settings = row_settings(1, batch, precision)
    if precision == "float32":  # else a few registers spill, on sm_100 with three stages too
        settings |= {"num_stages": 2, **all_registers()}
    forward = forward_parameters(parameters, settings["COLUMNS"], precision)
    programs = triton.cdiv(batch, settings["ROWS"])
    losses = state.new_empty(batch if per_row else programs)
    launch(
        rows_kernel,
        programs,
        *(state, action, noise, weight, t, levels, embedding),
        tuple(time),
        tuple(trunk),
        forward[:4],
        forward[4:],
        *saved,
        *deltas,
        grad_input,
        losses,
        *grads[:2],
        batch,
        len(levels),
        1 / ((1 if per_row else batch) * action_dim),
        per_row,
        backward,
        *wanted[:2],
        *(state_dim, action_dim, embedding.shape[1], grad_input.shape[1]),
        *(widths[0], names[0], *kept[0], columns[0]),
        *(widths[1], names[1], *kept[1], columns[1]),
        precision,
        **settings,
    )
    if wants_parameters:
        weight_gradients(deltas[0], saved[0], grads[2:6], widths[0], kept[0], precision)
        weight_gradients(deltas[1], saved[1], grads[6:], widths[1], kept[1], precision)
    return losses if per_row else losses.sum()
