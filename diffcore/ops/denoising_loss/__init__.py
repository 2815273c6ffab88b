"""The loss that trains a denoiser."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffcore import nn  # which imports ops: its modules are there when an op is called
from diffcore._kept import constant_under_compile, kept
from diffcore.ops import _backends, _dispatch, _native, _philox
from diffcore.ops._checks import (
    check_choice,
    check_compute_dtype,
    check_levels,
    check_like,
    check_tensor,
    out_of_autocast,
)
from diffcore.ops._compile import not_own, own_module
from diffcore.ops.denoising_loss import native, reference
from diffcore.ops.q_sample import cached_levels
from diffcore.schedule import DiffusionSchedule

AnyDenoiser: TypeAlias = "nn.Denoiser | Callable[[Tensor, Tensor, Tensor], Tensor]"

KERNELS = ("triton", "cpu")
REDUCTIONS = ("mean", "none")


def denoising_loss(
    denoiser: AnyDenoiser,
    schedule: DiffusionSchedule,
    state: Tensor,
    action: Tensor,
    *,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean of ``w (z - eps(sqrt(abar_t) a + sqrt(1 - abar_t) z, s, t))^2`` over all entries.

    DDPM's loss (Ho et al. 2020, Eq. 14), conditioned on a state; with a weight ``w`` for every row it
    is that of policies weighted by Q or advantage, such as EDP's (Kang et al. 2023) and QVPO's (Ding
    et al. 2024). Differentiable in the denoiser's parameters, ``state`` and ``action``; in ``noise``
    and ``weight`` too on the reference. The kernels compute the gradients of the mean in the forward
    pass. They can't be differentiated twice and say so; the reference can. As a mean over nothing,
    the loss of an empty batch is NaN.

    With ``reduction="none"`` every row has a loss of its own, for weights that depend on it. What its
    gradients are to count is known in the backward pass alone: the kernels keep the inputs till then
    and go forward again, a third more work in all. Weights known before are better given as
    ``weight``.

    Args:
        denoiser: a :class:`diffcore.nn.Denoiser`, also one within ``torch.compile`` or
            ``AveragedModel``, or any callable ``(x, state, t) -> eps`` (that one runs on the
            reference).
        schedule: the noise levels ``abar``.
        state: ``s``, ``[B, S]``.
        action: ``a``, ``[B, A]``.
        t: integer ``[B]``, levels in 0 .. K-1; drawn uniformly if None. On a GPU others aren't
            looked for, which would wait for the device: they make the loss and its gradients NaN.
        noise: ``z``, ``[B, A]``; drawn from N(0, I) if None, the same for the same generator on any
            backend.
        weight: ``w``, ``[B]``, of any sign; 1 if None. The mean is over the number of rows, whatever
            their weights add up to. One that requires a gradient takes the call to the reference.
        reduction: "mean" over all entries, or "none": over those of every row.
        generator: source of ``t`` and ``noise``. The default generator if None.
        compute_dtype: of the denoiser's products, as in :func:`diffcore.ops.mlp`: with
            ``torch.bfloat16`` the loss is within 1%, the root mean square of a gradient's error
            within 2% of the gradient's, with the exceptions named there.
        backend: "triton", "cpu" or "reference"; the fastest that can run the call if None.

    Returns:
        A scalar; ``[B]`` with reduction "none".

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, or a forced
            backend that can't run this call.
    """
    state, action, noise, weight = out_of_autocast(denoiser, state, action, noise, weight)
    arguments = (denoiser, schedule, state, action, t, noise, weight, reduction, generator)
    available, ours, parameters = support(*arguments, compute_dtype)
    chosen = _dispatch.choose("denoising_loss", available, backend)
    if t is None:
        # torch.compile takes no open K beside a generator, were it None.
        drawn_by: dict[str, Any] = {} if generator is None else {"generator": generator}
        t = torch.randint(schedule.K, (action.shape[0],), device=action.device, **drawn_by)
    if noise is None:
        seed = _philox.draw_seed(generator, action.device)
        if chosen == "reference":
            noise = _reference_noise(seed, action)
        else:
            noise = native.normals(seed, action, chosen)
    if chosen == "reference":
        eps: Callable[..., Tensor] = denoiser
        if ours is not None and ours.altered() is None:
            eps = partial(eps, backend="reference")
        return reference.denoising_loss(eps, schedule, state, action, t, noise, weight, reduction)

    assert ours is not None
    levels, embedding = _tables(schedule, ours.time_dim, action.device)
    inputs = (state, action, noise, weight, t, levels, embedding, ours.activation)
    differentiable = (state, action, *parameters)
    wanted = [_native.differentiates(tensor) for tensor in differentiable]
    settings = (_backends.precision(compute_dtype, action), chosen)
    if not any(wanted):
        return native.loss_and_gradients(*inputs, reduction, wanted, parameters, *settings)[0]
    if reduction == "none":
        return _native.apply(native.LossesOfRows, *inputs, wanted, *settings, *parameters)
    return _native.apply(native.DenoisingLoss, *inputs, wanted, *settings, *parameters)[0]


