"""Products in TF32 of the chain and the ascent on Triton: what tensor cores would cut off is rounded
before they see it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import emulated
import numpy as np
import pytest
import torch
from helpers import EPS_ONLY, plain_denoiser
from torch import Tensor

from diffcore import DiffusionSchedule, nn, ops
from diffcore.ops import _backends

# NumPy, in which the interpreter computes, reports where infinities and NaN come from.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

SCHEDULE = DiffusionSchedule.cosine(4)


@pytest.fixture
def tf32(device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has kernels multiply in TF32 on the device whose name this is."""
    monkeypatch.setattr(_backends, "precision", lambda compute_dtype, like: "tf32")
    return device


@pytest.fixture
def functions(device: str) -> SimpleNamespace:
    """The shared functions, each in a kernel of its own."""
    import kernels_of_functions

    return kernels_of_functions.on(device)


# -- a number --------------------------------------------------------------------------------------


def test_numbers_are_rounded_as_by_cuda(functions: SimpleNamespace) -> None:
    """Up to infinity, at ties and beside them; NaN of every kind stay NaN."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 20_000, dtype=np.uint32)
    upper = bits & ~np.uint32(0x1FFF)
    ends = np.array([0, 1, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF], np.uint32)
    sides = [upper | np.uint32(lower) for lower in (0x0FFF, 0x1000, 0x1001)]
    x = np.concatenate([bits, *sides, ends, ends | np.uint32(1 << 31)]).view(np.float32)
    library = ctypes.CDLL(str(emulated.build("linear")))
    expected = np.empty_like(x)
    code = emulated.PRECISIONS["tf32"]
    library.rounded(code, len(x), emulated.address(x), emulated.address(expected))
    ours = functions.rounded(torch.from_numpy(x), "tf32").numpy()
    nan, tiny = np.isnan(x), np.abs(x) < 2.0**-100
    assert np.isnan(ours[nan]).all()
    assert (np.abs(ours[tiny] - x[tiny]) <= 2.0**-10 * np.abs(x[tiny]) + 2.0**-136).all()
    known = ~nan & ~tiny
    np.testing.assert_array_equal(ours[known].view(np.uint32), expected[known].view(np.uint32))


# -- products --------------------------------------------------------------------------------------


def chain(device: str) -> None:
    denoiser = nn.Denoiser(5, 3, 24, 3).to(device)
    state = torch.randn(9, 5, device=device)
    with torch.no_grad():
        ops.reverse_diffusion(denoiser, SCHEDULE, state, backend="triton")


def ascent(device: str) -> None:
    critic = nn.TwinCritic(5, 3, 24, 3).to(device)
    state, action = torch.randn(9, 5, device=device), torch.rand(9, 3, device=device)
    ops.action_gradient(critic, state, action, steps=2, backend="triton")


@pytest.mark.parametrize("op", [chain, ascent])
def test_every_operand_is_rounded(
    tf32: str, monkeypatch: pytest.MonkeyPatch, op: Callable[[str], None]
) -> None:
    if tf32 != "cpu":
        pytest.skip("only the interpreter shows what products are given")
    from triton.runtime.interpreter import InterpreterBuilder

    products = 0
    multiply = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        nonlocal products
        products += 1
        for side in (a, b):
            assert side.data.dtype == np.float32
            assert not (np.ascontiguousarray(side.data).view(np.uint32) & 0x1FFF).any()
        return multiply(self, a, b, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    op(tf32)
    assert products


def test_sums_are_not_closer_to_zero(tf32: str) -> None:
    """Operands that are cut off are 3e-4 too small on average, and so are all sums of positive ones;
    those that are rounded make up for each other."""
    denoiser = nn.Denoiser(5, 3, 256, 2, activation="relu")
    for parameter in denoiser.parameters():
        torch.nn.init.uniform_(parameter, 1, 2)
    arguments = {
        "schedule": SCHEDULE,
        "state": 1 + torch.rand(40, 5),
        "x_init": 1 + torch.rand(40, 3),
        "noise": torch.zeros(1, 40, 3),
    }

    def eps(of: Any, device: str, dtype: torch.dtype, backend: str) -> Tensor:
        given = {
            name: value.to(device, dtype) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        with torch.no_grad():
            options = {"solver": EPS_ONLY, "clip": math.inf, "backend": backend}
            return ops.reverse_diffusion(of, **given, **options).cpu().double()

    exact = eps(plain_denoiser(denoiser, torch.float64), "cpu", torch.float64, "reference")
    off = (eps(denoiser.to(tf32), tf32, torch.float32, "triton") - exact) / exact
    assert off.mean().abs() < 1e-4
    assert off.abs().max() < 2**-10
