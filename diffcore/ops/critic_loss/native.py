"""The critics' loss on the kernels, which computes the gradients together with the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore.ops import _fused_loss, _native
from diffcore.ops._flops import Shape, flops, mlps, mlps_backward
from diffcore.ops.mlp import native as mlp


@_native.op("critic_loss")
def loss_and_gradients(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    parameters: list[Tensor],
    activations: str,
    wanted: list[bool],
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(loss, q ``[N, B, out]``, the loss's gradients with respect to [x, *parameters]).

    `parameters`, `activations`: see the op "mlp". `wanted`: whether to compute the gradients of x
    and of the parameters; the others come back without rows.
    """
    x, target = x.contiguous(), target.contiguous()
    weight = None if weight is None else weight.contiguous()
    parameters = [p.contiguous() for p in parameters]
    batch = x.shape[0]
    if not batch or backend == "triton":
        return _in_parts(x, target, weight, parameters, activations, wanted, precision, backend)
    core = _native._core
    functions = mlp.kinds(activations)
    loss = x.new_empty(())
    networks = len(parameters) // (2 * len(functions))
    q = x.new_empty(networks, batch, parameters[-1].shape[0])
    grads = [
        torch.empty_like(t) if want else _fused_loss.without_rows(t)
        for t, want in zip([x, *parameters], _each(wanted, parameters), strict=True)
    ]
    core.critic_loss(
        parameters,
        functions,
        getattr(core.Precision, precision),
        batch,
        x.data_ptr(),
        target.data_ptr(),
        _native.address(weight),
        loss.data_ptr(),
        q.data_ptr(),
        grads[0].data_ptr() if wanted[0] else 0,
        [g.data_ptr() for g in grads[1:]] if wanted[1] else [],
        torch.get_num_threads(),
    )
    return loss, q, grads


def _in_parts(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    parameters: list[Tensor],
    activations: str,
    wanted: list[bool],
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same by the kernels of the networks alone."""
    wants_x, wants_parameters = wanted
    settings = (precision, backend)
    q, saved = mlp.run_forward(x, parameters, activations, any(wanted), *settings)
    residual = q - target
    slope = residual if weight is None else weight[:, None] * residual
    loss = (slope * residual).mean(dim=(1, 2)).sum()
    grads = [_fused_loss.without_rows(x)]
    if any(wanted):
        grad_q = slope * (2 / max(target.numel(), 1))
        wants = (wants_x, wants_parameters)
        grads = mlp.run_backward(grad_q, x, saved, parameters, activations, *wants, *settings)
    if not wants_parameters:
        grads = [grads[0], *map(_fused_loss.without_rows, parameters)]
    return loss, q, grads


def _each(wanted: list[bool], parameters: list[Tensor]) -> list[bool]:
    """`wanted` for x and every parameter."""
    return [wanted[0], *[wanted[1]] * len(parameters)]


@_native.fake("critic_loss")
def _(
    x: Tensor, parameters: list[Tensor], activations: str, wanted: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    networks = len(parameters) // (2 * len(activations.split(",")))
    q = x.new_empty(networks, x.shape[0], parameters[-1].shape[0])
    grads = _fused_loss.fake_gradients([x, *parameters], _each(wanted, parameters))
    return x.new_empty(()), q, grads


@flops("critic_loss")
def _(x: Shape, parameters: list[Shape], activations: str, wanted: list[bool]) -> int:
    layers = len(activations.split(","))
    return mlps(x[0], parameters) + mlps_backward(x[0], parameters, layers, *wanted)


# Every element has a loss of its own.
_native.vmap("critic_loss")(_native.one_by_one(loss_and_gradients))


class CriticLoss(torch.autograd.Function):
    """The op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        target: Tensor,
        weight: Tensor | None,
        activations: str,
        wanted: list[bool],
        precision: str,
        backend: str,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        settings = (activations, wanted, precision, backend)
        loss, q, grads = loss_and_gradients(x, target, weight, list(parameters), *settings)
        return loss, q, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, _target, _weight, _, wanted, _, _, *parameters = inputs
        ctx.wanted = _each(wanted, parameters)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # no zeros as large as what is kept
        ctx.save_for_backward(*output[2:], x, *parameters)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> Any:
        count, saved = len(ctx.wanted), ctx.saved_tensors  # which are unpacked at every look
        grads, inputs = saved[:count], saved[count:]
        scaled = _fused_loss.scaled("critic_loss", grad_loss, grads, inputs)
        grad_x, *rest = (g if want else None for g, want in zip(scaled, ctx.wanted, strict=True))
        return grad_x, *[None] * 6, *rest
