"""The representation loss in eager PyTorch: the specification, and the fallback."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from diffcore.ops.score_matching_loss import reference

if TYPE_CHECKING:
    from diffcore.nn import MLP


def representation_loss(
    psi: MLP, zeta: MLP, x: Tensor, perturbed: Tensor, offset: Tensor, score_weight: Tensor
) -> Tensor:
    features = psi(x, backend="reference")
    hidden = zeta.hidden(perturbed, backend="reference")
    weight, bias = zeta.weights_and_biases()[-2:]
    return reference.score_matching_loss(features, hidden, weight, bias, offset, score_weight)
