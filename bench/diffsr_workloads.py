"""What is compared for Diff-SR: its two ops, and a whole update."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from workloads import (
    ALL_RIVALS,
    BASELINE,
    COMPILED,
    JAX,
    OURS,
    OURS_BF16,
    OURS_NEW_WEIGHTS,
    SEED,
    SIZES,
    Case,
    Error,
    Rivals,
    Variant,
    change_weights,
    flat,
)

from diffcore import ops

FEATURES, RANDOM_FEATURES, ZETA_HIDDEN = 256, 1024, 512

Result = Sequence[Tensor]
"""What an op returns, then its gradients."""


def in_scale(result: Result, scales: Sequence[float]) -> Tensor:
    """The result as one vector, each tensor divided by its scale: errors become relative."""
    return flat(r / scale for r, scale in zip(result, scales, strict=True))


def scales_of(result: Result) -> list[float]:
    """Each tensor's root mean square."""
    return [r.detach().square().mean().sqrt().item() for r in result]


def forward_and_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> Result:
    """The function's value and its gradients at all inputs."""
    y = function(*inputs)
    return y, *torch.autograd.grad(y, inputs, grad.to(y.dtype))


def rff_features_case(batch: int, *, rivals: Rivals = ALL_RIVALS) -> Case:
    """Random Fourier features, gradients of input, frequencies and phases included."""
    torch.manual_seed(SEED)
    x = torch.randn(batch, FEATURES)
    layer = nn.Linear(FEATURES, RANDOM_FEATURES)
    retrained = copy.deepcopy(layer)
    inputs = [x.requires_grad_(), layer.weight, layer.bias]
    grad = torch.randn(batch, RANDOM_FEATURES)

    def as_written(x: Tensor, omega: Tensor, bias: Tensor) -> Tensor:
        return torch.sin(linear(x, omega, bias))

    def run(function: Callable[..., Tensor], layer: nn.Linear = layer) -> Result:
        return forward_and_backward(function, [x, layer.weight, layer.bias], grad)

    scales = scales_of(run(as_written))

    def variant(name: str, function: Callable[..., Tensor]) -> Variant:
        return Variant(name, lambda: run(function), lambda: in_scale(run(function), scales))

    jax = rivals.jax_baselines()
    in_jax = jax and jax.ForwardAndBackward(jax.rff_features, inputs, grad)
    variants = [
        variant(BASELINE, as_written),
        variant(COMPILED, torch.compile(as_written, dynamic=False)),
        jax and Variant(JAX, in_jax, lambda: in_scale(in_jax.on(), scales), before=jax.rest),
        variant(OURS, ops.rff_features),
        Variant(
            OURS_NEW_WEIGHTS,
            lambda: run(ops.rff_features, retrained),
            lambda: in_scale(run(ops.rff_features, retrained), scales),
            before=lambda: change_weights(retrained),
        ),
    ]

    def exact() -> Tensor:
        double = [i.detach().double().requires_grad_() for i in inputs]
        return in_scale(forward_and_backward(as_written, double, grad), scales)

    return Case(
        "rff_features",
        FEATURES,
        batch,
        1,
        rivals.admit(variants),
        exact,
        flops=2.0 * 3 * batch * FEATURES * RANDOM_FEATURES,
    )


def score_matching_loss_as_written(
    psi: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, offset: Tensor, score_weight: Tensor
) -> Tensor:
    """As Diff-SR's released code has it: zeta as a tensor ``[B, features, state]``, and bmm."""
    batch, features = psi.shape
    zeta = linear(hidden, weight, bias).reshape(batch, features, offset.shape[1])
    score = torch.bmm(psi.unsqueeze(1), zeta).squeeze(1)
    difference = offset + score_weight[:, None] * score
    return (1 / batch) * torch.sum(difference**2, dim=1).sum()


def score_matching_loss_case(env: str, batch: int, *, rivals: Rivals = ALL_RIVALS) -> Case:
    """Diff-SR's loss from psi and zeta's last hidden layer on, with all gradients."""
    torch.manual_seed(SEED)
    state_dim, _ = SIZES[env]
    psi, hidden = torch.randn(batch, FEATURES), torch.randn(batch, ZETA_HIDDEN)
    last = nn.Linear(ZETA_HIDDEN, FEATURES * state_dim)
    inputs = [psi.requires_grad_(), hidden.requires_grad_(), last.weight, last.bias]
    # As in the released code: alpha-bar between 0.391 and 0.967, noise of 0.449.
    level = 0.391 + 0.576 * torch.rand(batch)
    offset = -(1 - level).sqrt()[:, None] * 0.449 * torch.randn(batch, state_dim)
    score_weight = -(1 - level) * 0.449

    def run(loss: Callable[..., Tensor], **options: torch.dtype) -> Result:
        def of_inputs(*inputs: Tensor) -> Tensor:
            dtype = inputs[0].dtype
            return loss(*inputs, offset.to(dtype), score_weight.to(dtype), **options)

        return forward_and_backward(of_inputs, inputs, torch.ones(()))

    scales = scales_of(run(score_matching_loss_as_written))

    def variant(name: str, loss: Callable[..., Tensor], **options: torch.dtype) -> Variant:
        return Variant(
            name, lambda: run(loss, **options), lambda: in_scale(run(loss, **options), scales)
        )

    jax = rivals.jax_baselines()
    in_jax = jax and jax.ForwardAndBackward(
        jax.score_matching_loss, inputs, torch.ones(()), offset, score_weight
    )
    variants = [
        variant(BASELINE, score_matching_loss_as_written),
        variant(COMPILED, torch.compile(score_matching_loss_as_written, dynamic=False)),
        jax and Variant(JAX, in_jax, lambda: in_scale(in_jax.on(), scales), before=jax.rest),
        variant(OURS, ops.score_matching_loss),
        variant(OURS_BF16, ops.score_matching_loss, compute_dtype=torch.bfloat16),
    ]

    def exact() -> Tensor:
        double = [i.detach().double().requires_grad_() for i in inputs]

        def loss(*inputs: Tensor) -> Tensor:
            return score_matching_loss_as_written(*inputs, offset.double(), score_weight.double())

        return in_scale(forward_and_backward(loss, double, torch.ones(())), scales)

    # The products with the last layer's weight, forward and twice backward, and those with psi.
    products = FEATURES * state_dim * (3 * ZETA_HIDDEN + 3)
    return Case(
        "score_matching_loss",
        state_dim,
        batch,
        1,
        rivals.admit(variants),
        exact,
        bfloat16_bound=Error(1e-2, 1.0),
        flops=2.0 * batch * products,
    )
