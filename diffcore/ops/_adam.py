"""Adam by one kernel: torch's, or that of an op which takes the step itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from diffcore.ops import _native


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
            or _is_watched(self)
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
                counted(states),
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

    def _is_plain(self, group: dict[str, Any], states: list[dict[str, Any]]) -> bool:
        """Whether nothing is asked for but the kernel, and the first step has made the moments."""
        return bool(
            states
            and group["fused"]
            and not (group["amsgrad"] or group["maximize"])
            and not group.get("decoupled_weight_decay")
            and all(states)
            and not _is_scaled(self)
        )


_adam_step = inspect.unwrap(torch.optim.Adam.step)
_torch_step = torch.optim.Optimizer.profile_hook_step(_adam_step)
_OF_ADAM = (_adam_step, inspect.unwrap(FusedAdam.step))


def _is_watched(optimizer: torch.optim.Adam) -> bool:
    """Whether a hook or the profiler waits for steps, whom torch's wrapper serves."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or torch.autograd._profiler_enabled()
    )


def _is_scaled(optimizer: torch.optim.Adam) -> bool:
    """Whether a GradScaler has its gradients scaled."""
    return (
        getattr(optimizer, "grad_scale", None) is not None
        or getattr(optimizer, "found_inf", None) is not None
    )


def counted(states: list[dict[str, Any]]) -> list[Tensor]:
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


# What changes the formula of a step, or how torch takes one on a GPU or where it is differentiated.
_OPTIONS = (
    "weight_decay",
    "amsgrad",
    "maximize",
    "capturable",
    "differentiable",
    "decoupled_weight_decay",
)


_MOMENTS = ("exp_avg", "exp_avg_sq")


class KernelStep(NamedTuple):
    """What a kernel needs to step parameters, whose count of steps it is part of already."""

    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[float]
    """How many there were, with this one, of every parameter."""
    settings: tuple[float, float, float, float]
    """lr, both betas and eps."""


def begin_step(optimizer: torch.optim.Adam, parameters: Sequence[Tensor]) -> KernelStep:
    """Count a step of parameters for which :func:`not_by_kernel` has no reason."""
    (group,) = optimizer.param_groups
    for parameter in parameters:
        state = optimizer.state[parameter]
        if not state:  # as torch begins it
            state["step"] = torch.zeros(())
            for name in _MOMENTS:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    states = [optimizer.state[parameter] for parameter in parameters]
    return KernelStep(
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        torch.stack(counted(states)).tolist(),
        (group["lr"], *group["betas"], group["eps"]),
    )


def end_step(parameters: Sequence[Tensor], step: KernelStep) -> None:
    """Tell autograd what the kernel has changed."""
    torch.autograd.graph.increment_version([*parameters, *step.exp_avgs, *step.exp_avg_sqs])


def not_by_kernel(optimizer: torch.optim.Adam, parameters: Sequence[Tensor]) -> str | None:
    """Why a kernel on the CPU can't take the optimiser's step on these parameters, or None."""
    if inspect.unwrap(type(optimizer).step) not in _OF_ADAM or "step" in vars(optimizer):
        return "the optimizer's step isn't torch.optim.Adam's"
    if _is_watched(optimizer):
        return "a hook or the profiler waits for the optimizer's steps"
    if _is_scaled(optimizer):
        return "a GradScaler scales the optimizer's gradients"
    if len(optimizer.param_groups) != 1:
        return "the optimizer has several groups of parameters"
    (group,) = optimizer.param_groups
    for name in _OPTIONS:
        if group.get(name):
            return f"the optimizer has {name}, which the kernel doesn't"
    if not all(isinstance(value, float) for value in (group["lr"], *group["betas"])):
        return "the optimizer's lr or betas are no floats"
    if group["betas"][0] <= 0.5:  # torch then rounds another way
        return "the optimizer's first beta isn't above 0.5"
    if sorted(map(id, parameters)) != sorted(map(id, group["params"])):
        return "the optimizer doesn't hold exactly the networks' parameters"
    for parameter in parameters:
        if not parameter.requires_grad:
            return "a parameter doesn't require a gradient"
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return "a hook waits for a parameter's gradient"
    states = [optimizer.state.get(parameter) or {} for parameter in parameters]
    tensors = [*parameters, *(state[name] for state in states for name in _MOMENTS if state)]
    if not _native.are_float32_on_cpu(tensors, True):
        return "a parameter or a moment isn't contiguous float32 on the CPU"
    return None
