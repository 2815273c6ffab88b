"""Optimiser steps shared by the agents, without host synchronisation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def make_adam(parameters: Iterable[nn.Parameter], *, lr: float, eps: float) -> torch.optim.Adam:
    """Adam, as one fused kernel where torch has one for the parameters' device."""
    parameters = list(parameters)
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return FusedAdam(parameters, lr=lr, eps=eps, fused=fused)


def load_moments(optimizer: torch.optim.Adam, state: dict[str, Any]) -> None:
    """Take over moments and step counts of a ``state_dict``, but keep the own hyper-parameters."""
    optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})


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
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


@final
class FusedAdam(torch.optim.Adam):
    """``torch.optim.Adam(fused=True)``, to whose kernel :meth:`step` goes directly where it can."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        groups = []
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            groups.append((group, parameters, [self.state[p] for p in parameters]))
        if (
            closure is not None
            or self._is_watched()
            or not all(self._is_plain(group, states) for group, _, states in groups)
        ):
            return _torch_step(self, closure)
        for group, parameters, states in groups:
            beta1, beta2 = group["betas"]
            torch._fused_adam_(
                parameters,
                [p.grad for p in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                _counted(states),
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
        return None

    # The mark by which torch knows a step that it has wrapped: it leaves this one alone.
    step.hooked = True  # type: ignore[attr-defined]

    def _is_watched(self) -> bool:
        """Whether a hook or the profiler waits for steps, whom torch's wrapper serves."""
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()
        )

    def _is_plain(self, group: dict[str, Any], states: list[dict[str, Any]]) -> bool:
        """Whether nothing is asked for but the kernel, and the first step has made the moments."""
        return bool(
            states
            and group["fused"]
            and not (group["amsgrad"] or group["maximize"])
            and not group.get("decoupled_weight_decay")
            and all(states)
            and getattr(self, "grad_scale", None) is None  # a GradScaler's
            and getattr(self, "found_inf", None) is None
        )


_torch_step = torch.optim.Optimizer.profile_hook_step(inspect.unwrap(torch.optim.Adam.step))


def _counted(states: list[dict[str, Any]]) -> list[Tensor]:
    """Every parameter's number of steps, one more than before.

    On the CPU, where torch would add to one after the other, the counts are elements of one tensor,
    as they stay unless a checkpoint is loaded.
    """
    counts = [state["step"] for state in states]
    if not counts[0].is_cpu:
        torch._foreach_add_(counts, 1)
        return counts
    together = counts[0]._base
    if together is None or together.shape != (len(counts),) or any(
        count._base is not together for count in counts
    ):
        together = torch.stack(counts)
        counts = list(together.unbind())
        for state, count in zip(states, counts, strict=True):
            state["step"] = count
    together.add_(1)
    return counts


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
