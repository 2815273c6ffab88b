"""Forward corruption on the kernels, as a torch op with a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore.ops import _native


@_native.op("q_sample")
def corrupt(x0: Tensor, t: Tensor, noise: Tensor, levels: Tensor, backend: str) -> Tensor:
    """Shape of x0 ``[B, ...]``. levels ``[K, 2]``: sqrt(abar), sqrt(1 - abar)."""
    x0, t, noise = x0.contiguous(), t.contiguous(), noise.contiguous()
    sample = torch.empty_like(x0)
    if x0.numel():
        from diffcore.ops.q_sample import triton

        triton.q_sample(x0, t, noise, levels, sample)
    return sample


@_native.fake("q_sample")
def _(x0: Tensor) -> Tensor:
    return torch.empty_like(x0, memory_format=torch.contiguous_format)


@_native.vmap("q_sample")
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    """Rows are corrupted each by itself: a batch of calls is one call with more rows."""
    *tensors, levels, backend = args
    size = info.batch_size
    if in_dims[3] is not None:
        raise ValueError("q_sample: vmap over the schedule isn't supported")
    rows = [_native.folded(t, dim, size) for t, dim in zip(tensors, in_dims[:3], strict=True)]
    return corrupt(*rows, levels, backend).unflatten(0, (size, -1)), 0


class QSample(torch.autograd.Function):
    """The op with its gradient, which is made of torch's own ops: it can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return corrupt(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, t, _, levels, _ = inputs
        ctx.save_for_backward(t, levels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        t, levels = ctx.saved_tensors
        known = (t >= 0) & (t < len(levels))
        signal, spread = levels.index_select(0, torch.where(known, t, 0)).unbind(1)
        shape = [-1] + [1] * (grad.ndim - 1)
        factors = [torch.where(known, f, torch.nan).reshape(shape) for f in (signal, spread)]
        return factors[0] * grad, None, factors[1] * grad, None, None
