"""Random Fourier features on the kernels: forward and backward as torch ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore.ops import _native
from diffcore.ops._flops import Shape, flops, products


def _width(omega: Tensor, kind: str) -> int:
    return 2 * omega.shape[0] if kind == "cos_sin" else omega.shape[0]


def _layer(omega: Tensor, bias: Tensor | None) -> _native.Layer:
    return omega.data_ptr(), _native.address(bias), omega.shape[1], omega.shape[0]


@_native.op("rff_features")
def forward(
    x: Tensor,
    omega: Tensor,
    bias: Tensor | None,
    kind: str,
    scale: float,
    keep: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(y ``[B, width]``, the slopes ``[B, features]``; without rows unless `keep` asks for them).

    "cos_sin" never keeps any: cosines and sines are each other's slopes.
    """
    x, omega = x.contiguous(), omega.contiguous()
    bias = None if bias is None else bias.contiguous()
    if backend == "triton":
        from diffcore.ops.rff_features import triton

        return triton.forward(x, omega, bias, kind, scale, keep, precision)
    batch = x.shape[0]
    y = x.new_empty(batch, _width(omega, kind))
    keep = keep and kind != "cos_sin"
    slope = x.new_empty(batch if keep else 0, omega.shape[0])
    if batch:
        module = _native._cuda if backend == "cuda" else _native._core
        call = (
            _layer(omega, bias),
            getattr(module.RffKind, kind),
            scale,
            batch,
            x.data_ptr(),
            y.data_ptr(),
            slope.data_ptr() if keep else 0,
        )
        if backend == "cuda":
            with torch.cuda.device_of(x):
                module.rff_features(*call, _native.stream(x))
        else:
            module.rff_features(*call, torch.get_num_threads())
    return y, slope


@_native.fake("rff_features")
def _(x: Tensor, omega: Tensor, kind: str, keep: bool) -> tuple[Tensor, Tensor]:
    keep = keep and kind != "cos_sin"
    return (
        x.new_empty(x.shape[0], _width(omega, kind)),
        x.new_empty(x.shape[0] if keep else 0, omega.shape[0]),
    )


@_native.op("rff_features_backward")
def backward(
    grad_y: Tensor,
    x: Tensor,
    omega: Tensor,
    saved: Tensor,
    kind: str,
    wants_x: bool,
    wants_omega: bool,
    wants_bias: bool,
    precision: str,
    backend: str,
) -> list[Tensor]:
    """Gradients of x, omega and bias, those that aren't wanted empty.

    `saved`: the slopes, for "cos_sin" y.
    """
    grad_y, x, omega, saved = (t.contiguous() for t in (grad_y, x, omega, saved))
    if backend == "triton":
        from diffcore.ops.rff_features import triton

        wanted = (wants_x, wants_omega, wants_bias)
        return triton.backward(grad_y, x, omega, saved, kind, *wanted, precision)
    wants_parameters = wants_omega or wants_bias
    batch, features, width = x.shape[0], omega.shape[0], x.shape[1]
    empty = x.new_empty if batch else x.new_zeros
    grad_x = empty(batch if wants_x else 0, width)
    grad_omega = empty(features if wants_parameters else 0, width)
    grad_bias = empty(features if wants_bias else 0)
    if batch:
        module = _native._cuda if backend == "cuda" else _native._core
        call = (
            _layer(omega, None),
            getattr(module.RffKind, kind),
            batch,
            x.data_ptr(),
            saved.data_ptr(),
            grad_y.data_ptr(),
            grad_x.data_ptr() if wants_x else 0,
            grad_omega.data_ptr() if wants_parameters else 0,
            grad_bias.data_ptr() if wants_bias else 0,
        )
        if backend == "cuda":
            with torch.cuda.device_of(x):
                size = module.rff_features_backward_workspace(*call[:3])
                workspace = _native.workspace(size, x)
                module.rff_features_backward(*call, workspace.data_ptr(), _native.stream(x))
        else:
            module.rff_features_backward(*call, torch.get_num_threads())
    return [grad_x, grad_omega if wants_omega else grad_omega.new_empty(0, width), grad_bias]


@_native.fake("rff_features_backward")
def _(
    x: Tensor, omega: Tensor, wants_x: bool, wants_omega: bool, wants_bias: bool
) -> list[Tensor]:
    return [
        x.new_empty(x.shape[0] if wants_x else 0, x.shape[1]),
        x.new_empty(omega.shape[0] if wants_omega else 0, x.shape[1]),
        x.new_empty(omega.shape[0] if wants_bias else 0),
    ]


@flops("rff_features")
def _(x: Shape, omega: Shape) -> int:
    return products(x[0], [omega])


@flops("rff_features_backward")
def _(x: Shape, omega: Shape, wants_x: bool, wants_omega: bool) -> int:
    return (wants_x + wants_omega) * products(x[0], [omega])


@_native.vmap("rff_features")
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    """A batched x is more rows; batched frequencies or phases run one by one."""
    x_dim, omega_dim, bias_dim, *_ = in_dims
    if omega_dim is not None or bias_dim is not None:
        return _native.one_by_one(forward)(info, in_dims, *args)
    x, *rest = args
    results = forward(x.movedim(x_dim, 0).flatten(0, 1), *rest)
    y, slope = (t.reshape(info.batch_size, -1, t.shape[1]) for t in results)
    return (y, slope), (0, 0)


# Every element has parameter gradients of its own.
_native.vmap("rff_features_backward")(_native.one_by_one(backward))


class RffFeatures(torch.autograd.Function):
    """The op with its gradient; a Function, since torch.func takes no other kind."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        omega: Tensor,
        bias: Tensor | None,
        kind: str,
        scale: float,
        precision: str,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        return forward(x, omega, bias, kind, scale, True, precision, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, omega, _, ctx.kind, _, ctx.precision, ctx.backend = inputs
        y, slope = output
        ctx.mark_non_differentiable(slope)
        ctx.set_materialize_grads(False)  # no zeros as large as what is kept
        ctx.save_for_backward(x, omega, y if ctx.kind == "cos_sin" else slope)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, _: Tensor) -> Any:
        settings = (ctx.kind, *ctx.needs_input_grad[:3], ctx.precision, ctx.backend)
        arguments = (grad_y, *ctx.saved_tensors, *settings)
        grads = _native.gradients("rff_features", backward, *arguments)
        wanted = zip(grads, ctx.needs_input_grad[:3], strict=True)
        return (*(grad if wants else None for grad, wants in wanted), *[None] * 4)
