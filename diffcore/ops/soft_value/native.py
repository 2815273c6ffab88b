"""The soft value on the kernels of its parts, in one torch op; see representation_loss/native.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore.ops import _fused_loss, _native
from diffcore.ops._flops import Shape, flops, mlps, mlps_backward
from diffcore.ops.mlp.native import kinds


@_native.op("soft_value")
def values_and_gradients(
    state: Tensor,
    noise: Tensor,
    temperature: Tensor,
    psi: list[Tensor],
    critics: list[Tensor],
    policy: list[Tensor],
    wanted: bool,
    policy_kinds: str,
    psi_kinds: str,
    critic_kinds: str,
    low: float,
    high: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(loss, V ``[B, 1]``, log pi ``[B, 1]``, if `wanted` the loss's gradients in `policy`).

    `psi`, `critics`, `policy`: parameters; of the critics one after the other.
    """
    state, noise = state.contiguous(), noise.contiguous()
    batch = state.shape[0]
    loss = state.new_full((), float("nan"))  # the mean of an empty batch
    value, log_prob = state.new_empty(batch, 1), state.new_empty(batch, 1)
    make = torch.empty if batch else torch.zeros
    grads = [make(p.shape, dtype=p.dtype, device=p.device) for p in policy] if wanted else []
    if batch:
        core = _native._core
        networks = ((policy, policy_kinds), (psi, psi_kinds), (critics, critic_kinds))
        core.soft_value(
            *[x for ps, names in networks for x in (ps, kinds(names))],
            getattr(core.Precision, precision),
            batch,
            low,
            high,
            *[t.data_ptr() for t in (state, noise, temperature, loss, value, log_prob)],
            [g.data_ptr() for g in grads],
            torch.get_num_threads(),
        )
    return loss, value, log_prob, grads


@_native.fake("soft_value")
def _(
    state: Tensor, policy: list[Tensor], wanted: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    rows = state.shape[0]
    grads = [p.new_empty(p.shape) for p in policy] if wanted else []
    return state.new_empty(()), state.new_empty(rows, 1), state.new_empty(rows, 1), grads


@flops("soft_value")
def _(
    state: Shape, psi: list[Shape], critics: list[Shape], policy: list[Shape], wanted: bool
) -> int:
    judges = [*psi, *critics]
    return (
        mlps(state[0], [*policy, *judges])
        + mlps_backward(state[0], policy, len(policy) // 2, False, wanted)
        + mlps_backward(state[0], judges, 1, wanted, False)
    )


# Every element has a loss of its own.
_native.vmap("soft_value")(_native.one_by_one(values_and_gradients))


class SoftValue(torch.autograd.Function):
    """The op with its loss's gradient in the policy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        state: Tensor,
        noise: Tensor,
        temperature: Tensor,
        psi: list[Tensor],
        critics: list[Tensor],
        policy_kinds: str,
        psi_kinds: str,
        critic_kinds: str,
        low: float,
        high: float,
        precision: str,
        *policy: Tensor,
    ) -> tuple[Tensor, ...]:
        settings = (policy_kinds, psi_kinds, critic_kinds, low, high, precision)
        loss, value, log_prob, grads = values_and_gradients(
            state, noise, temperature, psi, critics, list(policy), True, *settings
        )
        return loss, value, log_prob, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        policy = inputs[11:]
        ctx.count = len(policy)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # no zeros as large as what is kept
        ctx.save_for_backward(*output[3:], *policy)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> Any:
        saved = ctx.saved_tensors  # which are unpacked at every look
        grads, policy = saved[: ctx.count], saved[ctx.count :]
        scaled = _fused_loss.scaled("soft_value", grad_loss, grads, policy)
        return *[None] * 11, *scaled
