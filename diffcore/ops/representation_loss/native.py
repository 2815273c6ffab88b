"""The representation loss on the kernels of its parts, in one torch op.

Every op that torch dispatches, every node of its graph and every tensor in between costs as much as a
small network's kernel. Here there is one op and one node, around up to five kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore.ops import _fused_loss, _native
from diffcore.ops._flops import Shape, flops, mlps, mlps_backward
from diffcore.ops.mlp import native as mlp
from diffcore.ops.score_matching_loss import native as score_matching


@_native.op("representation_loss")
def loss_and_gradients(
    x: Tensor,
    perturbed: Tensor,
    offset: Tensor,
    score_weight: Tensor,
    psi: list[Tensor],
    zeta: list[Tensor],
    psi_activations: str,
    zeta_activations: str,
    wanted: list[bool],
    precision: str,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    """(loss, its gradients with respect to [x, perturbed, *psi, *zeta]).

    `psi`, `zeta`: their parameters. `zeta_activations`: without the last layer's. `wanted`: whether
    to compute the gradients of x, of perturbed, of psi's parameters and of zeta's; the others come
    back without rows.
    """
    tensors = [t.contiguous() for t in (x, perturbed, *psi, *zeta)]
    x, perturbed, *parameters = tensors
    psi, zeta = parameters[: len(psi)], parameters[len(psi) :]
    if not x.shape[0] or backend == "triton":
        arguments = (x, perturbed, offset, score_weight, psi, zeta)
        names = (psi_activations, zeta_activations)
        return _in_parts(*arguments, *names, wanted, precision, backend)
    offset, score_weight = offset.contiguous(), score_weight.contiguous()
    loss = x.new_empty(())
    grads = [
        torch.empty_like(t) if want else _fused_loss.without_rows(t)
        for t, want in zip(tensors, _each(wanted, psi, zeta), strict=True)
    ]
    grad_psi, grad_zeta = grads[2 : 2 + len(psi)], grads[2 + len(psi) :]
    core = _native._core
    core.representation_loss(
        psi,
        mlp.kinds(psi_activations),
        zeta,
        mlp.kinds(zeta_activations),
        getattr(core.Precision, precision),
        x.shape[0],
        offset.shape[1],
        *[t.data_ptr() for t in (x, perturbed, offset, score_weight, loss)],
        grads[0].data_ptr() if wanted[0] else 0,
        grads[1].data_ptr() if wanted[1] else 0,
        [g.data_ptr() for g in grad_psi] if wanted[2] else [],
        [g.data_ptr() for g in grad_zeta] if wanted[3] else [],
        torch.get_num_threads(),
    )
    return loss, grads


def _in_parts(
    x: Tensor,
    perturbed: Tensor,
    offset: Tensor,
    score_weight: Tensor,
    psi: list[Tensor],
    zeta: list[Tensor],
    psi_activations: str,
    zeta_activations: str,
    wanted: list[bool],
    precision: str,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    """The same by the ops of the parts, undispatched."""
    wants_x, wants_perturbed, wants_psi, wants_zeta = wanted
    through_psi, through_zeta = wants_x or wants_psi, wants_perturbed or wants_zeta
    *hidden_layers, weight, bias = zeta
    settings = (precision, backend)
    features, psi_saved = mlp.run_forward(x, psi, psi_activations, through_psi, *settings)
    hidden, zeta_saved = mlp.run_forward(
        perturbed, hidden_layers, zeta_activations, through_zeta, *settings
    )
    loss, grad_features, grad_hidden, *grad_last = score_matching.run(
        features[0],
        hidden[0],
        weight,
        bias,
        offset,
        score_weight,
        precision,
        [through_psi, through_zeta, wants_zeta, wants_zeta],
        backend,
    )

    def through(
        grad: Tensor,
        x: Tensor,
        saved: Tensor,
        layers: list[Tensor],
        names: str,
        wants_x: bool,
        wants_layers: bool,
    ) -> list[Tensor]:
        grads = [_fused_loss.without_rows(x)]
        if wants_x or wants_layers:
            wants = (wants_x, wants_layers)
            grads = mlp.run_backward(grad[None], x, saved, layers, names, *wants, *settings)
        return grads if wants_layers else [grads[0], *map(_fused_loss.without_rows, layers)]

    of_psi = (grad_features, x, psi_saved, psi, psi_activations)
    of_zeta = (grad_hidden, perturbed, zeta_saved, hidden_layers, zeta_activations)
    grad_x, *grad_psi = through(*of_psi, wants_x, wants_psi)
    grad_perturbed, *grad_zeta = through(*of_zeta, wants_perturbed, wants_zeta)
    return loss, [grad_x, grad_perturbed, *grad_psi, *grad_zeta, *grad_last]


def _each(wanted: list[bool], psi: Sequence[Tensor], zeta: Sequence[Tensor]) -> list[bool]:
    """`wanted` for x, perturbed and every parameter."""
    return [*wanted[:2], *[wanted[2]] * len(psi), *[wanted[3]] * len(zeta)]


@_native.fake("representation_loss")
def _(
    x: Tensor, perturbed: Tensor, psi: list[Tensor], zeta: list[Tensor], wanted: list[bool]
) -> tuple[Tensor, list[Tensor]]:
    tensors = [x, perturbed, *psi, *zeta]
    return x.new_empty(()), _fused_loss.fake_gradients(tensors, _each(wanted, psi, zeta))


@flops("representation_loss")
def _(
    x: Shape, offset: Shape, psi: list[Shape], zeta: list[Shape], wanted: list[bool]
) -> int:
    rows, hidden, last = x[0], zeta[:-2], zeta[-2]
    wants_x, wants_perturbed, wants_psi, wants_zeta = wanted
    through = [wants_x or wants_psi, wants_perturbed or wants_zeta]
    return (
        mlps(rows, [*psi, *hidden])
        + mlps_backward(rows, psi, len(psi) // 2, wants_x, wants_psi)
        + mlps_backward(rows, hidden, len(hidden) // 2, wants_perturbed, wants_zeta)
        + score_matching.score_flops(rows, last, offset[1], [*through, wants_zeta, wants_zeta])
    )


# Every element has a loss of its own.
_native.vmap("representation_loss")(_native.one_by_one(loss_and_gradients))


class RepresentationLoss(torch.autograd.Function):
    """The op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        perturbed: Tensor,
        offset: Tensor,
        score_weight: Tensor,
        psi_activations: str,
        zeta_activations: str,
        wanted: list[bool],
        precision: str,
        backend: str,
        psi_count: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        networks = list(parameters[:psi_count]), list(parameters[psi_count:])
        settings = (psi_activations, zeta_activations, wanted, precision, backend)
        loss, grads = loss_and_gradients(x, perturbed, offset, score_weight, *networks, *settings)
        return loss, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, wanted, psi_count, parameters = inputs[:4], inputs[6], inputs[9], inputs[10:]
        ctx.wanted = _each(wanted, parameters[:psi_count], parameters[psi_count:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # no zeros as large as what is kept
        ctx.save_for_backward(*output[1:], *tensors, *parameters)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> Any:
        count, saved = len(ctx.wanted), ctx.saved_tensors  # which are unpacked at every look
        grads, inputs = saved[:count], saved[count:]
        scaled = _fused_loss.scaled("representation_loss", grad_loss, grads, inputs)
        wanted = [g if want else None for g, want in zip(scaled, ctx.wanted, strict=True)]
        return *wanted[:2], *[None] * 8, *wanted[2:]
