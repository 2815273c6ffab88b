"""Adam by one kernel: torch's, or that of an op which takes the step itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, final

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


_torch_step = torch.optim.Optimizer.profile_hook_step(inspect.unwrap(torch.optim.Adam.step))


def _without_hook(step: Any) -> Any:
    """What torch wrapped when it made the first optimiser of a class, to serve its hooks."""
    hooked = getattr(step, "__code__", None) is _torch_step.__code__
    return step.__wrapped__ if hooked else step


_STEPS_OF_ADAM = [_without_hook(vars(kind)["step"]) for kind in (torch.optim.Adam, FusedAdam)]


def _steps_as_adam(optimizer: torch.optim.Adam) -> bool:
    """Whether its step is torch's own, unchanged by a subclass or a patch but a scheduler's."""
    if type(optimizer) not in (torch.optim.Adam, FusedAdam):
        return False
    step = vars(optimizer).get("step")
    if step is None:
        step = vars(type(optimizer))["step"]
    elif hasattr(step, "_wrapped_by_lr_sched"):
        step = step.__wrapped__
    else:
        return False
    return _without_hook(step) in _STEPS_OF_ADAM


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


def counted(states: list[dict[str, Any]], steps: int = 1) -> list[Tensor]:
    """Every parameter's number of steps, so many more than before.

    On the CPU, where torch would add to one after the other, the counts are elements of one tensor,
    as they stay unless a checkpoint is loaded.
    """
    counts = [state["step"] for state in states]
    if not counts[0].is_cpu:
        torch._foreach_add_(counts, steps)
        return counts
    together = counts[0]._base
    if together is None or together.shape != (len(counts),) or any(
        count._base is not together for count in counts
    ):
        together = torch.stack(counts)
        counts = list(together.unbind())
        for state, count in zip(states, counts, strict=True):
            state["step"] = count
    together.add_(steps)
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


class KernelSteps:
    """Steps of parameters for which :func:`not_by_kernel` has no reason, as a kernel takes them."""

    def __init__(self, optimizer: torch.optim.Adam, parameters: Sequence[Tensor]) -> None:
        (group,) = optimizer.param_groups
        for parameter in parameters:
            state = optimizer.state[parameter]
            if not state:  # as torch begins it
                wide = torch.get_default_dtype() is torch.float64 and not group["fused"]
                state["step"] = torch.zeros((), dtype=torch.float64 if wide else torch.float32)
                for name in _MOMENTS:
                    state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        self.optimizer, self.parameters = optimizer, parameters
        self.states = [optimizer.state[parameter] for parameter in parameters]
        self.exp_avgs = [state["exp_avg"] for state in self.states]
        self.exp_avg_sqs = [state["exp_avg_sq"] for state in self.states]
        #: How many there were of every parameter.
        self.counts: list[float] = torch.stack([state["step"] for state in self.states]).tolist()
        self.settings: tuple[float, ...] = (group["lr"], *group["betas"], group["eps"])

    def take(self, kernel: Callable[[], None], steps: int) -> None:
        """Calls `kernel`, which takes so many: they are counted if that ends well."""
        try:
            kernel()
        finally:  # some may have been stepped before memory ran out
            changed = [*self.parameters, *self.exp_avgs, *self.exp_avg_sqs]
            torch.autograd.graph.increment_version(changed)
        counted(self.states, steps)
        if "step" in vars(self.optimizer):
            self.optimizer._opt_called = True  # type: ignore[attr-defined]  # a scheduler asks


def not_by_kernel(
    optimizer: torch.optim.Adam, parameters: Sequence[Tensor], inputs: dict[str, Tensor]
) -> str | None:
    """Why a kernel on the CPU can't take the optimiser's step on these parameters, or None.

    `inputs`, by the names of arguments, are what it reads while it steps.
    """
    if not _steps_as_adam(optimizer):
        return "the optimizer's step isn't torch.optim.Adam's"
    if _is_watched(optimizer):
        return "a hook or the profiler waits for the optimizer's steps"
    if torch.is_anomaly_enabled():
        return "anomalies in gradients are to be detected"
    if _is_scaled(optimizer):
        return "a GradScaler scales the optimizer's gradients"
    if len(optimizer.param_groups) != 1:
        return "the optimizer has several groups of parameters"
    (group,) = optimizer.param_groups
    for name in _OPTIONS:
        if group.get(name):
            return f"the optimizer has {name}, which the kernel doesn't"
    numbers = (group["lr"], *group["betas"], group["eps"])
    if not all(type(number) in (float, int) for number in numbers):
        return "the optimizer's lr, betas or eps are no numbers"
    if group["betas"][0] <= 0.5:  # torch then rounds another way
        return "the optimizer's first beta isn't above 0.5"
    if sorted(map(id, parameters)) != sorted(map(id, group["params"])):
        return "the optimizer doesn't hold exactly the networks' parameters"
    for parameter in parameters:
        if not parameter.requires_grad:
            return "a parameter doesn't require a gradient"
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return "a hook waits for a parameter's gradient"
    if not _native.are_float32_on_cpu([*parameters], True):
        return "a parameter isn't contiguous float32 on the CPU"
    begun = [parameter for parameter in parameters if optimizer.state.get(parameter)]
    changed = [*parameters]
    for name in _MOMENTS:
        moments = [optimizer.state[parameter][name] for parameter in begun]
        if not (
            _native.are_float32_on_cpu(moments, True) and _native.same_sizes(begun, moments)
        ):
            return "a moment isn't its parameter's like in contiguous float32 on the CPU"
        changed += moments
    shared = _native.sharing([*inputs.values()], changed)
    if shared is None:
        return None
    if shared == len(inputs):
        return "parameters or moments share memory"
    return f"{[*inputs][shared]} shares memory with a parameter or a moment, which the step changes"
