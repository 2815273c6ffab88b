"""Random Fourier features as a module: fixed, orthogonal or learnable frequencies."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffcore.ops._checks import check_choice, check_number, check_positive_int, checked_inputs
from diffcore.ops._native import fits
from diffcore.ops.rff_features import KINDS, rff_features


class RandomFourierFeatures(nn.Module):
    """phi(x) with ``phi(x) . phi(y)`` near the Gaussian kernel exp(-|x - y|^2 / (2 lengthscale^2)).

    Frequencies are drawn from the kernel's spectrum, N(0, 1 / lengthscale^2) (Rahimi & Recht 2007).
    By kind:

    - "cos_sin": [cos(omega x), sin(omega x)] / sqrt(features), without phases;
    - "cos": sqrt(2 / features) cos(omega x + b), with b uniform in [0, 2 pi);
    - "sin": sin(omega x + b) without a factor, the layer of Diff-SR's critic. Its products estimate
      features / 2 times the kernel if it has uniform phases (``bias=True``), else features / 2 times
      k(x - y) - k(x + y), which is not a kernel of x - y.

    Orthogonal frequencies (Yu et al. 2016) are the rows of random rotations, in blocks of ``in_dim``,
    with lengths drawn like those of Gaussian rows: the same expectation, a smaller variance.

    Args:
        in_dim: width of x.
        features: number of frequencies; "cos_sin" has twice as many outputs.
        kind: "sin", "cos" or "cos_sin".
        lengthscale: of the kernel, above 0.
        orthogonal: frequencies orthogonal in each block of ``in_dim``.
        learnable: frequencies and phases are parameters. Fixed ones are buffers: they are in the
            ``state_dict`` and move with the module, but no optimiser sees them.
        bias: whether there are phases; None for what the kind needs: True for "cos", else False.
        generator: a CPU generator that the frequencies and phases are drawn from.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_dim: int,
        features: int,
        *,
        kind: str = "sin",
        lengthscale: float = 1.0,
        orthogonal: bool = False,
        learnable: bool = False,
        bias: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        in_dim = check_positive_int("in_dim", in_dim)
        features = check_positive_int("features", features)
        check_choice("kind", kind, KINDS)
        lengthscale = check_number("lengthscale", lengthscale, above=0)
        self.in_dim, self.features, self.kind = in_dim, features, kind
        self.out_dim = 2 * features if kind == "cos_sin" else features
        factor = {"sin": 1.0, "cos": math.sqrt(2 / features), "cos_sin": 1 / math.sqrt(features)}
        self.scale = factor[kind]
        draw = _orthogonal_frequencies if orthogonal else _gaussian_frequencies
        omega = draw(features, in_dim, generator) / lengthscale
        phases = None
        if kind == "cos" if bias is None else bias:
            phases = 2 * math.pi * torch.rand(features, generator=generator)
        if learnable:
            self.omega = nn.Parameter(omega)
            self.bias = None if phases is None else nn.Parameter(phases)
        else:
            self.register_buffer("omega", omega)
            self.register_buffer("bias", phases)

    def forward(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        """``[..., in_dim]`` -> ``[..., out_dim]``, see :func:`diffcore.ops.rff_features`."""
        omega: Tensor = self.omega
        if not fits(x, ("B", self.in_dim)) or x.dtype is not omega.dtype:
            [x] = checked_inputs(self, ("x",), [x], (self.in_dim,))
        return rff_features(
            x, omega, self.bias, kind=self.kind, scale=self.scale, backend=backend
        )

    def extra_repr(self) -> str:
        return f"{self.in_dim}, {self.features}, kind={self.kind!r}, bias={self.bias is not None}"


def _gaussian_frequencies(
    features: int, in_dim: int, generator: torch.Generator | None
) -> Tensor:
    return torch.randn(features, in_dim, generator=generator)


def _orthogonal_frequencies(
    features: int, in_dim: int, generator: torch.Generator | None
) -> Tensor:
    """Uniformly distributed rotations, one after the other, their rows as long as Gaussian ones."""
    blocks = -(-features // in_dim)
    gaussian = torch.randn(blocks, in_dim, in_dim, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    # QR's convention for signs would make Q other than uniform (Mezzadri 2007).
    rotations = q * r.diagonal(dim1=1, dim2=2).sign()[:, None, :]
    lengths = torch.randn(blocks, in_dim, in_dim, generator=generator, dtype=torch.float64).norm(
        dim=2, keepdim=True
    )
    return (lengths * rotations).reshape(-1, in_dim)[:features].to(torch.get_default_dtype())
