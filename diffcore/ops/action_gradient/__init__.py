"""Improvement of a batch of actions along the critic's gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from diffcore import nn  # which imports ops: its modules are there when an op is called
from diffcore.ops import _backends, _dispatch, _native
from diffcore.ops._checks import (
    check_choice,
    check_compute_dtype,
    check_like,
    check_number,
    check_positive_int,
    check_tensor,
    checked_once,
    out_of_autocast,
)
from diffcore.ops._compile import not_own, own_module
from diffcore.ops.action_gradient import native, reference

AnyCritic: TypeAlias = "nn.TwinCritic | Callable[[Tensor, Tensor], Sequence[Tensor]]"

KERNELS = ("cuda", "triton", "cpu")


def action_gradient(
    critic: AnyCritic,
    state: Tensor,
    action: Tensor,
    *,
    steps: int = 20,
    lr: float = 0.03,
    max_norm: float | None = None,
    optimizer: str = "adam",
    eps: float = 1e-5,
    low: float = -1.0,
    high: float = 1.0,
    clip_mode: str = "batch",
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Actions after some steps of ascent on min(Q1, Q2) (DIPO, Eq. 15; released code: Adam).

    Every step takes the gradient of ``-min(Q1, Q2)`` at each action, limits its norm, lets a fresh
    Adam (or plain descent) move the actions, and clamps them. Nothing is differentiated through, and
    no gradient of the critic's parameters is computed.

    Args:
        critic: a :class:`diffcore.nn.TwinCritic`, also one within ``torch.compile`` or
            ``AveragedModel``, or any callable ``(state, action) -> (q1, ...)`` with one or more
            values, ``[B, 1]`` each, of which every row climbs the least, and no side effects (that
            one runs on the reference).
        state: ``[B, S]``.
        action: ``[B, A]``; not changed.
        steps: number of steps; 0 returns a copy.
        lr: learning rate of the actions.
        max_norm: limit of the gradient's Euclidean norm, as ``clip_grad_norm_`` does it; None: none.
        optimizer: "adam" (betas 0.9, 0.999) or "ascent" (the paper's plain step).
        eps: Adam's epsilon.
        low, high: bounds the actions are clamped to after every step.
        clip_mode: "batch" limits the norm over the whole batch, as the released code does (so a NaN
            in one row reaches all); "row" limits every row's own.
        compute_dtype: ``torch.bfloat16`` multiplies hidden layers in bfloat16 with float32 sums:
            the gradient is then within 1% of its root mean square (relu, whose slope jumps: 10%).
            ``torch.float16`` likewise, on GPUs only. None or ``torch.float32``: float32 throughout.
            The reference keeps to the critic's own precision.
        backend: "cuda", "triton", "cpu" or "reference"; the fastest that can run the call if None.

    Returns:
        ``[B, A]``, detached.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, or a forced
            backend that can't run this call.
    """
    _check_settings(steps, lr, max_norm, optimizer, eps, low, high, clip_mode, compute_dtype)
    ours: nn.TwinCritic | None
    ascend, chosen = native.ascend.kernel, "cpu"
    plain = _plain_networks(critic, state, action, compute_dtype, backend)
    if plain is not None:
        ours, q1, q2 = plain
    else:
        state, action = out_of_autocast(critic, state, action)
        available, ours, q1, q2 = support(critic, state, action, compute_dtype)
        ascend, chosen = native.ascend, _dispatch.choose("action_gradient", available, backend)
    steps, lr, eps, low, high = int(steps), float(lr), float(eps), float(low), float(high)
    max_norm = None if max_norm is None else float(max_norm)
    if chosen != "reference":
        assert ours is not None
        return ascend(
            state,
            action,
            q1,
            q2,
            ours.activation,
            _backends.precision(compute_dtype, state),
            steps,
            lr,
            max_norm,
            clip_mode,
            optimizer,
            eps,
            low,
            high,
            chosen,
        )
    q: Callable[..., Sequence[Tensor]] = critic
    if ours is not None and ours.altered() is None:
        q = partial(q, backend="reference")
    return reference.action_gradient(
        q, state, action, steps, lr, max_norm, clip_mode, optimizer, eps, low, high
    )


