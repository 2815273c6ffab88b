"""The score matching loss on the CPU kernel, which computes the gradients together with the loss.

As torch ops, joined by a Function. A scalar's gradients are known up to a factor before anyone asks
for them, and to compute them later would mean to compute zeta once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore.ops import _native


@_native.cpu_op("score_matching_loss")
def loss_and_gradients(
    psi: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    offset: Tensor,
    score_weight: Tensor,
    bfloat16: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, its gradients with respect to psi, hidden, weight and bias).

    `wanted`: which of the four gradients to compute; the others come back without rows.
    """
    core = _native._core
    sources = [t.contiguous() for t in (psi, hidden, weight, bias)]
    others = [t.contiguous() for t in (offset, score_weight)]
    loss = psi.new_full((), float("nan"))  # the mean of an empty batch
    make = torch.empty_like if len(psi) else torch.zeros_like
    grads = [
        make(t) if want else t.new_empty(0, *t.shape[1:])
        for t, want in zip(sources, wanted, strict=True)
    ]
    if len(psi):
        core.score_matching_loss(
            len(psi),
            psi.shape[1],
            offset.shape[1],
            hidden.shape[1],
            core.Precision.bfloat16 if bfloat16 else core.Precision.float32,
            *[t.data_ptr() for t in (*sources, *others)],
            loss.data_ptr(),
            *[g.data_ptr() if want else 0 for g, want in zip(grads, wanted, strict=True)],
            torch.get_num_threads(),
        )
    return loss, grads[0], grads[1], grads[2], grads[3]


@_native.fake("score_matching_loss")
def _(
    psi: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    offset: Tensor,
    score_weight: Tensor,
    bfloat16: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    sources = (psi, hidden, weight, bias)
    shapes = [
        (len(t) if want else 0, *t.shape[1:]) for t, want in zip(sources, wanted, strict=True)
    ]
    return psi.new_empty(()), *(psi.new_empty(shape) for shape in shapes)


@_native.vmap("score_matching_loss")
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    """One by one: every element has a loss of its own."""
    results = _native.one_by_one(loss_and_gradients, info.batch_size, in_dims, args)
    return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * 5


class ScoreMatchingLoss(torch.autograd.Function):
    """The op with its gradient; a Function, since torch.func takes no other kind."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return loss_and_gradients(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.bfloat16, ctx.wanted = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:], *tensors)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> Any:
        grads, tensors = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        if torch.compiler.is_compiling():  # where no second derivative exists anyway
            scaled = [grad_loss * grad for grad in grads]
        elif _is_last_use(grad_loss):
            scaled = list(grads)
        else:
            scaled = ScoreMatchingLossBackward.apply(grad_loss, *grads, *tensors)
        return *(g if want else None for g, want in zip(scaled, ctx.wanted)), *[None] * 4


def _is_last_use(grad_loss: Tensor) -> bool:
    """Whether the gradients can be given away as they are, as after a plain ``loss.backward()``.

    Nobody will read them again, and their factor is 1.
    """
    return not (
        torch.is_grad_enabled()
        or torch._C._functorch.is_functorch_wrapped_tensor(grad_loss)
        or torch._C._autograd._get_current_graph_task_keep_graph()
        or grad_loss.item() != 1.0
    )


class ScoreMatchingLossBackward(torch.autograd.Function):
    """The gradient as a Function, so that differentiating it again says that it can't be done.

    It takes the op's inputs for that alone.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_loss: Tensor,
        grad_psi: Tensor,
        grad_hidden: Tensor,
        grad_weight: Tensor,
        grad_bias: Tensor,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        grads = (grad_psi, grad_hidden, grad_weight, grad_bias)
        return tuple(grad_loss * grad for grad in grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "score_matching_loss: the CPU kernel has no second derivative; "
            "pass backend='reference' to differentiate twice"
        )
