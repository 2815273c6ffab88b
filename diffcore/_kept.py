"""Tensors that follow from hashable settings alone: computed once and kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
R = TypeVar("R")


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
    return cached
