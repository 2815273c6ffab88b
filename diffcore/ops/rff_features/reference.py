"""Random Fourier features in eager PyTorch: the specification, and the fallback."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rff_features(
    x: Tensor, omega: Tensor, bias: Tensor | None, *, kind: str, scale: float
) -> Tensor:
    z = F.linear(x, omega, bias)
    if kind == "cos_sin":
        return torch.cat([z.cos(), z.sin()], dim=-1) * scale
    return (z.sin() if kind == "sin" else z.cos()) * scale
