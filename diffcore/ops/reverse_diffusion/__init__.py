"""The reverse chain of a diffusion policy, denoiser included, in one call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from diffcore import nn  # which imports ops: its modules are there when an op is called
from diffcore._kept import constant_under_compile, kept
from diffcore.ops import _backends, _dispatch, _native, _philox
from diffcore.ops._checks import (
    check_choice,
    check_compute_dtype,
    check_like,
    check_number,
    check_tensor,
    checked_once,
    out_of_autocast,
)
from diffcore.ops._compile import not_own, own_module
from diffcore.ops.reverse_diffusion import native, reference
from diffcore.schedule import SOLVERS, DiffusionSchedule, SolverTable

AnyDenoiser: TypeAlias = "nn.Denoiser | Callable[[Tensor, Tensor, Tensor], Tensor]"

KERNELS = ("cuda", "triton", "cpu")


def reverse_diffusion(
    denoiser: AnyDenoiser,
    schedule: DiffusionSchedule,
    state: Tensor,
    *,
    x_init: Tensor | None = None,
    noise: Tensor | None = None,
    noise_scale: float = 1.0,
    clip: float = 1.0,
    solver: str | SolverTable = "ddpm",
    generator: torch.Generator | None = None,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Actions drawn from a diffusion policy: the chain from x_K to x_0 (DIPO, Algorithm 4).

    Differentiable in ``state``, the denoiser's parameters, ``x_init`` and ``noise``: the x of every
    step is stored and the rest recomputed on the way back. The fused kernel can't be differentiated
    twice and says so; the reference can.

    Args:
        denoiser: a :class:`diffcore.nn.Denoiser`, also one within ``torch.compile`` or
            ``AveragedModel``, or any callable ``(x, state, t) -> eps`` with ``x_init`` given (that
            one runs on the reference).
        schedule: the noise levels it was trained with.
        state: ``[B, S]``, what the actions are conditioned on.
        x_init: ``[B, A]``, where the chain starts; drawn from N(0, I) if None, which is right for a
            schedule that :attr:`~diffcore.DiffusionSchedule.ends_in_noise`.
        noise: ``[steps, B, A]``; ``noise[i]`` is used at the i-th executed step; drawn if None.
        noise_scale: factor on every step's noise; 0 gives the chain without noise.
        clip: bound on the predicted x0 at every step and on the result; ``math.inf`` for none.
        solver: a name that :meth:`diffcore.DiffusionSchedule.solver` knows, or a table that it made
            of this schedule.
        generator: source of ``x_init`` and ``noise``: one draw keys a counter-based generator, so
            row r gets the same noise in any batch and on any backend. The default generator if None.
        compute_dtype: ``torch.bfloat16`` multiplies hidden layers in bfloat16 with float32 sums
            (states, x and the noise schedule stay float32); about 1e-2 from float32 over a whole
            chain. ``torch.float16`` likewise, on GPUs only. None or ``torch.float32``: float32
            throughout. The reference keeps to the denoiser's own precision.
        backend: "cuda", "triton", "cpu" or "reference"; the fastest that can run the call if None.

    Returns:
        ``[B, A]`` in [-clip, clip].

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, an unknown
            solver or a table of another schedule, or a forced backend that can't run this call.
    """
    steps = _check_settings(schedule, noise_scale, clip, solver, generator, compute_dtype)
    ours: nn.Denoiser | None
    chain, chosen = native.chain.kernel, "cpu"
    plain = _plain_parameters(denoiser, steps, state, x_init, noise, compute_dtype, backend)
    if plain is not None:
        ours, parameters = plain
    else:
        state, x_init, noise = out_of_autocast(denoiser, state, x_init, noise)
        arguments = (denoiser, steps, state, x_init, noise)
        available, ours, parameters = support(*arguments, compute_dtype)
        chain, chosen = native.chain, _dispatch.choose("reverse_diffusion", available, backend)
    draws = x_init is None or (noise is None and noise_scale != 0)
    seed = _philox.draw_seed(generator, state.device) if draws else None
    noise_scale, clip = float(noise_scale), float(clip)
    if chosen == "reference":
        eps: Callable[..., Tensor] = denoiser
        if ours is not None:
            action_dim = ours.action_dim
            if ours.altered() is None:
                eps = partial(eps, backend="reference")
        else:
            assert x_init is not None
            action_dim = x_init.shape[1]
        timesteps, coefficients = _steps(schedule, solver)
        return reference.reverse_diffusion(
            eps,
            timesteps,
            coefficients,
            state,
            action_dim,
            x_init,
            noise,
            seed,
            noise_scale,
            clip,
        )

    assert ours is not None
    settings = (
        *_tables(schedule, solver, ours.time_dim, state.device),
        noise_scale,
        clip,
        ours.activation,
        _backends.precision(compute_dtype, state),
    )
    inputs = (state, x_init, noise, seed)
    if _native.differentiates(state, x_init, noise, *parameters):
        return _native.apply(native.Chain, *inputs, *settings, chosen, *parameters)[0]
    return chain(*inputs, parameters, *settings, False, chosen)[0]


