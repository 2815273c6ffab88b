"""A policy's sample in eager PyTorch: the specification, and the fallback."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from diffcore.ops.mlp.reference import mlp


def squashed_gaussian(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activations: Sequence[str],
    noise: Tensor,
    log_std_bounds: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    return sample_outputs(mlp(x, weights, biases, activations), noise, log_std_bounds)


def sample_outputs(
    outputs: Tensor, noise: Tensor, log_std_bounds: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """What follows the network."""
    mean, raw = outputs.chunk(2, dim=-1)
    return sample(mean, bounded(raw, log_std_bounds), noise)


def bounded(raw: Tensor, log_std_bounds: tuple[float, float]) -> Tensor:
    """The log standard deviation, which a tanh keeps within its bounds."""
    low, high = log_std_bounds
    return low + 0.5 * (high - low) * (raw.tanh() + 1)


def sample(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 - tanh^2 u) is taken as 2 (log 2 - u - softplus(-2 u)), which doesn't overflow."""
    u = mean + log_std.exp() * noise
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    squash = 2 * (math.log(2) - u - F.softplus(-2 * u))
    return u.tanh(), (gaussian - squash).sum(dim=-1, keepdim=True)
