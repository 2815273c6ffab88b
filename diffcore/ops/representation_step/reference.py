"""The steps by PyTorch's autograd and the optimiser itself: the specification, and the fallback."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffcore.ops.representation_loss import representation_loss

if TYPE_CHECKING:
    from diffcore.nn import MLP


def representation_step(
    psi: MLP,
    zeta: MLP,
    x: Tensor,
    perturbed: Tensor,
    offset: Tensor,
    score_weight: Tensor,
    optimizer: torch.optim.Adam,
    compute_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    if x.ndim == 3:
        minibatches = zip(x, perturbed, offset, score_weight, strict=True)
        results = [
            representation_step(psi, zeta, *minibatch, optimizer, compute_dtype)
            for minibatch in minibatches
        ]
        losses, norms = zip(*results, strict=True)
        return torch.stack(losses), torch.stack(norms)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = None
    inputs = x, perturbed, offset, score_weight
    loss = representation_loss(psi, zeta, *inputs, compute_dtype=compute_dtype)
    if loss.requires_grad:
        loss.backward(inputs=[p for p in parameters if p.requires_grad])
    gradients = [p.grad for p in parameters if p.grad is not None]
    of_each = torch._foreach_norm(gradients) if gradients else [loss.new_zeros(())]
    norm = torch.linalg.vector_norm(torch.stack(of_each))
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    return loss.detach(), norm