def _plain_networks(
    critic: AnyCritic,
    state: Tensor,
    action: Tensor,
    compute_dtype: torch.dtype | None,
    backend: str | None,
) -> tuple[nn.TwinCritic, list[Tensor], list[Tensor]] | None:
    """The critic and both's parameters, where the call may go straight to the CPU's kernel."""
    if type(critic) is not nn.TwinCritic or not _backends.may_go_straight(compute_dtype, backend):
        return None
    networks = critic.plain_networks()
    if networks is None:
        return None
    q1, q2 = networks
    if (
        max(len(q1), len(q2)) <= 2 * _native.max_layers
        and _native.are_plain_float32_on_cpu([state, action])
        and _native.fits(state, ("B", critic.state_dim))
        and _native.fits(action, (state.shape[0], critic.action_dim))
    ):
        return critic, q1, q2
    return None


def support(
    critic: AnyCritic,
    state: Tensor,
    action: Tensor,
    compute_dtype: torch.dtype | None,
) -> tuple[_dispatch.Support, nn.TwinCritic | None, list[Tensor], list[Tensor]]:
    """Checks the arguments, but for settings, and says which backends can take them.

    And the critic, where it is one of ours, with the parameters of both.
    """
    if not callable(critic):
        raise TypeError(f"critic: expected a TwinCritic or a callable, got {type(critic).__name__}")
    ours = own_module(critic, nn.TwinCritic)
    check_tensor("state", state, ("B", ours.state_dim if ours else "S"))
    check_tensor("action", action, (state.shape[0], ours.action_dim if ours else "A"))
    check_like("action", action, "state", state)

    if ours is None:
        refused = f"the critic {not_own(critic, nn.TwinCritic)}"
        return _backends.support(KERNELS, [state], refused=refused), None, [], []
    networks = ours.unaltered_networks()
    if networks is None:
        refused = f"the critic is called, since {ours.altered()}"
        return _backends.support(KERNELS, [state], refused=refused), ours, [], []
    q1, q2 = networks
    check_like("state", state, "the critic", q1[0])
    reasons = _backends.support(
        KERNELS,
        [state, *q1, *q2],
        [ours.activation],
        max(len(q1), len(q2)) // 2,
        compute_dtype=compute_dtype,
    )
    reasons.restrict("cuda", lambda: _cuda_lacks(q1, q2, ours.action_dim, state, compute_dtype))
    reasons.restrict("triton", lambda: _triton_lacks(q1, q2))
    return reasons, ours, q1, q2


@checked_once
def _check_settings(
    steps: int,
    lr: float,
    max_norm: float | None,
    optimizer: str,
    eps: float,
    low: float,
    high: float,
    clip_mode: str,
    compute_dtype: torch.dtype | None,
) -> None:
    check_positive_int("steps", steps, least=0)
    check_number("lr", lr, least=0.0)
    check_number("eps", eps, least=0.0)
    if max_norm is not None:
        check_number("max_norm", max_norm, above=0.0)
    check_number("low", low, finite=False)
    check_number("high", high, above=low, finite=False)
    check_choice("optimizer", optimizer, ("adam", "ascent"))
    check_choice("clip_mode", clip_mode, ("batch", "row"))
    check_compute_dtype(compute_dtype)


def _cuda_lacks(
    q1: list[Tensor],
    q2: list[Tensor],
    action_dim: int,
    state: Tensor,
    compute_dtype: torch.dtype | None,
) -> str | None:
    precision = _backends.precision(compute_dtype, state)
    widths = [_native.widths(q1), _native.widths(q2)]
    return native.why_not_cuda(widths, action_dim, precision, _native.device_index(state))


def _triton_lacks(q1: list[Tensor], q2: list[Tensor]) -> str | None:
    _, *hidden, _ = widths = _native.widths(q1)
    if widths != _native.widths(q2):
        return "the critics' layers differ in number or width, the Triton kernel takes equal ones"
    if len({*hidden}) > 1:
        return "a critic's hidden layers differ in width, the Triton kernel takes equal ones"
    return None
