"""What follows from hashable settings alone: computed once, and a constant under torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
R = TypeVar("R")


def constant_under_compile(function: Callable[P, R]) -> Callable[P, R]:
    """Marks a function whose result torch.compile may take for a constant.

    Tensors come in a tuple: two that are the results themselves, in one graph, torch.compile takes
    for one and fails. ``torch.compiler.assume_constant_result`` sets the same mark, but imports the
    whole compiler for it: a second, in every process that never compiles.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def kept(function: Callable[P, R]) -> Callable[P, R]:
    """``functools.lru_cache`` for a function that makes tensors, which must say their device.

    Nothing is left in them of the call that comes first: they serve training, though it may have been
    made in inference mode, and are real, though it may have been made among fake ones.
    """

    @functools.wraps(function)
    def build(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), _disable_current_modes():
            return function(*args, **kwargs)

    cached: Callable[P, R] = functools.lru_cache(maxsize=256)(build)  # type: ignore[assignment]

    # A function to mark as `constant_under_compile`: torch.compile doesn't see a cache's mark.
    @functools.wraps(function)
    def ask(*args: P.args, **kwargs: P.kwargs) -> R:
        return cached(*args, **kwargs)

    return ask
