"""Networks of one shape in eager PyTorch: the specification, and the fallback."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore.ops.mlp import reference


def mlp_ensemble(
    x: Tensor, networks: Sequence[Sequence[Tensor]], activations: Sequence[str]
) -> Tensor:
    return torch.stack([reference.mlp(x, p[::2], p[1::2], activations) for p in networks])
