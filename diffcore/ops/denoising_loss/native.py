"""The denoising loss on the kernels, which computes the gradients together with the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore.ops import _fused_loss, _native
from diffcore.ops._flops import Shape, flops, mlps, mlps_backward


@_native.op("denoising_loss")
def loss_and_gradients(
    state: Tensor,
    action: Tensor,
    noise: Tensor,
    weight: Tensor | None,
    t: Tensor,
    levels: Tensor,
    embedding: Tensor,
    activation: str,
    reduction: str,
    wanted: list[bool],
    parameters: list[Tensor],
    precision: str,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    """(loss, its gradients with respect to [state, action, *parameters]).

    `reduction` "none": every row's loss ``[B]``, and the gradients of their sum. `wanted`: which
    gradients to compute; the others come back without rows. Parameter gradients are computed all or
    none.
    """
    state, action, noise = state.contiguous(), action.contiguous(), noise.contiguous()
    weight = None if weight is None else weight.contiguous()
    t = t.to(torch.int64).contiguous()
    parameters = [p.contiguous() for p in parameters]
    batch = action.shape[0]
    per_row = reduction == "none"
    # A number: the mean of an empty batch, where there is nothing to compute.
    loss = action.new_empty(batch) if per_row else action.new_full((), float("nan"))
    make = torch.empty_like if batch else torch.zeros_like
    all_wanted = wanted[:2] + [any(wanted[2:])] * len(parameters)
    tensors = [state, action, *parameters]
    grads = [
        make(x) if want else x.new_empty(0, *x.shape[1:])
        for x, want in zip(tensors, all_wanted, strict=True)
    ]
    if batch and backend == "triton":
        from diffcore.ops.denoising_loss import triton

        arguments = (state, action, noise, weight, t, levels, embedding, activation, per_row)
        loss = triton.loss_and_gradients(*arguments, grads, wanted, parameters, precision)
    elif batch:
        core = _native._core
        least, most = (int(level) for level in t.aminmax())
        if least < 0 or most >= len(levels):
            raise ValueError(f"t: expected levels in 0..{len(levels) - 1}, got {least}..{most}")
        core.denoising_loss(
            parameters,
            getattr(core.Activation, activation),
            getattr(core.Precision, precision),
            batch,
            state.shape[1],
            action.shape[1],
            per_row,
            _native.address(weight),
            *[x.data_ptr() for x in (state, action, noise, t, levels, embedding, loss)],
            grads[0].data_ptr() if wanted[0] else 0,
            grads[1].data_ptr() if wanted[1] else 0,
            [g.data_ptr() for g in grads[2:]] if any(wanted[2:]) else [],
            torch.get_num_threads(),
        )
    return loss, grads


@_native.fake("denoising_loss")
def _(
    state: Tensor, action: Tensor, reduction: str, wanted: list[bool], parameters: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    all_wanted = wanted[:2] + [any(wanted[2:])] * len(parameters)
    grads = _fused_loss.fake_gradients([state, action, *parameters], all_wanted)
    return action.new_empty(action.shape[:1] if reduction == "none" else ()), grads


@flops("denoising_loss")
def _(state: Shape, wanted: list[bool], parameters: list[Shape]) -> int:
    time_mlp, trunk = parameters[:4], parameters[4:]
    wants_parameters = any(wanted[2:])
    return (
        mlps(state[0], parameters)
        + mlps_backward(state[0], time_mlp, 2, False, wants_parameters)
        + mlps_backward(state[0], trunk, len(trunk) // 2, any(wanted), wants_parameters)
    )


# Every element has a loss of its own.
_native.vmap("denoising_loss")(_native.one_by_one(loss_and_gradients))


@_native.op("normals")
def normals(seed: Tensor, like: Tensor, backend: str) -> Tensor:
    """Standard normals of the shape ``[rows, columns]`` of `like`: step 0 of the seed's noise."""
    z = torch.empty_like(like, memory_format=torch.contiguous_format)
    if backend == "triton":
        from diffcore.ops.denoising_loss import triton

        if z.numel():
            triton.normals(seed, z)
    else:
        _native._core.normals(int(seed), 0, 0, *like.shape, z.data_ptr())
    return z


_native.vmap("normals")(_native.one_by_one(normals))


@_native.fake("normals")
def _(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


class DenoisingLoss(torch.autograd.Function):
    """The op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        state: Tensor,
        action: Tensor,
        noise: Tensor,
        weight: Tensor | None,
        t: Tensor,
        levels: Tensor,
        embedding: Tensor,
        activation: str,
        wanted: list[bool],
        precision: str,
        backend: str,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        tables = (t, levels, embedding, activation, "mean", wanted)
        loss, grads = loss_and_gradients(
            state, action, noise, weight, *tables, list(parameters), precision, backend
        )
        return loss, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        state, action, noise, weight, *_, wanted, _precision, _backend = inputs[:11]
        ctx.wanted, ctx.count = wanted, len(output) - 1
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # no zeros as large as what is kept
        ctx.save_for_backward(*output[1:], state, action, noise, weight, *inputs[11:])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> Any:
        saved = ctx.saved_tensors  # unpacked at every look
        grads, inputs = saved[: ctx.count], saved[ctx.count :]
        scaled = _fused_loss.scaled("denoising_loss", grad_loss, grads, inputs)
        wanted = [g if want else None for g, want in zip(scaled, ctx.wanted, strict=True)]
        return *wanted[:2], *[None] * 9, *wanted[2:]


class LossesOfRows(torch.autograd.Function):
    """The op with a loss for every row, and its gradient.

    What a row counts in the parameters' gradients is known in the backward pass alone. There it
    becomes the row's weight, in a call that goes forward once more.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        state: Tensor,
        action: Tensor,
        noise: Tensor,
        weight: Tensor | None,
        t: Tensor,
        levels: Tensor,
        embedding: Tensor,
        activation: str,
        wanted: list[bool],
        precision: str,
        backend: str,
        *parameters: Tensor,
    ) -> Tensor:
        settings = (activation, "none", [False] * len(wanted), list(parameters), precision, backend)
        losses, _ = loss_and_gradients(
            state, action, noise, weight, t, levels, embedding, *settings
        )
        return losses

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.settings = inputs[7:11]
        ctx.save_for_backward(*inputs[:7], *inputs[11:])

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> Any:
        activation, wants, *settings = ctx.settings

        def gradients(grad_losses: Tensor, *saved: Any) -> list[Tensor]:
            state, action, noise, weight, t, levels, embedding, *parameters = saved
            weight = grad_losses if weight is None else grad_losses * weight
            rows = (state, action, noise, weight, t, levels, embedding)
            return loss_and_gradients(*rows, activation, "none", wants, parameters, *settings)[1]

        grads = _native.gradients("denoising_loss", gradients, grad_losses, *ctx.saved_tensors)
        wanted = [g if want else None for g, want in zip(grads, wants, strict=True)]
        return *wanted[:2], *[None] * 9, *wanted[2:]
