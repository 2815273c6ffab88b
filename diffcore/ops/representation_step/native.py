"""The step on the kernels of the loss and of Adam.

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
    """(loss, norm of its gradient), after `psi`, `zeta`, all that `optimizer` holds, were stepped.

    `zeta_activations`: without the last layer's.
    """
    inputs = [t.contiguous() for t in (x, perturbed, offset, score_weight)]
    parameters = [*psi, *zeta]
    adam = _adam.KernelStep(optimizer, parameters)
    loss = x.new_empty(())
    core = _native._core
    arguments = (
        psi,
        mlp.kinds(psi_activations),
        zeta,
        mlp.kinds(zeta_activations),
        getattr(core.Precision, precision),
        x.shape[0],
        offset.shape[1],
        *[t.data_ptr() for t in (*inputs, loss)],
        adam.exp_avgs,
        adam.exp_avg_sqs,
        adam.steps,
        *adam.settings,
        torch.get_num_threads(),
    )
    norm = adam.take(lambda: core.representation_step(*arguments))
    for parameter in parameters:
        parameter.grad = None
    return loss, torch.tensor(norm, dtype=torch.float32, device="cpu")
