"""Rules about an op, such as what its results look like: each gets the arguments that it names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

R = TypeVar("R")


def by_name(op: str, rule: Callable[..., R]) -> Callable[..., R]:
    """The rule as torch calls it, with all arguments of ``torch.ops.diffcore.<op>`` in order."""
    schema = getattr(torch.ops.diffcore, op).default._schema
    order = [argument.name for argument in schema.arguments]
    places = [order.index(name) for name in inspect.signature(rule).parameters]

    def ask(*args: Any, **_: Any) -> R:
        return rule(*(args[place] for place in places))

    return ask
