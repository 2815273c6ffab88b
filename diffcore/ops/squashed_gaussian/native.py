"""A policy's sample on the kernels: forward and backward as torch ops, joined by a Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore.ops import _native
from diffcore.ops._flops import flops, mlps, mlps_backward
from diffcore.ops.mlp.native import kinds


def _saved_width(parameters: list[Tensor], activations: str, precision: str) -> int:
    """Floats a row of what the backward pass needs: of the network, then of the sample."""
    layers = [(0, 0, w.shape[1], w.shape[0]) for w in parameters[::2]]
    core = _native._core
    width: int = core.mlp_saved_width(layers, kinds(activations), getattr(core.Precision, precision))
    return width + parameters[-1].shape[0]


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
    """(action ``[B, A]``, log density ``[B, 1]``, what the backward pass needs if `keep`)."""
    x, noise = x.contiguous(), noise.contiguous()
    parameters = [p.contiguous() for p in parameters]
    batch = x.shape[0]
    action, log_prob = torch.empty_like(noise), x.new_empty(batch, 1)
    width = _saved_width(parameters, activations, precision) if keep else 0
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
    low: float,
    high: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    width = _saved_width(parameters, activations, precision) if keep else 0
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


@_native.fake("squashed_gaussian_backward")
def _(
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
    grad_x = x.new_empty(x.shape[0] if wants_x else 0, x.shape[1])
    return [grad_x, *([p.new_empty(p.shape) for p in parameters] if wants_parameters else [])]


@flops("squashed_gaussian")
def _(x: Any, noise: Any, parameters: Any, *_: Any, **out: Any) -> int:
    return mlps(x[0], parameters)


@flops("squashed_gaussian_backward")
def _(grad_action: Any, grad_log_prob: Any, x: Any, *rest: Any, **out: Any) -> int:
    parameters, wants_x, wants_parameters = rest[2], rest[4], rest[5]
    return mlps_backward(x[0], parameters, len(parameters) // 2, wants_x, wants_parameters)


@_native.vmap("squashed_gaussian")
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    """One by one: what is saved lies layer by layer."""
    results = _native.one_by_one(forward, info.batch_size, in_dims, args)
    stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
    return stacked, (0, 0, 0)


@_native.vmap("squashed_gaussian_backward")
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    """One by one: every element has parameter gradients of its own."""
    results = _native.one_by_one(backward, info.batch_size, in_dims, args)
    stacked = [torch.stack(column) for column in zip(*results, strict=True)]
    return stacked, [0] * len(stacked)


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
        arguments = (grad_action, grad_log_prob, x, action, saved, *settings, *parameters)
        grad_x, *grads = _native.gradients("squashed_gaussian", _gradients, *arguments)
        return (
            grad_x if wants_x else None,
            *[None] * 5,
            *(grads if wants_parameters else [None] * len(parameters)),
        )


def _gradients(
    grad_action: Tensor | None,
    grad_log_prob: Tensor | None,
    x: Tensor,
    action: Tensor,
    saved: Tensor,
    activations: str,
    wants_x: bool,
    wants_parameters: bool,
    precision: str,
    *parameters: Tensor,
) -> list[Tensor]:
    settings = (activations, wants_x, wants_parameters, precision)
    return backward(grad_action, grad_log_prob, x, action, saved, list(parameters), *settings)
