"""Random Fourier features against float64, with gradients, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffcore import ops


def run(
    x: Tensor,
    omega: Tensor,
    bias: Tensor | None,
    backend: str,
    dtype: torch.dtype = torch.float32,
    *,
    kind: str = "sin",
    scale: float = 1.0,
) -> Tensor:
    """The features in a precision."""
    x, omega = x.to(dtype), omega.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return ops.rff_features(x, omega, bias, kind=kind, scale=scale, backend=backend)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kind", ["sin", "cos", "cos_sin"])
def test_reference_is_the_equation(kind: str, with_bias: bool) -> None:
    x, omega, bias = torch.randn(4, 3).double(), torch.randn(5, 3).double(), torch.randn(5).double()
    z = x @ omega.T + (bias if with_bias else 0)
    blocks = {"sin": [z.sin()], "cos": [z.cos()], "cos_sin": [z.cos(), z.sin()]}[kind]
    y = run(
        x, omega, bias if with_bias else None, "reference", torch.float64, kind=kind, scale=0.5
    )
    torch.testing.assert_close(y, 0.5 * torch.cat(blocks, 1))
