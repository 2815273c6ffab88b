"""The score matching loss on the kernels, which computes the gradients together with the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore.ops import _fused_loss, _native
from diffcore.ops._flops import Shape, flops, products


def run(
    psi: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    offset: Tensor,
    score_weight: Tensor,
    precision: str,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, its gradients with respect to psi, hidden, weight and bias).

    `wanted`: which of the four gradients to compute; the others come back without rows.
    """
    sources = [t.contiguous() for t in (psi, hidden, weight, bias)]
    others = [t.contiguous() for t in (offset, score_weight)]
    loss = psi.new_full((), float("nan"))  # the mean of an empty batch
    make = torch.empty_like if len(psi) else torch.zeros_like
    grads = [
        make(t) if want else t.new_empty(0, *t.shape[1:])
        for t, want in zip(sources, wanted, strict=True)
    ]
    if len(psi) and backend == "triton":
        from diffcore.ops.score_matching_loss import triton

        tensors = [*sources, *others, loss, *grads]
        triton.loss_and_gradients(*tensors, wanted=wanted, precision=precision)
    elif len(psi):
        core = _native._core
        core.score_matching_loss(
            len(psi),
            psi.shape[1],
            offset.shape[1],
            hidden.shape[1],
            getattr(core.Precision, precision),
            *[t.data_ptr() for t in (*sources, *others)],
            loss.data_ptr(),
            *[g.data_ptr() if want else 0 for g, want in zip(grads, wanted, strict=True)],
            torch.get_num_threads(),
        )
    return loss, grads[0], grads[1], grads[2], grads[3]


loss_and_gradients = _native.op("score_matching_loss")(run)


@_native.fake("score_matching_loss")
def _(
    psi: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, wanted: list[bool]
) -> tuple[Tensor, ...]:
    grads = _fused_loss.fake_gradients([psi, hidden, weight, bias], wanted)
    return psi.new_empty(()), *grads


def score_flops(rows: int, weight: Shape, columns: int, wanted: list[bool]) -> int:
    """Of a loss of S columns, by the shape of zeta's last weight, with the gradients `wanted`."""
    wants_psi, wants_hidden, wants_weight, wants_bias = wanted
    score, last = products(rows, [(weight[0] // columns, columns)]), products(rows, [weight])
    wants_zeta = wants_hidden or wants_weight or wants_bias
    return (1 + wants_psi + wants_zeta) * score + (1 + wants_hidden + wants_weight) * last


@flops("score_matching_loss")
def _(psi: Shape, weight: Shape, offset: Shape, wanted: list[bool]) -> int:
    return score_flops(psi[0], weight, offset[1], wanted)


# Every element has a loss of its own.
_native.vmap("score_matching_loss")(_native.one_by_one(loss_and_gradients))


class ScoreMatchingLoss(torch.autograd.Function):
    """The op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return loss_and_gradients(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, _precision, ctx.wanted, _backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else every call would fill zeros as large as the weight
        ctx.save_for_backward(*output[1:], *tensors)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> Any:
        saved = ctx.saved_tensors  # which are unpacked at every look
        grads, tensors = saved[:4], saved[4:]
        scaled = _fused_loss.scaled("score_matching_loss", grad_loss, grads, tensors)
        pairs = zip(scaled, ctx.wanted, strict=True)
        return *(g if want else None for g, want in pairs), *[None] * 5
