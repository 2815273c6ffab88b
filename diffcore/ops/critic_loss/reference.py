"""The critics' loss in eager PyTorch: the specification, and the fallback."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffcore.ops.mlp_ensemble import reference


def critic_loss(
    x: Tensor,
    networks: Sequence[Sequence[Tensor]],
    activations: Sequence[str],
    target: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    q = reference.mlp_ensemble(x, networks, activations)
    squares = (q - target).square()
    if weight is not None:
        squares = weight[:, None] * squares
    return squares.mean(dim=(1, 2)).sum(), q.detach()
