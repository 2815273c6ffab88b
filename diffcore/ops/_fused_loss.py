"""Losses whose op computes the gradients together with the loss.

A scalar's gradients are known up to a factor before anyone asks for them, and computing them in the
forward pass spares keeping, or computing again, all that they need.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore.ops import _native


def scaled(
    op: str, grad_loss: Tensor | None, grads: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """``grad_loss * grad`` for every gradient, for the backward of the op's Function.

    Args:
        op: its name, for the message.
        grad_loss: 0-d; None where the loss doesn't matter.
        grads: what the op computed.
        inputs: what the op's gradients depend on, so that differentiating them is noticed.
    """
    if grad_loss is None:
        return [None] * len(grads)
    if not torch.compiler.is_compiling() and _is_last_use(grad_loss):
        if not grad_loss.is_cpu:  # to know its value would be to wait for the device
            torch._foreach_mul_(list(grads), grad_loss)
            return grads
        if grad_loss.item() == 1.0:
            return grads

    count = len(grads)

    def scale(grad_loss: Tensor, *tensors: Tensor) -> list[Tensor]:
        # Expanded: torch has no product of numbers and tensors under a vmap over an empty batch.
        return [grad_loss.expand_as(grad) * grad for grad in tensors[:count]]

    return _native.gradients(op, scale, grad_loss, *grads, *inputs)


def without_rows(tensor: Tensor) -> Tensor:
    """What stands for a gradient of this tensor that isn't wanted."""
    return tensor.new_empty(0, *tensor.shape[1:])


def fake_gradients(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """What the gradients of these look like, for the op's fake."""
    return [
        t.new_empty(t.shape) if want else without_rows(t)
        for t, want in zip(tensors, wanted, strict=True)
    ]


def _is_last_use(grad_loss: Tensor) -> bool:
    """Whether nobody will read the gradients again, as after a plain ``loss.backward()``.

    Then they themselves can be given away. What is traced or faked always scales them: its factor
    has no value to look at.
    """
    return not (
        torch.is_grad_enabled()
        or type(grad_loss) is not Tensor
        or _native.is_in_a_mode()
        or torch._C._functorch.is_functorch_wrapped_tensor(grad_loss)
        or _native.is_batch_of_gradients(grad_loss)
        or torch._C._autograd._get_current_graph_task_keep_graph()
    )
