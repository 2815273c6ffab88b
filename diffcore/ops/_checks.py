"""Checks of arguments, with messages that name the argument, what came and what was expected."""

from __future__ import annotations

import functools
import itertools
import numbers
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore.ops import _native


def checked_once(check: Callable[..., None]) -> Callable[..., None]:
    """A check of hashable settings that doesn't look again at those it has found right."""
    cached = functools.lru_cache(typed=True)(check)

    @functools.wraps(check)
    def ask(*settings: Any) -> None:
        if torch.compiler.is_compiling():
            return check(*settings)
        try:
            cached(*settings)
        except TypeError:  # which a list or the like is, too: it can't be looked up
            check(*settings)

    return ask


# Numbers of other libraries, NumPy's for instance, are none that an op's schema or a kernel takes:
# what is checked is given back as Python's own, for those who hand it on.


LARGEST_INT = 2**31 - 1  # that the kernels count to


def check_positive_int(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    if int(value) > LARGEST_INT:
        raise ValueError(f"{name}: expected at most {LARGEST_INT}, got {value}")
    return int(value)


def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    finite: bool = True,
) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    # Without math.isnan: for a number that it leaves open torch.compile has no such function.
    number: Any = value
    largest = sys.float_info.max  # above which are infinities, and integers beyond all floats
    if number != number or (finite and not -largest <= number <= largest):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    if above is not None and value <= above:
        raise ValueError(f"{name}: expected more than {above}, got {value}")
    return float(value)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_bounds(name: str, value: Any) -> tuple[float, float]:
    """A lower and an upper bound."""
    try:
        low, high = value
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected two numbers, got {value!r}") from None
    low = check_number(f"{name}[0]", low)
    return low, check_number(f"{name}[1]", high, above=low)


def check_sequence(name: str, value: Any, kind: str) -> None:
    """A list or the like, of what `kind` says; a text is one only of letters."""
    if type(value) is list:
        return
    if isinstance(value, str) or not isinstance(value, (Sequence, torch.nn.ParameterList)):
        got = f"the text {value!r}" if isinstance(value, str) else type(value).__name__
        raise TypeError(f"{name}: expected a list, {kind}, got {got}")


def check_tensor(name: str, value: Any, shape: tuple[int | str, ...]) -> None:
    """A dense floating-point tensor of this shape.

    A string in `shape` names a size that is free, a leading "..." any number of them.
    """
    if _native.fits(value, shape):
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    _check_dense(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    sizes: Sequence[int] = value.shape
    tail = shape
    if shape and shape[0] == "...":
        tail = shape[1:]
        sizes = sizes[len(sizes) - len(tail) :] if len(sizes) >= len(tail) else ()
    fits = len(sizes) == len(tail)
    for have, want in zip(sizes, tail, strict=False):
        fits = fits and (isinstance(want, str) or have == want)
    if not fits:
        wanted = ", ".join(str(s) for s in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(value.shape)}")


def _check_dense(name: str, value: Tensor) -> None:
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one in {value.layout}")


def check_denoised(eps: Any, x: Tensor) -> None:
    """What a denoiser returned for x: broadcasting would hide a wrong shape."""
    if not isinstance(eps, Tensor):
        raise TypeError(f"denoiser: expected it to return a tensor, got {type(eps).__name__}")
    if eps.shape != x.shape:
        raise ValueError(
            f"denoiser: expected it to return shape {list(x.shape)} like x, got {list(eps.shape)}"
        )


def as_rows(x: Tensor) -> Tensor:
    """``[..., in]`` -> ``[rows, in]``: x itself where it is that, without a view in the graph."""
    if x.ndim == 2:
        return x
    return x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -2)


def checked_inputs(
    module: torch.nn.Module,
    names: tuple[str, ...],
    tensors: list[Any],
    widths: tuple[int, ...],
    leading: str = "...",
) -> list[Any]:
    """Inputs of a module's call: rows of these widths, as many in each, like the module's weights.

    Under autocast they come back in the dtype of the weights. `leading`: the name of the other sizes.
    """
    weight = next(itertools.chain(module.parameters(), module.buffers()), None)
    tensors, kind = out_of_autocast(weight, *tensors), type(module).__name__
    for name, tensor, width in zip(names, tensors, widths, strict=True):
        check_tensor(name, tensor, (leading, width))
        rows = tensors[0].shape[:-1]
        if tensor.shape[:-1] != rows:
            raise ValueError(
                f"{name}: expected shape {[*rows, width]}, as many rows as {names[0]}, "
                f"got {list(tensor.shape)}"
            )
        if weight is not None:
            check_like(name, tensor, f"the {kind}'s weights", weight)
    return tensors


def check_like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """The same dtype and device as another argument."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: expected {other.dtype} like {other_name}, got {value.dtype}")
    if value.device != other.device:
        raise ValueError(
            f"{name}: expected to be on {other.device} like {other_name}, is on {value.device}"
        )


_INDICES = (torch.int32, torch.int64)  # which torch indexes by
INTEGERS = (*_INDICES, torch.uint8, torch.int8, torch.int16)


def check_levels(
    t: Any, other_name: str, other: Tensor, dtypes: tuple[torch.dtype, ...] = _INDICES
) -> None:
    """Noise levels `t`, one for every row of another argument. Their values aren't looked at."""
    if not isinstance(t, Tensor) or t.dtype not in dtypes:
        kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"t: expected an integer tensor, got {kind}")
    _check_dense("t", t)
    if t.device != other.device:
        raise ValueError(f"t: expected to be on {other.device} like {other_name}, is on {t.device}")
    if t.shape != other.shape[:1]:
        raise ValueError(f"t: expected shape {list(other.shape[:1])}, got {list(t.shape)}")


_COMPUTE_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


def check_compute_dtype(value: Any) -> None:
    if value not in _COMPUTE_DTYPES:
        raise ValueError(
            "compute_dtype: expected None, torch.float32, torch.bfloat16 or torch.float16, "
            f"got {value!r}"
        )


_LOWER_PRECISIONS = (torch.bfloat16, torch.float16)


def out_of_autocast(like: Any, *tensors: Any) -> list[Any]:
    """Under torch.autocast, tensors in its lower precision as the dtype of a network or weight.

    Layers before an op hand their results on in that precision; the ops choose theirs themselves.
    `like`: a module, a weight, or lists of weights. Where none says it, the other tensors do: the
    dtype is that of their sum.
    """
    if not torch._C._is_any_autocast_enabled():
        return [*tensors]
    weight = next(like.parameters(), None) if isinstance(like, torch.nn.Module) else like
    while isinstance(weight, Sequence) and weight and not isinstance(weight, str):
        weight = weight[0]
    known = (weight,) if isinstance(weight, Tensor) else tensors
    dtypes = [t.dtype for t in known if isinstance(t, Tensor) and t.is_floating_point()]
    if not dtypes:
        return [*tensors]
    dtype = functools.reduce(torch.promote_types, dtypes)
    return [t.to(dtype) if _is_from_autocast(t) else t for t in tensors]


def _is_from_autocast(value: Any) -> bool:
    """Whether it is a tensor that one of autocast's layers may have made."""
    if not isinstance(value, Tensor) or value.dtype not in _LOWER_PRECISIONS:
        return False
    device = value.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
