"""What torch.compile is told and what it made, without importing it."""

from __future__ import annotations

import sys
from typing import TypeVar

import torch
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.optim.swa_utils import AveragedModel

M = TypeVar("M", bound=torch.nn.Module)


#: Hooks that every module's call meets, as ``register_module_forward_hook`` makes them.
GLOBAL_HOOKS = (
    _global_forward_hooks,
    _global_forward_pre_hooks,
    _global_backward_hooks,
    _global_backward_pre_hooks,
)


def has_global_hooks() -> bool:
    """Whether a call of any module does more than its ``forward``."""
    return any(not _only_watches(hook) for hooks in GLOBAL_HOOKS for hook in hooks.values())


def _only_watches(hook: object) -> bool:
    """Whether it is one of those by which torch's FlopCounterMode knows which module is running."""
    owner = getattr(hook, "__self__", None)
    return type(owner).__module__ == "torch.utils.module_tracker"


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of this module does more than that of any other."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def own_module(network: object, kind: type[M]) -> M | None:
    """The module of this kind that ``network`` is or wraps as the same function; else None.

    What ``torch.compile`` made of a module and its ``AveragedModel`` are still the function of
    weights that the kernels compute. With hooks of its own, though, such a wrapper does more than
    that, and is a callable like any other.
    """
    if isinstance(network, kind):
        return network
    wrapped = _same_function(network)
    return None if wrapped is None else own_module(wrapped, kind)


def _same_function(network: object) -> object:
    """What a wrapper that computes the same wraps, or None."""
    if isinstance(network, AveragedModel):
        own = type(network).forward is AveragedModel.forward and "forward" not in network.__dict__
        return network.module if own and not has_hooks(network) else None
    if torch.compiler.is_compiling():  # which sees through its own wrapper by itself
        return None
    compiled = getattr(sys.modules.get("torch._dynamo"), "OptimizedModule", None)
    if compiled is None:  # nothing has been compiled
        return None
    if not isinstance(network, compiled) or has_hooks(network):
        return None
    return network._orig_mod


def not_own(network: object, kind: type[torch.nn.Module]) -> str:
    """What is to be said of a network in which :func:`own_module` finds none of this kind."""
    if (wrapper := _wrapper(network, kind)) is not None:
        return f"is wrapped in {wrapper}: pass its .module to run it without what that adds"
    return f"isn't a diffcore.nn.{kind.__name__}"


def require_own(name: str, network: object, kind: type[M]) -> M:
    """:func:`own_module` of an argument that takes nothing else."""
    module = own_module(network, kind)
    if module is None:
        wrapper, found = _wrapper(network, kind), type(network).__name__
        if wrapper is not None:
            found = f"one wrapped in {wrapper}: pass its .module"
        raise TypeError(f"{name}: expected a diffcore.nn.{kind.__name__}, got {found}")
    return module


def _wrapper(network: object, kind: type[torch.nn.Module]) -> str | None:
    """What wraps a module of this kind and does more than it: DistributedDataParallel, for instance.

    It isn't looked through: what it adds, such as averaging gradients over processes, would be lost.
    """
    if isinstance(network, torch.nn.Module) and isinstance(getattr(network, "module", None), kind):
        return type(network).__name__
    return None
