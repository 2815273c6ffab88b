"""Losses whose op computes the gradients together with the loss.

A scalar's gradients are known up to a factor before anyone asks for them, and computing them in the
forward pass spares keeping, or computing again, all that they need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore.ops import _native


def scaled(
    op: str, grad_loss: Tensor, grads: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Sequence[Tensor]:
    """``grad_loss * grad`` for every gradient, for the backward of the op's Function.

    Args:
        op: its name, for the message.
        grad_loss: 0-d.
        grads: what the op computed.
        inputs: what the op's gradients depend on, so that differentiating them is noticed.
    """
    if torch.compiler.is_compiling():  # where no second derivative exists anyway
        return [grad_loss * grad for grad in grads]
    if _is_last_use(grad_loss):
        return list(grads)
    results: Sequence[Tensor] = _native.apply(
        ScaledGradients, op, len(grads), grad_loss, *grads, *inputs
    )
    return results


def _is_last_use(grad_loss: Tensor) -> bool:
    """Whether the gradients can be given away as they are, as after a plain ``loss.backward()``.

    Nobody will read them again, and their factor is 1.
    """
    return not (
        torch.is_grad_enabled()
        or torch._C._functorch.is_functorch_wrapped_tensor(grad_loss)
        or torch._C._functorch.is_legacy_batchedtensor(grad_loss)  # of is_grads_batched
        or torch._C._autograd._get_current_graph_task_keep_graph()
        or grad_loss.item() != 1.0
    )


class ScaledGradients(torch.autograd.Function):
    """The gradient as a Function, so that differentiating it again says that it can't be done."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, count: int, grad_loss: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad_loss * grad for grad in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.op}: the CPU kernel has no second derivative; "
            "pass backend='reference' to differentiate twice"
        )