def _reference_noise(seed: Tensor, action: Tensor) -> Tensor:
    return _philox.normals(seed, 0, *action.shape, dtype=action.dtype, device=action.device)


@constant_under_compile
@kept
def _tables(
    schedule: DiffusionSchedule, time_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """By level: sqrt(abar) and sqrt(1 - abar) ``[K, 2]``, the time embedding ``[K, time_dim]``."""
    embedding = nn.time_embedding(torch.arange(schedule.K, device="cpu"), time_dim)
    return cached_levels(schedule, device), embedding.to(device, torch.float32)


def support(
    denoiser: AnyDenoiser,
    schedule: DiffusionSchedule,
    state: Tensor,
    action: Tensor,
    t: Tensor | None,
    noise: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    generator: torch.Generator | None,
    compute_dtype: torch.dtype | None,
) -> tuple[_dispatch.Support, nn.Denoiser | None, list[Tensor]]:
    """Checks the arguments and says which backends can take them.

    And the denoiser, where it is one of ours, with its parameters.
    """
    if not isinstance(schedule, DiffusionSchedule):
        raise TypeError(f"schedule: expected a DiffusionSchedule, got {type(schedule).__name__}")
    if not callable(denoiser):
        raise TypeError(
            f"denoiser: expected a Denoiser or a callable, got {type(denoiser).__name__}"
        )
    ours = own_module(denoiser, nn.Denoiser)
    check_tensor("state", state, ("B", ours.state_dim if ours else "S"))
    check_tensor("action", action, (state.shape[0], ours.action_dim if ours else "A"))
    check_like("action", action, "state", state)
    if noise is not None:
        check_tensor("noise", noise, tuple(action.shape))
        check_like("noise", noise, "action", action)
    if weight is not None:
        check_tensor("weight", weight, (action.shape[0],))
        check_like("weight", weight, "action", action)
    check_choice("reduction", reduction, REDUCTIONS)
    if t is not None:
        check_levels(t, "action", action)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    check_compute_dtype(compute_dtype)

    if ours is None:
        not_ours = f"the denoiser {not_own(denoiser, nn.Denoiser)}"
        return _backends.support(KERNELS, [state], refused=not_ours), None, []
    parameters = ours.unaltered_weights_and_biases()
    if parameters is None:
        called = f"the denoiser is called, since {ours.altered()}"
        return _backends.support(KERNELS, [state], refused=called), ours, []
    check_like("state", state, "the denoiser", parameters[0])
    reasons = _backends.support(
        KERNELS,
        [state, *parameters],
        [ours.activation],
        len(parameters) // 2 - 2,  # without the time MLP's
        compute_dtype=compute_dtype,
        refused=_backends.no_gradient_in(("noise", noise), ("weight", weight)),
    )
    return reasons, ours, parameters
