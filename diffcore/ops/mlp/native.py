"""An MLP on the CPU kernels: forward and backward as torch ops, joined by a Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore.ops import _native


def _layers_and_activations(parameters: list[Tensor], activations: str) -> tuple[Any, Any]:
    core = _native._core
    names = activations.split(",")
    return _native.addresses(parameters), [getattr(core.Activation, name) for name in names]


@_native.cpu_op("mlp")
def forward(
    x: Tensor, parameters: list[Tensor], activations: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """(y ``[B, out]``, what the backward pass needs, without rows unless `keep`).

    `activations`: names joined by commas, since an op's schema has no list of strings.
    """
    core = _native._core
    parameters = [p.contiguous() for p in parameters]
    x = x.contiguous()
    layers, kinds = _layers_and_activations(parameters, activations)
    y = x.new_empty(len(x), len(parameters[-1]))
    saved = x.new_empty(len(x) if keep else 0, core.mlp_saved_width(layers, kinds))
    if len(x):
        core.mlp_forward(
            layers,
            kinds,
            len(x),
            x.data_ptr(),
            y.data_ptr(),
            saved.data_ptr() if keep else 0,
            torch.get_num_threads(),
        )
    return y, saved


@_native.fake("mlp")
def _(x: Tensor, parameters: list[Tensor], activations: str, keep: bool) -> tuple[Tensor, Tensor]:
    shapes = [(0, 0, w.shape[1], w.shape[0]) for w in parameters[::2]]
    kinds = [getattr(_native._core.Activation, name) for name in activations.split(",")]
    width = _native._core.mlp_saved_width(shapes, kinds)
    return x.new_empty(len(x), len(parameters[-1])), x.new_empty(len(x) if keep else 0, width)


@_native.cpu_op("mlp_backward")
def backward(
    grad_y: Tensor,
    saved: Tensor,
    parameters: list[Tensor],
    activations: str,
    wants_x: bool,
    wants_parameters: bool,
) -> list[Tensor]:
    """[gradient of x (empty unless wanted), then, if wanted, of every parameter]."""
    core = _native._core
    parameters = [p.contiguous() for p in parameters]
    grad_y = grad_y.contiguous()
    layers, kinds = _layers_and_activations(parameters, activations)
    batch = len(grad_y)
    grad_x = grad_y.new_empty(batch if wants_x else 0, parameters[0].shape[1])
    if batch:
        grads = [torch.empty_like(p) for p in parameters] if wants_parameters else []
        core.mlp_backward(
            layers,
            kinds,
            batch,
            saved.data_ptr(),
            grad_y.data_ptr(),
            grad_x.data_ptr() if wants_x else 0,
            [g.data_ptr() for g in grads],
            torch.get_num_threads(),
        )
    else:
        grads = [torch.zeros_like(p) for p in parameters] if wants_parameters else []
    return [grad_x, *grads]


@_native.fake("mlp_backward")
def _(
    grad_y: Tensor,
    saved: Tensor,
    parameters: list[Tensor],
    activations: str,
    wants_x: bool,
    wants_parameters: bool,
) -> list[Tensor]:
    grad_x = grad_y.new_empty(len(grad_y) if wants_x else 0, parameters[0].shape[1])
    return [grad_x, *([torch.empty_like(p) for p in parameters] if wants_parameters else [])]


@_native.vmap("mlp")
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    """A batched x is more rows; batched parameters run one by one."""
    x_dim, parameter_dims, *_ = in_dims
    x, parameters, activations, keep = args
    if any(d is not None for d in parameter_dims):
        results = _native.one_by_one(forward, info.batch_size, in_dims, args)
        y, saved = (torch.stack(column) for column in zip(*results, strict=True))
        return (y, saved), (0, 0)
    rows = x.movedim(x_dim, 0).flatten(0, 1)
    y, saved = forward(rows, parameters, activations, keep)
    return (y.unflatten(0, (info.batch_size, -1)), saved.unflatten(0, (info.batch_size, -1))), (
        0,
        0,
    )


@_native.vmap("mlp_backward")
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    """One by one: every element has parameter gradients of its own."""
    results = _native.one_by_one(backward, info.batch_size, in_dims, args)
    stacked = [torch.stack(column) for column in zip(*results, strict=True)]
    return stacked, [0] * len(stacked)


class MLP(torch.autograd.Function):
    """The op with its gradient; a Function, since torch.func takes no other kind."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, activations: str, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return forward(x, list(parameters), activations, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.activations, *parameters = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, output[1], *parameters)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, _: Tensor) -> Any:
        x, saved, *parameters = ctx.saved_tensors
        wants_x, wants_parameters = ctx.needs_input_grad[0], any(ctx.needs_input_grad[2:])
        settings = (ctx.activations, wants_x, wants_parameters)
        if torch.compiler.is_compiling():  # where no second derivative exists anyway
            grads = backward(grad_y, saved, parameters, *settings)
        else:
            grads = MLPBackward.apply(grad_y, x, saved, *settings, *parameters)
        grad_x, *grad_parameters = grads
        return (
            grad_x if wants_x else None,
            None,
            *(grad_parameters if wants_parameters else [None] * len(parameters)),
        )


class MLPBackward(torch.autograd.Function):
    """The gradient as a Function, so that differentiating it again says that it can't be done.

    It takes `x` for that alone: its result depends on it, though it is computed from `saved`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_y: Tensor,
        x: Tensor,
        saved: Tensor,
        activations: str,
        wants_x: bool,
        wants_parameters: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        settings = (activations, wants_x, wants_parameters)
        return tuple(backward(grad_y, saved, list(parameters), *settings))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "mlp: the CPU kernel has no second derivative; "
            "pass backend='reference' to differentiate twice"
        )
