"""Diff-SR's score matching loss in eager PyTorch: the specification, and the fallback."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def score_matching_loss(
    psi: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, offset: Tensor, score_weight: Tensor
) -> Tensor:
    batch, features = psi.shape
    zeta = F.linear(hidden, weight, bias).reshape(batch, features, offset.shape[1])
    score = torch.einsum("bd,bds->bs", psi, zeta)
    residual = score_weight[:, None] * score + offset
    return residual.square().sum(dim=1).mean()
