"""One step of a sampler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffcore import DiffusionSchedule, ops
from diffcore.schedule import SOLVERS

COEFFICIENTS = torch.tensor([1.5, 0.7, 0.3, 0.9, -0.2, 0.4, -0.6], dtype=torch.float64)


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    names = ("x", "eps", "noise", "x0_previous")
    return {name: torch.randn(4, 3, dtype=dtype) for name in names}


def test_equation() -> None:
    v = inputs()
    c0, c1, c2, c3, c4, c5, c6 = COEFFICIENTS.tolist()
    step, x0 = ops.reverse_step(**v, coefficients=COEFFICIENTS, noise_scale=0.8, clip=0.9)
    for i in range(4):
        for j in range(3):
            x, eps, z, previous = (v[k][i, j].item() for k in ("x", "eps", "noise", "x0_previous"))
            predicted = min(max(c0 * x - c1 * eps, -0.9), 0.9)
            expected = c2 * predicted + c3 * x + c4 * eps + c5 * 0.8 * z + c6 * previous
            assert x0[i, j].item() == pytest.approx(predicted, rel=1e-12)
            assert step[i, j].item() == pytest.approx(expected, rel=1e-12)


def test_without_noise_and_without_a_previous_x0() -> None:
    v = inputs()
    zeros = torch.zeros(4, 3).double()
    step, x0 = ops.reverse_step(v["x"], v["eps"], COEFFICIENTS)
    same, same_x0 = ops.reverse_step(
        v["x"], v["eps"], COEFFICIENTS, noise=zeros, x0_previous=zeros
    )
    assert torch.equal(step, same)
    assert torch.equal(x0, same_x0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients(solver: str) -> None:
    v = inputs()
    for value in v.values():
        value.requires_grad_()
    # The second of four steps: nothing is zero there that a gradient could hide behind.
    c = DiffusionSchedule.linear(4).solver(solver).coefficients[1]

    def step(x: Tensor, eps: Tensor, noise: Tensor, x0_previous: Tensor) -> Any:
        return ops.reverse_step(x, eps, c, noise=noise, x0_previous=x0_previous, clip=0.9)

    assert torch.autograd.gradcheck(step, tuple(v.values()))
    assert torch.autograd.gradgradcheck(step, tuple(v.values()))


def test_compile_and_func() -> None:
    v = inputs(torch.float32)

    def loss(x: Tensor, eps: Tensor) -> Tensor:
        step, x0 = ops.reverse_step(x, eps, COEFFICIENTS, noise=v["noise"])
        return (step.square() + x0).sum()

    x = v["x"].requires_grad_()
    expected = torch.autograd.grad(loss(x, v["eps"]), x)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, v["eps"]), x)[0], expected)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach(), v["eps"]), expected)

    def step(x: Tensor, eps: Tensor) -> Tensor:
        return ops.reverse_step(x, eps, COEFFICIENTS)[0]

    stacked = torch.randn(5, 4, 3), torch.randn(5, 4, 3)
    torch.testing.assert_close(
        torch.vmap(step)(*stacked), torch.stack([step(*pair) for pair in zip(*stacked, strict=True)])
    )


def test_nan_stays_in_its_element() -> None:
    v = inputs(torch.float32)
    v["eps"][2, 1] = math.nan
    for result in ops.reverse_step(**v, coefficients=COEFFICIENTS):
        where = torch.zeros(4, 3, dtype=torch.bool)
        where[2, 1] = True
        assert torch.equal(result.isnan(), where)


@given(rows=st.integers(0, 5), columns=st.integers(1, 5), magnitude=st.integers(-30, 30))
def test_any_shape_stride_and_size(rows: int, columns: int, magnitude: int) -> None:
    buffer = torch.randn(columns, 2 * rows + 1) * 10.0**magnitude
    x = buffer[:, 1::2].T  # columns apart, from an odd offset
    eps = torch.randn(1, columns).expand(rows, columns)
    step, x0 = ops.reverse_step(x, eps, COEFFICIENTS)
    again, again_x0 = ops.reverse_step(x.contiguous(), eps.contiguous(), COEFFICIENTS)
    assert step.shape == (rows, columns)
    assert torch.equal(step, again)
    assert torch.equal(x0, again_x0)
    assert torch.isfinite(step).all()
    assert (x0.abs() <= 1).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "^x: expected a tensor, got list"),
        ({"x": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "^x: .* got torch.int64"),
        ({"x": torch.ones(3)}, ValueError, r"^x: expected shape \[B, A\], got \[3\]"),
        ({"eps": None}, TypeError, "^eps: expected a tensor, got NoneType"),
        ({"eps": torch.ones(4, 2)}, ValueError, r"^eps: expected shape \[4, 3\], got \[4, 2\]"),
        ({"eps": torch.ones(4, 3).double()}, TypeError, "^eps: expected torch.float32 like x"),
        ({"eps": torch.ones(4, 3, device="meta")}, ValueError, "^eps: .* on cpu like x, is on meta"),
        ({"noise": torch.ones(5, 3)}, ValueError, "^noise: "),
        ({"noise": torch.ones(4, 3, device="meta")}, ValueError, "^noise: "),
        ({"x0_previous": torch.ones(4)}, ValueError, "^x0_previous: "),
        ({"x0_previous": torch.ones(4, 3).half()}, TypeError, "^x0_previous: "),
        ({"coefficients": torch.ones(6)}, ValueError, r"^coefficients: expected shape \[7\]"),
        ({"coefficients": [1.0] * 7}, TypeError, "^coefficients: "),
        ({"coefficients": torch.ones(7, device="meta")}, ValueError, "^coefficients: .* on meta"),
        ({"noise_scale": math.nan}, ValueError, "^noise_scale: "),
        ({"noise_scale": "1"}, TypeError, "^noise_scale: expected a number, got str"),
        ({"clip": 0.0}, ValueError, "^clip: expected more than 0.0, got 0.0"),
        ({"clip": -1.0}, ValueError, "^clip: "),
        ({"clip": math.nan}, ValueError, "^clip: "),
        ({"clip": None}, TypeError, "^clip: "),
        ({"backend": "cuda"}, ValueError, "^backend: expected one of reference, got 'cuda'"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": torch.ones(4, 3), "eps": torch.ones(4, 3), "coefficients": COEFFICIENTS}
    with pytest.raises(error, match=message):
        ops.reverse_step(**{**arguments, **change})
