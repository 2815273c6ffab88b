"""Optimiser steps shared by the agents, without host synchronisation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffcore.ops import _native
from diffcore.ops._adam import FusedAdam


@contextmanager
def learning() -> Iterator[None]:
    """What is computed in this block can be differentiated, and what is made in it be trained.

    Whether or not torch.no_grad() or torch.inference_mode() is on around it.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield


def make_adam(parameters: Iterable[nn.Parameter], *, lr: float, eps: float) -> torch.optim.Adam:
    """Adam, as one fused kernel where torch has one for the parameters' device."""
    parameters = list(parameters)
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return FusedAdam(parameters, lr=lr, eps=eps, fused=fused)


def load_moments(optimizer: torch.optim.Adam, state: dict[str, Any]) -> None:
    """Copy in moments and step counts of a ``state_dict``, but keep the own hyper-parameters."""
    optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})
    # torch takes the tensors themselves, which another optimiser may go on stepping.
    for moments in optimizer.state.values():
        moments.update({name: value.clone() for name, value in moments.items()})


def gradient_step(loss: Tensor, optimizer: torch.optim.Adam) -> None:
    """Minimise ``loss`` by one step of ``optimizer``, whose parameters alone get gradients.

    Gradients are gone afterwards: the next loss, whose op may compute its gradients together with it,
    needs their memory.
    """
    parameters = _differentiate(loss, optimizer)
    optimizer.step()
    _forget_gradients(parameters)


def measured_step(
    loss: Tensor, optimizer: torch.optim.Adam, max_norm: float = 0.0
) -> Tensor:
    """:func:`gradient_step` with the gradient's norm cut to ``max_norm``.

    The norm is taken over all parameters together; ``max_norm <= 0`` leaves it uncut. Returns the
    norm before the cut, as a 0-d tensor.
    """
    parameters = _differentiate(loss, optimizer)
    grad_norm = cut_norm_([p.grad for p in parameters if p.grad is not None], max_norm)
    optimizer.step()
    _forget_gradients(parameters)
    return grad_norm


def _differentiate(loss: Tensor, optimizer: torch.optim.Adam) -> list[nn.Parameter]:
    if not loss.requires_grad:
        raise ValueError(
            "loss: expected one that can be differentiated in a parameter, got one that can't "
            "(from under torch.no_grad(), for instance)"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    _forget_gradients(parameters)
    _backward(loss, parameters)
    return parameters


def _forget_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


# torch's own functions put layers of Python around the same kernels, for gradients on several devices
# and much else. On small networks these take longer than the kernels.


def _backward(loss: Tensor, parameters: list[nn.Parameter]) -> None:
    """``loss.backward(inputs=parameters)`` of a loss with one element."""
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,),
        (torch.ones_like(loss),),
        False,  # keep_graph
        False,  # create_graph
        tuple(parameters),
        allow_unreachable=True,
        accumulate_grad=True,
    )


@torch.no_grad()
def cut_norm_(gradients: list[Tensor], max_norm: float) -> Tensor:
    """``nn.utils.clip_grad_norm_`` of gradients on one device; ``max_norm <= 0`` leaves them."""
    if not gradients:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    if max_norm <= 0 and _native.are_float32_on_cpu(gradients, True):  # which only needs reporting
        return torch.tensor(_native._core.norm(gradients), dtype=torch.float32, device="cpu")
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


@torch.no_grad()
def ema_update_(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move every parameter of ``target`` by ``tau`` of the way to ``source``'s, in place."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """What is computed in this block has no gradient in these parameters.

    Kernels then don't compute what nobody would read. Everything else differentiates as usual, the
    inputs of the parameters' modules too.
    """
    thawed = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in thawed:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad = True
