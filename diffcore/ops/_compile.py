"""What torch.compile is told, without importing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def constant_under_compile(function: Callable[P, R]) -> Callable[P, R]:
    """Marks a function whose result torch.compile may take for a constant.

    The same as ``torch.compiler.assume_constant_result``, which imports the whole compiler to set one
    attribute: a second, in every process that never compiles.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
