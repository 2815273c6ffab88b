"""Checks of hyper-parameters and of what an agent is given, with messages that name the culprit."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, get_args

import torch
from torch import Tensor


def check_choice(name: str, value: object, choices: Any) -> None:
    """One of the strings of a ``Literal``."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {list(get_args(choices))}, got {value!r}")


def check_integer(name: str, value: object, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")


def check_real(
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value}")
    if not (number > above and at_least <= number <= at_most):
        wanted = [f"above {above:g}"] if above > -math.inf else []
        wanted += [f"at least {at_least:g}"] if at_least > -math.inf else []
        wanted += [f"at most {at_most:g}"] if at_most < math.inf else []
        raise ValueError(f"{name} must be {' and '.join(wanted)}, got {value}")


def check_rows(name: str, value: object, columns: int, device: torch.device) -> None:
    """A float32 tensor ``[B, columns]`` on this type of device."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        came = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"{name} must be a torch.float32 tensor, got {came}")
    if value.ndim != 2 or value.shape[1] != columns:
        raise ValueError(f"{name} must have shape [B, {columns}], got {list(value.shape)}")
    if value.device.type != device.type:
        raise ValueError(f"{name} must be on {device.type!r}, got {value.device.type!r}")
