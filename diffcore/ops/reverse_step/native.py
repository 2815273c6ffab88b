"""One step of a sampler on the kernels, as a torch op with a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore.ops import _native


@_native.op("reverse_step")
def step(
    x: Tensor,
    eps: Tensor,
    coefficients: Tensor,
    noise: Tensor | None,
    x0_previous: Tensor | None,
    noise_scale: float,
    clip: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(next x, x0), both of the shape of x."""
    x, eps = x.contiguous(), eps.contiguous()
    noise = None if noise is None else noise.contiguous()
    x0_previous = None if x0_previous is None else x0_previous.contiguous()
    next_x, x0 = torch.empty_like(x), torch.empty_like(x)
    if not x.numel():
        return next_x, x0
    if backend == "triton":
        from diffcore.ops.reverse_step import triton

        settings = (coefficients, noise, x0_previous, noise_scale, clip)
        triton.reverse_step(x, eps, *settings, next_x, x0)
        return next_x, x0
    inputs = (
        x.numel(),
        x.data_ptr(),
        eps.data_ptr(),
        _native.address(noise),
        _native.address(x0_previous),
    )
    rest = (noise_scale, clip, next_x.data_ptr(), x0.data_ptr())
    if backend == "cuda":
        if coefficients.is_cpu:
            table = 0, coefficients.tolist()
        else:
            coefficients = coefficients.to(torch.float32).contiguous()
            table = coefficients.data_ptr(), [0.0] * 7
        with torch.cuda.device_of(x):
            _native._cuda.reverse_step(*inputs, *table, *rest, _native.stream(x))
    else:
        _native._core.reverse_step(*inputs, coefficients.tolist(), *rest)
    return next_x, x0


@_native.fake("reverse_step")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    like = torch.empty_like(x, memory_format=torch.contiguous_format)
    return like, torch.empty_like(like)


@_native.vmap("reverse_step")
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    """The step is elementwise: a batch of steps is one step of more rows."""
    x, eps, coefficients, noise, x0_previous, *settings = args
    x_dim, eps_dim, coefficients_dim, noise_dim, x0_dim, *_ = in_dims
    size = info.batch_size
    if coefficients_dim is not None:
        raise ValueError("reverse_step: vmap over the coefficients isn't supported")
    results = step(
        _native.folded(x, x_dim, size),
        _native.folded(eps, eps_dim, size),
        coefficients,
        _native.folded(noise, noise_dim, size),
        _native.folded(x0_previous, x0_dim, size),
        *settings,
    )
    return tuple(r.unflatten(0, (size, -1)) for r in results), (0, 0)


class ReverseStep(torch.autograd.Function):
    """The op with its gradient, which is made of torch's own ops: it can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return step(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, eps, coefficients, noise, x0_previous, ctx.noise_scale, ctx.clip, _ = inputs
        ctx.has_noise, ctx.has_x0_previous = noise is not None, x0_previous is not None
        ctx.save_for_backward(x, eps, coefficients)

    @staticmethod
    def backward(ctx: Any, grad_next: Tensor, grad_x0: Tensor) -> Any:
        x, eps, coefficients = ctx.saved_tensors
        c0, c1, c2, c3, c4, c5, c6 = coefficients.to(x.dtype).unbind()  # on any device: 0-dim
        unclipped = c0 * x - c1 * eps
        inside = (unclipped >= -ctx.clip) & (unclipped <= ctx.clip)
        grad_unclipped = torch.where(inside, grad_x0 + c2 * grad_next, 0.0)
        return (
            c3 * grad_next + c0 * grad_unclipped,
            c4 * grad_next - c1 * grad_unclipped,
            None,
            c5 * ctx.noise_scale * grad_next if ctx.has_noise else None,
            c6 * grad_next if ctx.has_x0_previous else None,
            None,
            None,
            None,
        )
