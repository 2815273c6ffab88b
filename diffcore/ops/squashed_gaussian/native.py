"""A policy's sample on the kernels: forward and backward as torch ops, joined by a Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore.ops import _native
from diffcore.ops._flops import Shape, flops, mlps, mlps_backward
from diffcore.ops.mlp.native import fake_backward, kinds, saved_width


@_native.op("squashed_gaussian")
def forward(
    x: Tensor,
    noise: Tensor,
    parameters: list[Tensor],
    keep: bool,
    activations: str,
    low: float,
    high: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(action ``[B, A]``, log density ``[B, 1]``, what the backward pass needs if `keep`).

    That is what the network's needs, then as much as it has outputs.
    """
    x, noise = x.contiguous(), noise.contiguous()
    parameters = [p.contiguous() for p in parameters]
    batch = x.shape[0]
    action, log_prob = torch.empty_like(noise), x.new_empty(batch, 1)
    width = saved_width(parameters, activations, precision) + parameters[-1].shape[0] if keep else 0
    saved = x.new_empty(batch if keep else 0, width)
    if batch:
        core = _native._core
        core.squashed_gaussian(
            parameters,
            kinds(activations),
            getattr(core.Precision, precision),
            batch,
            noise.shape[1],
            low,
            high,
            x.data_ptr(),
            noise.data_ptr(),
            action.data_ptr(),
            log_prob.data_ptr(),
            saved.data_ptr() if keep else 0,
            torch.get_num_threads(),
        )
    return action, log_prob, saved


@_native.fake("squashed_gaussian")
def _(
    x: Tensor,
    noise: Tensor,
    parameters: list[Tensor],
    keep: bool,
    activations: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    width = saved_width(parameters, activations, precision) + parameters[-1].shape[0] if keep else 0
    return (
        x.new_empty(noise.shape),
        x.new_empty(x.shape[0], 1),
        x.new_empty(x.shape[0] if keep else 0, width),
    )


@_native.op("squashed_gaussian_backward")
def backward(
    grad_action: Tensor | None,
    grad_log_prob: Tensor | None,
    x: Tensor,
    action: Tensor,
    saved: Tensor,
    parameters: list[Tensor],
    activations: str,
    wants_x: bool,
    wants_parameters: bool,
    precision: str,
) -> list[Tensor]:
    """[gradient of x (empty unless wanted), then, if wanted, of every parameter]."""
    parameters = [p.contiguous() for p in parameters]
    x, action = x.contiguous(), action.contiguous()
    grad_action = None if grad_action is None else grad_action.contiguous()
    grad_log_prob = None if grad_log_prob is None else grad_log_prob.contiguous()
    batch = x.shape[0]
    make = torch.empty_like if batch else torch.zeros_like
    grad_x = x.new_empty(batch if wants_x else 0, x.shape[1])
    grads = [make(p) for p in parameters] if wants_parameters else []
    if batch:
        core = _native._core
        core.squashed_gaussian_backward(
            parameters,
            kinds(activations),
            getattr(core.Precision, precision),
            batch,
            action.shape[1],
            x.data_ptr(),
            action.data_ptr(),
            saved.data_ptr(),
            _native.address(grad_action),
            _native.address(grad_log_prob),
            grad_x.data_ptr() if wants_x else 0,
            [g.data_ptr() for g in grads],
            torch.get_num_threads(),
        )
    return [grad_x, *grads]


_native.fake("squashed_gaussian_backward")(fake_backward)


@flops("squashed_gaussian")
def _(x: Shape, parameters: list[Shape]) -> int:
    return mlps(x[0], parameters)


@flops("squashed_gaussian_backward")
def _(x: Shape, parameters: list[Shape], wants_x: bool, wants_parameters: bool) -> int:
    return mlps_backward(x[0], parameters, len(parameters) // 2, wants_x, wants_parameters)


# What is saved lies layer by layer, and every element has parameter gradients of its own.
_native.vmap("squashed_gaussian")(_native.one_by_one(forward))
_native.vmap("squashed_gaussian_backward")(_native.one_by_one(backward))


class SquashedGaussian(torch.autograd.Function):
    """The op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        noise: Tensor,
        activations: str,
        low: float,
        high: float,
        precision: str,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return forward(x, noise, list(parameters), True, activations, low, high, precision)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        x, _, ctx.activations, _, _, ctx.precision, *parameters = inputs
        action, _, saved = output
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)  # no zeros as large as what is kept
        ctx.save_for_backward(x, action, saved, *parameters)

    @staticmethod
    def backward(ctx: Any, grad_action: Tensor | None, grad_log_prob: Tensor | None, _: None) -> Any:
        x, action, saved, *parameters = ctx.saved_tensors
        wants_x, wants_parameters = ctx.needs_input_grad[0], any(ctx.needs_input_grad[6:])
        settings = (ctx.activations, wants_x, wants_parameters, ctx.precision)

        def compute(*inputs: Any) -> Any:
            tensors, parameters = inputs[:5], list(inputs[5:])
            return backward(*tensors, parameters, *settings)

        arguments = (grad_action, grad_log_prob, x, action, saved, *parameters)
        grad_x, *grads = _native.gradients("squashed_gaussian", compute, *arguments)
        return (
            grad_x if wants_x else None,
            *[None] * 5,
            *(grads if wants_parameters else [None] * len(parameters)),
        )
