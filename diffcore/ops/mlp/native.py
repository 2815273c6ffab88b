"""MLPs on the kernels: forward and backward as torch ops, joined by a Function."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from diffcore.ops import _native
from diffcore.ops._flops import Shape, flops, mlps, mlps_backward


@functools.cache
def kinds(activations: str) -> list[Any]:
    """The compiled module's names for the activations."""
    return [getattr(_native._core.Activation, name) for name in activations.split(",")]


def run_forward(
    x: Tensor, parameters: list[Tensor], activations: str, keep: bool, precision: str, backend: str
) -> tuple[Tensor, Tensor]:
    """(y ``[N, B, out]``, what the backward pass needs, without rows unless `keep`).

    `parameters`: those of N networks of one shape, one network after the other. `activations`: names
    joined by commas, since an op's schema has no list of strings.
    """
    parameters = [p.contiguous() for p in parameters]
    x = x.contiguous()
    if backend == "triton":
        from diffcore.ops.mlp import triton

        return triton.forward(x, parameters, activations, keep, precision)
    core = _native._core
    functions = kinds(activations)
    networks, batch = len(parameters) // (2 * len(functions)), x.shape[0]
    y = x.new_empty(networks, batch, parameters[-1].shape[0])
    multiplied_in = getattr(core.Precision, precision)
    width = core.mlp_saved_width(parameters, functions, multiplied_in) if keep else 0
    saved = x.new_empty(networks, batch if keep else 0, width)
    if batch:
        core.mlp_forward(
            parameters,
            functions,
            multiplied_in,
            batch,
            x.data_ptr(),
            y.data_ptr(),
            saved.data_ptr() if keep else 0,
            torch.get_num_threads(),
        )
    return y, saved


forward = _native.op("mlp")(run_forward)


def saved_width(parameters: list[Tensor], activations: str, precision: str) -> int:
    """Floats a row of what the CPU's backward pass needs, from shapes alone."""
    layers = [(0, 0, w.shape[1], w.shape[0]) for w in parameters[::2]]
    core = _native._core
    width: int = core.mlp_saved_width(layers, kinds(activations), getattr(core.Precision, precision))
    return width


@_native.fake("mlp")
def _(
    x: Tensor, parameters: list[Tensor], activations: str, keep: bool, precision: str, backend: str
) -> tuple[Tensor, Tensor]:
    networks = len(parameters) // (2 * len(activations.split(",")))
    if backend == "triton":
        from diffcore.ops.mlp import triton

        width = triton.saved_width(parameters, activations, keep)
    else:
        width = saved_width(parameters, activations, precision) if keep else 0
    return (
        x.new_empty(networks, x.shape[0], parameters[-1].shape[0]),
        x.new_empty(networks, x.shape[0] if keep else 0, width),
    )


def run_backward(
    grad_y: Tensor,
    x: Tensor,
    saved: Tensor,
    parameters: list[Tensor],
    activations: str,
    wants_x: bool,
    wants_parameters: bool,
    precision: str,
    backend: str,
) -> list[Tensor]:
    """[gradient of x (empty unless wanted), then, if wanted, of every parameter]."""
    parameters = [p.contiguous() for p in parameters]
    grad_y, x = grad_y.contiguous(), x.contiguous()
    if backend == "triton":
        from diffcore.ops.mlp import triton

        wanted = (wants_x, wants_parameters)
        return triton.backward(grad_y, saved, parameters, activations, *wanted, precision)
    batch = x.shape[0]
    grad_x = x.new_empty(batch if wants_x else 0, x.shape[1])
    make = torch.empty_like if batch else torch.zeros_like
    grads = [make(p) for p in parameters] if wants_parameters else []
    if batch:
        backward_into(grad_x, grads, grad_y, x, saved, parameters, activations, precision)
    return [grad_x, *grads]


def backward_into(
    grad_x: Tensor,
    grads: list[Tensor],
    grad_y: Tensor,
    x: Tensor,
    saved: Tensor,
    parameters: list[Tensor],
    activations: str,
    precision: str,
) -> None:
    """The same on the CPU, of some rows, written into contiguous tensors: those that have rows."""
    core = _native._core
    core.mlp_backward(
        parameters,
        kinds(activations),
        getattr(core.Precision, precision),
        x.shape[0],
        x.data_ptr(),
        saved.data_ptr(),
        grad_y.data_ptr(),
        grad_x.data_ptr() if grad_x.shape[0] else 0,
        [g.data_ptr() for g in grads],
        torch.get_num_threads(),
    )


backward = _native.op("mlp_backward")(run_backward)


@_native.fake("mlp_backward")
def fake_backward(
    x: Tensor, parameters: list[Tensor], wants_x: bool, wants_parameters: bool
) -> list[Tensor]:
    grad_x = x.new_empty(x.shape[0] if wants_x else 0, x.shape[1])
    return [grad_x, *([p.new_empty(p.shape) for p in parameters] if wants_parameters else [])]


@flops("mlp")
def _(x: Shape, parameters: list[Shape]) -> int:
    return mlps(x[0], parameters)


@flops("mlp_backward")
def _(
    x: Shape, parameters: list[Shape], activations: str, wants_x: bool, wants_parameters: bool
) -> int:
    layers = len(activations.split(","))
    return mlps_backward(x[0], parameters, layers, wants_x, wants_parameters)


@_native.vmap("mlp")
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    """A batched x is more rows, unless rows are to be saved, which lie layer by layer."""
    x_dim, parameter_dims, *_ = in_dims
    x, parameters, activations, keep, *settings = args
    if keep or any(d is not None for d in parameter_dims):
        return _native.one_by_one(forward)(info, in_dims, *args)
    rows = x.movedim(x_dim, 0).flatten(0, 1)
    y, saved = forward(rows, parameters, activations, False, *settings)
    return (y.unflatten(1, (info.batch_size, -1)), saved), (1, None)


# Every element has parameter gradients of its own.
_native.vmap("mlp_backward")(_native.one_by_one(backward))


class MLP(torch.autograd.Function):
    """The op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, activations: str, precision: str, backend: str, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        return forward(x, list(parameters), activations, True, precision, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.activations, ctx.precision, ctx.backend, *parameters = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # no zeros as large as what is kept
        ctx.save_for_backward(x, output[1], *parameters)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, _: Tensor) -> Any:
        x, saved, *parameters = ctx.saved_tensors
        wants_x, wants_parameters = ctx.needs_input_grad[0], any(ctx.needs_input_grad[4:])
        settings = (ctx.activations, wants_x, wants_parameters, ctx.precision, ctx.backend)

        def compute(grad_y: Tensor, x: Tensor, saved: Tensor, *parameters: Tensor) -> Any:
            return backward(grad_y, x, saved, list(parameters), *settings)

        grads = _native.gradients("mlp", compute, grad_y, x, saved, *parameters)
        grad_x, *grad_parameters = grads
        return (
            grad_x if wants_x else None,
            *[None] * 3,
            *(grad_parameters if wants_parameters else [None] * len(parameters)),
        )
