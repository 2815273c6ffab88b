"""What the Triton kernels share, and the ops that are elementwise."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ACTIVATIONS, assert_error_at_most_twice_eager
from torch import Tensor

import diffcore
from diffcore import DiffusionSchedule, ops
from diffcore.ops import _philox
from diffcore.ops.q_sample.native import corrupt
from diffcore.ops.reverse_step.native import step
from diffcore.schedule import SOLVERS

# NumPy, in which the interpreter computes, reports where infinities and NaN come from.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

SCHEDULE = DiffusionSchedule.cosine(10)


@pytest.fixture
def functions(device: str) -> SimpleNamespace:
    """The shared functions, each in a kernel of its own."""
    import kernels_of_functions

    return kernels_of_functions.on(device)


# -- activations -----------------------------------------------------------------------------------


def exact(activation: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and slope in float64."""
    leaf = x.double().requires_grad_()
    y = ACTIVATIONS[activation](leaf)
    return y.detach(), torch.autograd.grad(y.sum(), leaf)[0]


def points() -> Tensor:
    """Dense where activations bend, and every magnitude that float32 has."""
    magnitudes = 10 ** torch.linspace(-37, 38, 2000).double()
    return torch.cat(
        [torch.linspace(-100, 100, 8000).double(), 3 * torch.randn(4000), magnitudes, -magnitudes]
    ).float()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(functions: SimpleNamespace, activation: str) -> None:
    x = points()
    y, slope = functions.activate(x, activation)
    exact_y, exact_slope = exact(activation, x)
    # Of numbers below 1e-30 nothing is asked but that they stay small.
    torch.testing.assert_close(y.double(), exact_y, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=0, atol=3e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fast_activations_are_as_good_as_half_precision_needs(
    functions: SimpleNamespace, activation: str
) -> None:
    x = points()
    y, slope = functions.activate(x, activation, fast=True)
    exact_y, exact_slope = exact(activation, x)
    torch.testing.assert_close(y.double(), exact_y, rtol=3e-5, atol=1e-30)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=0, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("fast", [False, True])
def test_activations_of_no_number(functions: SimpleNamespace, activation: str, fast: bool) -> None:
    y, slope = functions.activate(torch.tensor([math.nan, math.inf, -math.inf]), activation, fast)
    assert y[0].isnan()
    assert activation in ("identity", "relu", "elu") or slope[0].isnan()
    at_infinity = ACTIVATIONS[activation](torch.tensor([math.inf, -math.inf]).double())
    if activation in ("silu", "mish", "gelu"):
        at_infinity[1] = 0  # the limit, where infinity times 0 is NaN
    torch.testing.assert_close(y[1:].double(), at_infinity, rtol=0, atol=1e-30, equal_nan=True)


def test_sine_of_large_numbers(functions: SimpleNamespace) -> None:
    """Where float32 has no fraction left: every number's own multiple of pi is taken off."""
    x = (2.0 ** (127 * torch.rand(4096))).float() * (torch.randint(0, 2, (4096,)) * 2 - 1)
    sine, cosine = functions.activate(x, "sin")
    torch.testing.assert_close(sine.double(), x.double().sin(), rtol=2e-7, atol=1e-8)
    torch.testing.assert_close(cosine.double(), x.double().cos(), rtol=2e-7, atol=1e-8)
    largest = torch.tensor([3.4028235e38, 16367173.0, 12867.0, 12866.999])
    sine, _ = functions.activate(largest, "sin")
    torch.testing.assert_close(sine.double(), largest.double().sin(), rtol=2e-7, atol=1e-8)


# -- noise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 12345, 2**32 + 7, 2**63 - 2])
@pytest.mark.parametrize("first_row", [0, 2**32 - 3, 2**40])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_normals(functions: SimpleNamespace, seed: int, first_row: int, as_tensor: bool) -> None:
    z = functions.normals(torch.tensor(seed) if as_tensor else seed, first_row, 3, 9, 7)
    expected = _philox.normals(torch.tensor(seed), 3, 9, 7, first_row=first_row)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-6)


def test_many_normals(functions: SimpleNamespace) -> None:
    """Rare values too: the farthest of 60,000 are 4 to 5 standard deviations out."""
    z = functions.normals(99, 0, 1, 4000, 15)
    expected = _philox.normals(torch.tensor(99), 1, 4000, 15)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-6)
    assert z.abs().max() > 4


# -- one step of a sampler -------------------------------------------------------------------------


NAMES = ("x", "eps", "noise", "x0_previous")


def step_inputs(device: str, rows: int, columns: int) -> dict[str, Any]:
    return {name: torch.randn(rows, columns, device=device) for name in NAMES}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("rows", "columns"), [(1000, 1), (177, 17)])
def test_step_accuracy(device: str, solver: str, rows: int, columns: int) -> None:
    v = step_inputs(device, rows, columns)
    c = DiffusionSchedule.linear(4).solver(solver).coefficients[1].float().double()
    options = {"coefficients": c, "noise_scale": 0.75, "clip": 0.9}
    native = ops.reverse_step(**v, **options, backend="triton")
    eager = ops.reverse_step(**v, **options, backend="reference")
    exact = ops.reverse_step(**{k: x.double() for k, x in v.items()}, **options)
    for results in zip(native, eager, exact, strict=True):
        assert_error_at_most_twice_eager(*(r.cpu() for r in results))


