"""One step of a sampler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import assert_error_at_most_twice_eager
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffcore import DiffusionSchedule, ops
from diffcore.schedule import SOLVERS

COEFFICIENTS = torch.tensor([1.5, 0.7, 0.3, 0.9, -0.2, 0.4, -0.6], dtype=torch.float64)
NAMES = ("x", "eps", "noise", "x0_previous")


def inputs(rows: int = 4, columns: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {name: torch.randn(rows, columns, dtype=dtype) for name in NAMES}


def test_equation() -> None:
    v = inputs(dtype=torch.float64)
    c0, c1, c2, c3, c4, c5, c6 = COEFFICIENTS.tolist()
    step, x0 = ops.reverse_step(**v, coefficients=COEFFICIENTS, noise_scale=0.8, clip=0.9)
    for i in range(4):
        for j in range(3):
            x, eps, z, previous = (v[name][i, j].item() for name in NAMES)
            predicted = min(max(c0 * x - c1 * eps, -0.9), 0.9)
            expected = c2 * predicted + c3 * x + c4 * eps + c5 * 0.8 * z + c6 * previous
            assert x0[i, j].item() == pytest.approx(predicted, rel=1e-12)
            assert step[i, j].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("rows", "columns"), [(1000, 1), (177, 17), (64, 33)])
def test_accuracy(isa: str, solver: str, rows: int, columns: int) -> None:
    v = inputs(rows, columns)
    c = DiffusionSchedule.linear(4).solver(solver).coefficients[1].float().double()
    options = {"coefficients": c, "noise_scale": 0.75, "clip": 0.9}
    native = ops.reverse_step(**v, **options, backend="cpu")
    eager = ops.reverse_step(**v, **options, backend="reference")
    exact = ops.reverse_step(**{k: x.double() for k, x in v.items()}, **options)
    for results in zip(native, eager, exact, strict=True):
        assert_error_at_most_twice_eager(*results)


def test_without_noise_and_without_a_previous_x0(backend: str) -> None:
    v = inputs()
    zeros = torch.zeros(4, 3)
    short = ops.reverse_step(v["x"], v["eps"], COEFFICIENTS, backend=backend)
    full = ops.reverse_step(
        v["x"], v["eps"], COEFFICIENTS, noise=zeros, x0_previous=zeros, backend=backend
    )
    for a, b in zip(short, full, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 7, 13, 63, 64, 65])
def test_a_row_doesn_t_depend_on_its_batch(isa: str, rows: int) -> None:
    v = inputs(130, 17)
    whole = ops.reverse_step(**v, coefficients=COEFFICIENTS)
    part = ops.reverse_step(**{k: x[:rows] for k, x in v.items()}, coefficients=COEFFICIENTS)
    for a, b in zip(part, whole, strict=True):
        assert torch.equal(a, b[:rows])


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradcheck_of_the_reference(solver: str) -> None:
    tensors = [x.requires_grad_() for x in inputs(dtype=torch.float64).values()]
    # The second of four steps: nothing is zero there that a gradient could hide behind.
    c = DiffusionSchedule.linear(4).solver(solver).coefficients[1]

    def step(x: Tensor, eps: Tensor, noise: Tensor, x0_previous: Tensor) -> Any:
        return ops.reverse_step(x, eps, c, noise=noise, x0_previous=x0_previous, clip=0.9)

    assert torch.autograd.gradcheck(step, tensors)
    assert torch.autograd.gradgradcheck(step, tensors)


def test_first_and_second_gradients_are_the_reference_s(isa: str) -> None:
    tensors = [x.requires_grad_() for x in inputs(40, 17).values()]
    x, eps, noise, x0_previous = tensors
    results = []
    for backend in ("cpu", "reference"):
        step, x0 = ops.reverse_step(
            x,
            eps,
            COEFFICIENTS,
            noise=noise,
            x0_previous=x0_previous,
            noise_scale=0.8,
            clip=0.9,
            backend=backend,
        )
        loss = step.pow(3).sum() + x0.square().sum()
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors)
        assert all(g.abs().max() > 0.1 for g in (*first, *second))
        results.append((*first, *second))
    for native, reference in zip(*results, strict=True):
        torch.testing.assert_close(native, reference, rtol=1e-4, atol=1e-4)


def test_opcheck(isa: str) -> None:
    x, eps, noise, x0_previous = inputs().values()
    for optional in ((noise, x0_previous), (None, None)):
        arguments = (x, eps, COEFFICIENTS, *optional, 0.8, 0.9, "cpu")
        torch.library.opcheck(torch.ops.diffcore.reverse_step.default, arguments)


def test_compile_and_func(backend: str) -> None:
    x, eps, noise, _ = inputs().values()

    def loss(x: Tensor, eps: Tensor) -> Tensor:
        step, x0 = ops.reverse_step(x, eps, COEFFICIENTS, noise=noise, backend=backend)
        return (step.square() + x0).sum()

    x.requires_grad_()
    expected = torch.autograd.grad(loss(x, eps), x)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, eps), x)[0], expected)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach(), eps), expected)

    def step(x: Tensor, eps: Tensor) -> Tensor:
        return ops.reverse_step(x, eps, COEFFICIENTS, backend=backend)[0]

    xs, shared = torch.randn(5, 4, 3), torch.randn(4, 3)
    torch.testing.assert_close(
        torch.vmap(step, in_dims=(0, None))(xs, shared), torch.stack([step(x, shared) for x in xs])
    )
    torch.testing.assert_close(
        torch.vmap(torch.func.grad(loss), in_dims=(0, None))(xs, shared),
        torch.stack([torch.func.grad(loss)(x, shared) for x in xs]),
    )


def test_forward_mode_derivative() -> None:
    x, eps, noise, _ = inputs().values()

    def step(x: Tensor) -> Tensor:
        return ops.reverse_step(x, eps, COEFFICIENTS, noise=noise, clip=5.0)[0]

    tangent = torch.func.jvp(step, (x,), (torch.ones_like(x),))[1]
    slope = (COEFFICIENTS[2] * COEFFICIENTS[0] + COEFFICIENTS[3]).item()
    torch.testing.assert_close(tangent, torch.full_like(x, slope))


def test_nan_stays_in_its_element(backend: str) -> None:
    for name in NAMES:
        v = inputs(5, 17)
        v[name][2, 16] = math.nan
        where = torch.zeros(5, 17, dtype=torch.bool)
        where[2, 16] = True
        step, x0 = ops.reverse_step(**v, coefficients=COEFFICIENTS, backend=backend)
        assert torch.equal(step.isnan(), where)
        assert torch.equal(x0.isnan(), where & torch.tensor(name in ("x", "eps")))


@given(rows=st.integers(0, 5), columns=st.integers(1, 20), magnitude=st.integers(-30, 30))
def test_any_shape_stride_and_size(isa: str, rows: int, columns: int, magnitude: int) -> None:
    buffer = torch.randn(columns, 2 * rows + 1) * 10.0**magnitude
    x = buffer[:, 1::2].T  # columns apart, from an odd offset
    eps = torch.randn(1, columns).expand(rows, columns)
    noise, before = torch.randn(columns, rows).T, torch.randn(rows, 1).expand(rows, columns)
    step, x0 = ops.reverse_step(x, eps, COEFFICIENTS, noise=noise, x0_previous=before)
    x, eps, noise, before = (t.contiguous() for t in (x, eps, noise, before))
    again, again_x0 = ops.reverse_step(x, eps, COEFFICIENTS, noise=noise, x0_previous=before)
    assert step.shape == (rows, columns)
    assert torch.equal(step, again)
    assert torch.equal(x0, again_x0)
    assert torch.isfinite(step).all()
    assert (x0.abs() <= 1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_on_the_reference(dtype: torch.dtype) -> None:
    step, x0 = ops.reverse_step(**inputs(dtype=dtype), coefficients=COEFFICIENTS)
    assert step.dtype == x0.dtype == dtype


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "^x: expected a tensor, got list"),
        ({"x": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "^x: .* got torch.int64"),
        ({"x": torch.ones(3)}, ValueError, r"^x: expected shape \[B, A\], got \[3\]"),
        ({"eps": None}, TypeError, "^eps: expected a tensor, got NoneType"),
        ({"eps": torch.ones(4, 2)}, ValueError, r"^eps: expected shape \[4, 3\], got \[4, 2\]"),
        ({"eps": torch.ones(4, 3).double()}, TypeError, "^eps: expected torch.float32 like x"),
        ({"eps": torch.ones(4, 3, device="meta")}, ValueError, "^eps: .* cpu like x, is on meta"),
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
        ({"backend": "gpu"}, ValueError, "^backend: expected one of .*got 'gpu'"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": torch.ones(4, 3), "eps": torch.ones(4, 3), "coefficients": COEFFICIENTS}
    with pytest.raises(error, match=message):
        ops.reverse_step(**{**arguments, **change})
