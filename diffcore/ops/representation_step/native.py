"""The steps on the kernels of the loss and of Adam.

It isn't an op that torch dispatches: what would follow one, a compiler for instance, gets the
reference's ops to see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffcore.ops import _adam, _native
from diffcore.ops.mlp import native as mlp


@torch.no_grad()
def step(
    x: Tensor,
    perturbed: Tensor,
    offset: Tensor,
    score_weight: Tensor,
    psi: list[Tensor],
    zeta: list[Tensor],
    psi_activations: str,
    zeta_activations: str,
    optimizer: torch.optim.Adam,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(losses, norms of their gradients), with which `psi` and `zeta` were stepped.

    They are all that `optimizer` holds. `x` and the others: of one minibatch or several.
    `zeta_activations`: without the last layer's.
    """
    inputs = [t.contiguous() for t in (x, perturbed, offset, score_weight)]
    parameters = [*psi, *zeta]
    adam = _adam.KernelSteps(optimizer, parameters)
    loss, norm = x.new_empty(x.shape[:-2]), x.new_empty(x.shape[:-2])
    core = _native._core
    arguments = (
        psi,
        mlp.kinds(psi_activations),
        zeta,
        mlp.kinds(zeta_activations),
        getattr(core.Precision, precision),
        loss.numel(),  # minibatches
        *offset.shape[-2:],
        *[t.data_ptr() for t in (*inputs, loss, norm)],
        adam.exp_avgs,
        adam.exp_avg_sqs,
        adam.counts,
        *adam.settings,
        torch.get_num_threads(),
    )
    adam.take(lambda: core.representation_step(*arguments), loss.numel())
    for parameter in parameters:
        parameter.grad = None
    return loss, norm