@pytest.mark.parametrize("given", [(), ("noise",), ("x0_previous",), ("noise", "x0_previous")])
@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (1, 1), (33, 7), (1025, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_equals_reference(
    device: str, given: tuple[str, ...], rows: int, columns: int, dtype: torch.dtype
) -> None:
    v = {k: x for k, x in step_inputs(device, rows, columns).items() if k in ("x", "eps", *given)}
    v["eps"] = v["eps"].T.contiguous().T  # another order in memory
    for coefficients in SCHEDULE.solver("dpmpp_2m").coefficients[2:4].to(dtype):
        results = ops.reverse_step(**v, coefficients=coefficients, clip=0.5, backend="triton")
        expected = ops.reverse_step(**v, coefficients=coefficients, clip=0.5, backend="reference")
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_step_keeps_nan_to_itself(device: str) -> None:
    v = step_inputs(device, 40, 3)
    v["x"][7, 1] = math.nan
    v["noise"][30, 2] = math.nan
    c = SCHEDULE.solver("ddpm").coefficients[2]
    step, x0 = ops.reverse_step(**v, coefficients=c, backend="triton")
    assert step.isnan().nonzero().tolist() == [[7, 1], [30, 2]]
    assert x0.isnan().nonzero().tolist() == [[7, 1]]


def test_step_gradients(device: str) -> None:
    v = {k: x.requires_grad_() for k, x in step_inputs(device, 9, 3).items()}
    c = SCHEDULE.solver("dpmpp_2m").coefficients[2]

    def gradients(backend: str) -> tuple[Tensor, ...]:
        step, x0 = ops.reverse_step(**v, coefficients=c, noise_scale=0.7, backend=backend)
        return torch.autograd.grad((step**2 + x0).sum(), list(v.values()))

    for a, b in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(a, b)


def test_step_under_vmap_and_opcheck(device: str) -> None:
    v = step_inputs(device, 5, 4)
    c = SCHEDULE.solver("ddpm").coefficients[2].to(device)

    def stepped(x: Tensor) -> Tensor:
        return ops.reverse_step(x, v["eps"], c, noise=v["noise"], backend="triton")[0]

    xs = torch.randn(3, 5, 4, device=device)
    torch.testing.assert_close(torch.vmap(stepped)(xs), torch.stack([stepped(x) for x in xs]))
    torch.library.opcheck(step.overload, (v["x"], v["eps"], c, v["noise"], None, 0.5, 1.0, "triton"))


# -- forward corruption ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3), (5, 0), (1,), (33, 7), (5, 2, 4), (1025, 1)])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_corruption(device: str, shape: tuple[int, ...], index: torch.dtype) -> None:
    x0, noise = torch.randn(2, *shape, device=device)
    t = torch.randint(0, 10, (2 * shape[0],), device=device, dtype=index)[::2]
    sample = ops.q_sample(x0, t, noise, SCHEDULE, backend="triton")
    exact = ops.q_sample(x0.double(), t, noise.double(), SCHEDULE)
    torch.testing.assert_close(sample.double(), exact, rtol=0, atol=1e-6)


def test_levels_that_there_aren_t_give_nan(device: str) -> None:
    x0, noise = torch.randn(2, 5, 3, device=device, requires_grad=True)
    t = torch.tensor([0, 10, 9, -1, 2**31 - 1], device=device)
    sample = ops.q_sample(x0, t, noise, SCHEDULE, backend="triton")
    (grad,) = torch.autograd.grad(sample.sum(), x0)
    for result in (sample, grad):
        assert result.isnan().all(1).tolist() == [False, True, False, True, True]
        assert result.isnan().any(1).tolist() == [False, True, False, True, True]


def test_corruption_gradients(device: str) -> None:
    """First and second ones."""
    t = torch.tensor([0, 3, 9, 5], device=device)
    x0, noise = (torch.randn(4, 3, device=device, requires_grad=True) for _ in range(2))

    def gradients(backend: str) -> tuple[Tensor, ...]:
        sample = ops.q_sample(x0, t, noise, SCHEDULE, backend=backend)
        first = torch.autograd.grad((sample**3).sum(), [x0, noise], create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), [x0, noise])

    for a, b in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(a, b)


def test_corruption_under_vmap_compile_and_opcheck(device: str) -> None:
    noise, t = torch.randn(4, 3, device=device), torch.randint(0, 10, (6, 4), device=device)
    x0 = torch.randn(4, 6, 3, device=device)

    def sample(x0: Tensor, t: Tensor) -> Tensor:
        return ops.q_sample(x0, t, noise, SCHEDULE, backend="triton")

    one_by_one = torch.stack([sample(x0[:, i], t[i]) for i in range(6)])
    torch.testing.assert_close(torch.vmap(sample, in_dims=(1, 0))(x0, t), one_by_one)
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x0[:, 0], t[0]), one_by_one[0])
    levels = torch.rand(10, 2, device=device)
    torch.library.opcheck(corrupt.overload, (x0[:, 0], t[0], noise, levels, "triton"))


def test_corruption_runs_on_the_reference_unless_asked_on_a_cpu(device: str) -> None:
    x0, t = torch.randn(2, 3, device=device), torch.tensor([1, 2], device=device)
    explained = diffcore.explain("q_sample", x0, t, x0, SCHEDULE)
    assert explained.backend == ("triton" if device == "cuda" else "reference")