@constant_under_compile
@kept
def _why_not_on(schedule: DiffusionSchedule, solver: SolverTable) -> str | None:
    """Why a chain on this schedule can't run the table; None if it can."""
    if solver.schedule is not None and not _same_levels(solver.schedule, schedule):
        return f"expected a table of {schedule}, got one of {solver.schedule}"
    highest = int(solver.timesteps.max())
    if highest >= schedule.K:
        return (
            f"expected levels of the schedule, 0 to {schedule.K - 1}, got a table of another "
            f"that goes up to {highest}"
        )
    return None


def _same_levels(schedule: DiffusionSchedule, other: DiffusionSchedule) -> bool:
    """Whether they agree to float32's rounding, which betas may have come through."""
    levels, others = schedule.alphas_cumprod, other.alphas_cumprod
    return levels.shape == others.shape and torch.allclose(levels, others, rtol=1e-4, atol=0)


@constant_under_compile  # as a table itself can't be
@kept
def _steps(schedule: DiffusionSchedule, solver: str | SolverTable) -> tuple[Tensor, Tensor]:
    """The table's timesteps and coefficients."""
    table = schedule.solver(solver) if isinstance(solver, str) else solver
    return table.timesteps, table.coefficients


@constant_under_compile
@kept
def _tables(
    schedule: DiffusionSchedule, solver: str | SolverTable, time_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """By executed step: coefficients ``[steps, 7]``, the time embedding ``[steps, time_dim]``."""
    timesteps, coefficients = _steps(schedule, solver)
    embedding = nn.time_embedding(timesteps, time_dim)
    return coefficients.to(device, torch.float32), embedding.to(device, torch.float32)


def _check_settings(
    schedule: DiffusionSchedule,
    noise_scale: float,
    clip: float,
    solver: str | SolverTable,
    generator: torch.Generator | None,
    compute_dtype: torch.dtype | None,
) -> int:
    """How many steps are executed."""
    if not isinstance(schedule, DiffusionSchedule):
        raise TypeError(f"schedule: expected a DiffusionSchedule, got {type(schedule).__name__}")
    if not isinstance(solver, (str, SolverTable)):
        raise TypeError(f"solver: expected a name or a SolverTable, got {type(solver).__name__}")
    if isinstance(solver, str):
        check_choice("solver", solver, SOLVERS)
    elif (refused := _why_not_on(schedule, solver)) is not None:
        raise ValueError(f"solver: {refused}")
    _check_numbers(noise_scale, clip, compute_dtype)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    return schedule.K if isinstance(solver, str) else solver.steps


@checked_once
def _check_numbers(noise_scale: float, clip: float, compute_dtype: torch.dtype | None) -> None:
    check_number("noise_scale", noise_scale, least=0.0)
    check_number("clip", clip, above=0.0, finite=False)
    check_compute_dtype(compute_dtype)


def _plain_parameters(
    denoiser: AnyDenoiser,
    steps: int,
    state: Tensor,
    x_init: Tensor | None,
    noise: Tensor | None,
    compute_dtype: torch.dtype | None,
    backend: str | None,
) -> tuple[nn.Denoiser, list[Tensor]] | None:
    """The denoiser and its parameters, where the call may go straight to the CPU's kernel."""
    if type(denoiser) is not nn.Denoiser or not _backends.may_go_straight(compute_dtype, backend):
        return None
    parameters = denoiser.plain_weights_and_biases()
    if parameters is None or len(parameters) > 2 * (_native.max_layers + 2):  # the time MLP's, too
        return None
    given = [t for t in (state, x_init, noise) if t is not None]
    action_dim = denoiser.action_dim
    if (
        _native.are_plain_float32_on_cpu(given)
        and _native.fits(state, ("B", denoiser.state_dim))
        and (x_init is None or _native.fits(x_init, (state.shape[0], action_dim)))
        and (noise is None or noise.shape == (steps, state.shape[0], action_dim))
    ):
        return denoiser, parameters
    return None


def support(
    denoiser: AnyDenoiser,
    steps: int,
    state: Tensor,
    x_init: Tensor | None,
    noise: Tensor | None,
    compute_dtype: torch.dtype | None,
) -> tuple[_dispatch.Support, nn.Denoiser | None, list[Tensor]]:
    """Checks the arguments, but for settings, and says which backends can take them.

    And the denoiser, where it is one of ours, with its parameters.
    """
    if not callable(denoiser):
        raise TypeError(
            f"denoiser: expected a Denoiser or a callable, got {type(denoiser).__name__}"
        )
    ours = own_module(denoiser, nn.Denoiser)
    check_tensor("state", state, ("B", ours.state_dim if ours else "S"))
    if x_init is None and ours is None:
        why = not_own(denoiser, nn.Denoiser)
        raise ValueError(f"x_init: expected it to be given, since the denoiser {why}")
    action_dim: int | str = ours.action_dim if ours else "A"
    if x_init is not None:
        check_tensor("x_init", x_init, (state.shape[0], action_dim))
        check_like("x_init", x_init, "state", state)
        action_dim = x_init.shape[1]
    if noise is not None:
        check_tensor("noise", noise, (steps, state.shape[0], action_dim))
        check_like("noise", noise, "state", state)

    if ours is None:
        refused = f"the denoiser {not_own(denoiser, nn.Denoiser)}"
        return _backends.support(KERNELS, [state], refused=refused), None, []
    parameters = ours.unaltered_weights_and_biases()
    if parameters is None:
        refused = f"the denoiser is called, since {ours.altered()}"
        return _backends.support(KERNELS, [state], refused=refused), ours, []
    check_like("state", state, "the denoiser", parameters[0])
    reasons = _backends.support(
        KERNELS,
        [state, *parameters],
        [ours.activation],
        len(parameters) // 2 - 2,  # without the time MLP's
        compute_dtype=compute_dtype,
    )
    reasons.restrict("cuda", lambda: _cuda_lacks(parameters, state, compute_dtype))
    reasons.restrict("triton", lambda: _triton_lacks(parameters))
    return reasons, ours, parameters


def _cuda_lacks(
    parameters: list[Tensor], state: Tensor, compute_dtype: torch.dtype | None
) -> str | None:
    precision = _backends.precision(compute_dtype, state)
    # Of the layers there are: they may be others than the module was made with.
    widths = [_native.widths(parameters[:4]), _native.widths(parameters[4:])]
    return native.why_not_cuda(widths, state.shape[1], precision, _native.device_index(state))


def _triton_lacks(parameters: list[Tensor]) -> str | None:
    _, *hidden, _ = _native.widths(parameters[4:])
    if len({*hidden}) > 1:
        return "the trunk's hidden layers differ in width, the Triton kernel takes equal ones"
    return None
