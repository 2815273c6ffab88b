"""Kernels around single functions of ``diffcore/ops/_triton.py``, for their tests.

Imported within tests, where Triton is what they run (see conftest.py).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcore.ops import _triton
from diffcore.ops._triton import (
    activate,
    activate_with_slope,
    load_seed,
    normals,
    rounded_operand,
)

BLOCK = 1024


@triton.jit
def activation_kernel(
    x, y, slope, count, ACTIVATION: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = tl.load(x + i, mask=i < count, other=0.0)
    y_here, slope_here = activate_with_slope(here, ACTIVATION, FAST)
    tl.device_assert((y_here == activate(here, ACTIVATION, FAST)) | (y_here != y_here))
    tl.store(y + i, y_here, mask=i < count)
    tl.store(slope + i, slope_here, mask=i < count)


@triton.jit
def normals_kernel(
    z,
    seed_value,
    seed_pointer,
    first_row,
    step,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    seed = load_seed(seed_value, seed_pointer)
    drawn = normals(seed, row.to(tl.int64) + first_row, step, column)
    there = (row < rows) & (column < columns)
    tl.store(z + row * columns + column, drawn, mask=there)


@triton.jit
def rounding_kernel(x, y, count, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = tl.load(x + i, mask=i < count, other=0.0)
    tl.store(y + i, rounded_operand(here, PRECISION), mask=i < count)


def on(device: str) -> SimpleNamespace:
    """Functions of tensors on the CPU that run on a device."""

    def activate(x: Tensor, activation: str, fast: bool = False) -> tuple[Tensor, Tensor]:
        x = x.to(device)
        y, slope = torch.empty_like(x), torch.empty_like(x)
        programs = triton.cdiv(len(x), BLOCK)
        arguments: Any = (x, y, slope, len(x), activation, fast, BLOCK)
        _triton.launch(activation_kernel, programs, *arguments)
        return y.cpu(), slope.cpu()

    def normals(seed: int | Tensor, first_row: int, step: int, rows: int, columns: int) -> Tensor:
        z = torch.empty(rows, columns, device=device)
        pair = (0, seed.to(device)) if isinstance(seed, Tensor) else (seed, None)
        numbers: Any = (first_row, step, rows, columns, 16, 16)
        _triton.launch(normals_kernel, triton.cdiv(rows, 16), z, *pair, *numbers)
        return z.cpu()

    def rounded(x: Tensor, precision: str) -> Tensor:
        x = x.to(device)
        y = torch.empty_like(x)
        programs = triton.cdiv(len(x), BLOCK)
        _triton.launch(rounding_kernel, programs, x, y, len(x), precision, BLOCK)
        return y.cpu()

    return SimpleNamespace(activate=activate, normals=normals, rounded=rounded)
