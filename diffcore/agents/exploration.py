"""Exploration bonuses: how new a state and action are, judged by their features.

Both are 1 - x^T (...)^-1 x in disguise: the variance left in a Gaussian posterior after what has
been seen (Diff-SR, Eq. 22 and 23). All arithmetic is float64, and a matrix is factorised anew for
every use: at 256 features that takes less time than one layer of a network, and unlike an inverse
that is updated for a million steps (Sherman-Morrison) it can't drift from its matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore.agents.checks import check_integer, check_real

_EXACT = "donot_use_mm_for_euclid_dist"


class EllipticalBonus:
    """``b = phi^T (sum phi phi^T + lambda I)^-1 phi`` (Diff-SR, Eq. 23).

    The sum is kept as a running mean of phi phi^T times the number of transitions that it stands
    for. With ``decay`` below 1 old features are forgotten: they change as the networks learn, and a
    sum of features of which half were computed with other weights means nothing.

    Args:
        features: F, the width of phi.
        ridge: lambda, above 0.
        decay: what is left of the old mean when a batch comes in; 1 weighs all rows alike.
        device: where the sum lives.

    Raises:
        TypeError, ValueError: if a number is of the wrong kind or out of range.
    """

    def __init__(
        self,
        features: int,
        ridge: float,
        *,
        decay: float = 0.99,
        device: str | torch.device = "cpu",
    ) -> None:
        check_integer("features", features, at_least=1)
        check_real("ridge", ridge, above=0.0)
        check_real("decay", decay, above=0.0, at_most=1.0)
        self.features, self.ridge, self.decay = features, ridge, decay
        self.total = torch.zeros(features, features, dtype=torch.float64, device=device)
        """Sum of phi phi^T, decayed."""
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        """Number of rows in it, decayed alike."""

    @torch.no_grad()
    def add(self, phi: Tensor) -> None:
        """Take in rows that were seen.

        Args:
            phi: ``[B, F]``.
        """
        phi = phi.double()
        self.total.mul_(self.decay).addmm_(phi.T, phi)
        self.weight.mul_(self.decay).add_(phi.shape[0])

    @torch.no_grad()
    def __call__(self, phi: Tensor, count: float | None = None) -> Tensor:
        """The bonus of each row, at least 0 and falling as more is seen.

        Args:
            phi: ``[B, F]``.
            count: how many transitions what was taken in stands for, such as all in the replay
                that batches were drawn from; None: as many as were taken in.

        Returns:
            ``[B, 1]`` of phi's dtype.
        """
        scale = 1.0 if count is None else count / self.weight.clamp(min=1.0)
        # The product of a matrix with its own transpose need not be symmetric to the last bit.
        covariance = scale * 0.5 * (self.total + self.total.T)
        covariance.diagonal().add_(self.ridge)
        factor = torch.linalg.cholesky_ex(covariance).L
        whitened = torch.linalg.solve_triangular(factor, phi.double().T, upper=False)
        return whitened.square().sum(dim=0).unsqueeze(-1).to(phi.dtype)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`add` changes; live tensors."""
        return {"total": self.total, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state_dict`."""
        self.total.copy_(state["total"])
        self.weight.copy_(state["weight"])


@torch.no_grad()
def kernel_bonus(x: Tensor, seen: Tensor, ridge: float) -> Tensor:
    """``b = 1 - k(x)^T (K + lambda I)^-1 k(x)`` (Diff-SR, Eq. 22), of a Gaussian kernel.

    Its bandwidth is the median distance between two rows of ``seen``, over all pairs of different
    rows (the lower one of two in the middle).

    Args:
        x: ``[B, d]``, features to be judged.
        seen: ``[M, d]``, features that were seen; k(x) has their kernels with x, K among each other.
            M is at least 2.
        ridge: lambda, above 0.

    Returns:
        ``[B, 1]`` of x's dtype, in [0, 1].

    Raises:
        TypeError, ValueError: if lambda isn't a positive number, or ``seen`` has fewer rows.
    """
    check_real("ridge", ridge, above=0.0)
    if len(seen) < 2:
        raise ValueError(f"seen must have at least 2 rows, for a bandwidth, got {len(seen)}")
    x64, seen64 = x.double(), seen.double()
    bandwidth = torch.pdist(seen64).median()  # without the distances of rows from themselves
    two_h2 = 2 * bandwidth.square().clamp(min=torch.finfo(torch.float64).tiny)
    among = torch.cdist(seen64, seen64, compute_mode=_EXACT)
    kernel = torch.exp(-among.square() / two_h2)
    kernel.diagonal().add_(ridge)
    factor = torch.linalg.cholesky_ex(kernel).L
    k = torch.exp(-torch.cdist(seen64, x64, compute_mode=_EXACT).square() / two_h2)
    explained = torch.linalg.solve_triangular(factor, k, upper=False).square().sum(dim=0)
    return (1 - explained).clamp(min=0.0).unsqueeze(-1).to(x.dtype)
