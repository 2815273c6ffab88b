"""What torch.compile is told and what it made, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=torch.nn.Module)


def constant_under_compile(function: Callable[P, R]) -> Callable[P, R]:
    """Marks a function whose result torch.compile may take for a constant.

    The same as ``torch.compiler.assume_constant_result``, which imports the whole compiler to set one
    attribute: a second, in every process that never compiles.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


#: Hooks that every module's call meets, as ``register_module_forward_hook`` makes them.
GLOBAL_HOOKS = (
    _global_forward_hooks,
    _global_forward_pre_hooks,
    _global_backward_hooks,
    _global_backward_pre_hooks,
)


def has_global_hooks() -> bool:
    """Whether a call of any module does more than its ``forward``."""
    return bool(
        _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    )


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of this module does more than that of any other."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def own_module(network: object, kind: type[M]) -> M | None:
    """The module of this kind that ``network`` is, or that ``torch.compile`` made it of; else None.

    Compiled, a module is still the function of its weights that the kernels compute. With hooks of
    its own, though, the compiler's wrapper does more than that, and is a callable like any other.
    """
    if isinstance(network, kind):
        return network
    if torch.compiler.is_compiling():  # which sees through the wrapper by itself
        return None
    wrapper = getattr(sys.modules.get("torch._dynamo"), "OptimizedModule", None)
    if wrapper is None:  # nothing has been compiled
        return None
    if not isinstance(network, wrapper) or has_hooks(network):
        return None
    original = network._orig_mod
    return original if isinstance(original, kind) else None
