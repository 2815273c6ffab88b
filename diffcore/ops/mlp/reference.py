"""An MLP in eager PyTorch: the specification, and the fallback."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from diffcore.ops._activations import ACTIVATIONS


def mlp(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activations: Sequence[str]
) -> Tensor:
    for weight, bias, activation in zip(weights, biases, activations, strict=True):
        x = ACTIVATIONS[activation].forward(F.linear(x, weight, bias))
    return x
