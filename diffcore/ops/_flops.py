"""How many floating-point operations the ops stand for, for ``torch.utils.flop_counter``.

As many as the reference's matrix products, which is all that torch counts there; what a kernel spares
of them or does again is its own affair. Formulas name the arguments of the op that they take, and get
shapes for tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from diffcore.ops._rules import by_name

Shape: TypeAlias = Sequence[int]

_FORMULAS: dict[str, Callable[..., int]] = {}


def flops(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Names the formula of the op ``torch.ops.diffcore.<name>``."""

    def keep(formula: Callable[..., int]) -> Callable[..., int]:
        _FORMULAS[name] = by_name(name, formula)
        return formula

    return keep


def teach_counters() -> None:
    """Gives the formulas to torch's counter, if anybody has imported it, and to those that count now.

    For an op's call that meets a mode. To import the counter together with diffcore would cost time
    that few get anything for; and one that was made before has a copy of what is registered.
    """
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None or not hasattr(counting, "FlopCounterMode"):  # it is just being imported
        return
    formulas = {getattr(torch.ops.diffcore, name): f for name, f in _FORMULAS.items()}
    for packet, formula in formulas.items():
        if packet not in counting.flop_registry:
            counting.register_flop_formula(packet)(formula)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", mode)
        if isinstance(counter, counting.FlopCounterMode):
            for packet in formulas:
                counter.flop_registry.setdefault(packet, counting.flop_registry[packet])


def products(rows: int, weights: Sequence[Shape]) -> int:
    """Of so many rows with each of these weights ``[out, in]``."""
    return sum(2 * rows * weight[0] * weight[1] for weight in weights)


def mlps(rows: int, parameters: Sequence[Shape]) -> int:
    """Of networks' way forward; `parameters`: [weight, bias, weight, bias, ...]."""
    return products(rows, parameters[::2])


def mlps_backward(
    rows: int, parameters: Sequence[Shape], layers: int, wants_x: bool, wants_parameters: bool
) -> int:
    """Of the way back through networks of so many layers."""
    weights = parameters[::2]
    count = products(rows, weights) if wants_parameters else 0
    if wants_x:
        return count + products(rows, weights)
    if wants_parameters:
        count += products(rows, [w for i, w in enumerate(weights) if i % layers])
    return count
