"""The soft value op by op: the specification, and the fallback."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffcore.nn import Psi, SquashedGaussian, TwinRFFCritic


def soft_value(
    policy: SquashedGaussian,
    psi: Psi,
    critics: TwinRFFCritic,
    state: Tensor,
    noise: Tensor,
    temperature: Tensor,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`backend`: that of every op."""
    # Networks with a forward of their own needn't know of backends.
    forced = {} if backend is None else {"backend": backend}
    action, log_prob = policy.sample(state, noise, **forced)
    q = torch.minimum(*critics(psi(state, action, **forced), **forced))
    value = q - temperature * log_prob
    return -value.mean(), value.detach(), log_prob.detach()
