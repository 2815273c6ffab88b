"""Steps of Adam on the loss that trains Diff-SR's representation, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcore import nn  # which imports ops: its modules are there when an op is called
from diffcore.ops import _adam, _backends, _dispatch, _native
from diffcore.ops._checks import check_tensor, out_of_autocast
from diffcore.ops._compile import require_own
from diffcore.ops.representation_loss import support as loss_support
from diffcore.ops.representation_step import native, reference

KERNELS = ("cpu",)
_INPUTS = ("x", "perturbed", "offset", "score_weight")


def representation_step(
    psi: nn.MLP,
    zeta: nn.MLP,
    x: Tensor,
    perturbed: Tensor,
    offset: Tensor,
    score_weight: Tensor,
    optimizer: torch.optim.Adam,
    *,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of Adam (Kingma & Ba 2015) on :func:`diffcore.ops.representation_loss`, or several.

    The kernel steps zeta's last weight, by far the largest, piece by piece where the pieces of its
    gradient are made: that gradient, as large as the weight, never exists. Parameters and moments
    come out as of ``torch.optim.Adam(fused=True)``, to rounding, and ``optimizer.state_dict()`` is
    what it would be. None of the optimiser's parameters has a ``grad`` afterwards.

    The reference is :func:`~diffcore.ops.representation_loss` on the fastest backend, ``backward()``
    and ``optimizer.step()``. It is for everything but the plain case: hooks, weight decay, amsgrad
    and other options, parameters that are frozen, of other networks or not all of these, inputs in
    the memory of what is stepped; :func:`diffcore.explain` says which. Hooks on nodes of autograd's
    graph, which neither sees, are called by the reference alone. As with any optimiser step,
    ``torch.func`` transforms are not supported.

    Args:
        psi, zeta, x, perturbed, offset, score_weight, compute_dtype: see
            :func:`diffcore.ops.representation_loss`. Or ``[N, B, ...]``: N minibatches, one step on
            each in order. These may not require a gradient: what they were computed from could change
            with the first step. In the memory of a parameter each is read when its turn comes.
        optimizer: steps the parameters that it holds: the networks', for the kernel.
        backend: "cpu" or "reference"; the fastest that can run the call if None.

    Returns:
        The loss before the step and the norm of its gradient, over all parameters together, both
        0-d, or ``[N]``, and without a gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, gradients that
            are off, or a forced backend that can't run this call.
    """
    psi, zeta = require_own("psi", psi, nn.MLP), require_own("zeta", zeta, nn.MLP)
    x, perturbed, offset, score_weight = out_of_autocast(psi, x, perturbed, offset, score_weight)
    arguments = (psi, zeta, x, perturbed, offset, score_weight, optimizer)
    available = support(*arguments, compute_dtype)
    if _dispatch.choose("representation_step", available, backend) == "reference":
        return reference.representation_step(*arguments, compute_dtype)
    return native.step(
        x,
        perturbed,
        offset,
        score_weight,
        psi.weights_and_biases(),
        zeta.weights_and_biases(),
        ",".join(psi.activations),
        ",".join(zeta.activations[:-1]),
        optimizer,
        _backends.precision(compute_dtype, x),
    )


def support(
    psi: nn.MLP,
    zeta: nn.MLP,
    x: Tensor,
    perturbed: Tensor,
    offset: Tensor,
    score_weight: Tensor,
    optimizer: torch.optim.Adam,
    compute_dtype: torch.dtype | None,
) -> _dispatch.Support:
    """Checks the arguments and says which backends can take them."""
    if not isinstance(optimizer, torch.optim.Adam):
        raise TypeError(
            f"optimizer: expected a torch.optim.Adam, got {type(optimizer).__name__}"
        )
    if not torch.is_grad_enabled():
        raise ValueError("representation_step: expected gradients to be on, got them off (no_grad)")
    inputs = [x, perturbed, offset, score_weight]
    minibatch = _first_minibatch(*inputs) if isinstance(x, Tensor) and x.ndim == 3 else inputs
    of_loss = loss_support(psi, zeta, *minibatch, compute_dtype=compute_dtype)
    backends = [name for name in of_loss.backends if name in (*KERNELS, "reference")]
    available = _dispatch.Support(backends, of_loss.why_not)

    def refused() -> str | None:
        parameters = [*psi.weights_and_biases(), *zeta.weights_and_biases()]
        named = dict(zip(_INPUTS, inputs, strict=True))
        return _refused(inputs, parameters) or _adam.not_by_kernel(optimizer, parameters, named)

    available.restrict("cpu", refused)
    return available


def _first_minibatch(
    x: Tensor, perturbed: Tensor, offset: Tensor, score_weight: Tensor
) -> list[Tensor]:
    """What each is to be like; several are stepped on."""
    sizes = x.shape[:2]
    check_tensor("x", x, ("N", "B", "in"))
    check_tensor("perturbed", perturbed, (*sizes, "in"))
    check_tensor("offset", offset, (*sizes, "S"))
    check_tensor("score_weight", score_weight, sizes)
    if not sizes[0]:
        raise ValueError(f"x: expected a minibatch at least, got shape {list(x.shape)}")
    tensors = (x, perturbed, offset, score_weight)
    for name, tensor in zip(_INPUTS, tensors, strict=True):
        if _native.requires_gradient(tensor):
            raise ValueError(
                f"{name}: expected no gradient through several minibatches, it requires one"
            )
    return [tensor[0] for tensor in tensors]


def _refused(inputs: list[Tensor], parameters: list[Tensor]) -> str | None:
    """Why the kernel can't take these, or None."""
    if torch.compiler.is_compiling() or _native._dispatching((inputs, parameters)):
        return "a compiler, a mode or a transform follows what is called"
    if any(tensor.requires_grad for tensor in inputs):
        return "an input requires a gradient, which may lead back to a parameter"
    if not inputs[-1].numel():
        return "the batch is empty"
    return None
