"""The representation loss in eager PyTorch: the specification, and the fallback."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from diffcore.ops.mlp.reference import mlp
from diffcore.ops.score_matching_loss import reference

if TYPE_CHECKING:
    from diffcore.nn import MLP


def representation_loss(
    psi: MLP, zeta: MLP, x: Tensor, perturbed: Tensor, offset: Tensor, score_weight: Tensor
) -> Tensor:
    # Of the networks' weights, as in the kernels: forward hooks play no part.
    parameters = psi.weights_and_biases()
    features = mlp(x, parameters[::2], parameters[1::2], psi.activations)
    *parameters, weight, bias = zeta.weights_and_biases()
    hidden = mlp(perturbed, parameters[::2], parameters[1::2], zeta.activations[:-1])
    return reference.score_matching_loss(features, hidden, weight, bias, offset, score_weight)
