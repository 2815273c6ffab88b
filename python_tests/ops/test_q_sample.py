"""Forward corruption."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffcore import DiffusionSchedule, ops

SCHEDULE = DiffusionSchedule.cosine(10)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 4)])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_equation(shape: tuple[int, ...], index: torch.dtype) -> None:
    x0, noise = torch.randn(2, *shape, dtype=torch.float64)
    levels = [0, 9, 3, 3, 5]
    sample = ops.q_sample(x0, torch.tensor(levels, dtype=index), noise, SCHEDULE)
    for row, t in enumerate(levels):
        abar = SCHEDULE.alphas_cumprod[t].item()
        expected = math.sqrt(abar) * x0[row] + math.sqrt(1 - abar) * noise[row]
        torch.testing.assert_close(sample[row], expected, rtol=1e-12, atol=0)


def test_steps_compose() -> None:
    """x_t by t + 1 steps of x sqrt(alpha) + sqrt(beta) z has the same mean and variance."""
    mean, variance = 1.0, 0.0
    for t in range(SCHEDULE.K):
        alpha, beta = SCHEDULE.alphas[t].item(), SCHEDULE.betas[t].item()
        mean, variance = mean * math.sqrt(alpha), variance * alpha + beta
        level = torch.tensor([t])
        one, zero = torch.ones(1).double(), torch.zeros(1).double()
        assert ops.q_sample(one, level, zero, SCHEDULE).item() == pytest.approx(mean)
        assert ops.q_sample(zero, level, one, SCHEDULE).item() ** 2 == pytest.approx(variance)


def test_gradients() -> None:
    x0, noise = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    t = torch.tensor([0, 3, 9, 5])

    def sample(x0: Tensor, noise: Tensor) -> Tensor:
        return ops.q_sample(x0, t, noise, SCHEDULE)

    assert torch.autograd.gradcheck(sample, (x0, noise))
    assert torch.autograd.gradgradcheck(sample, (x0, noise))


def test_compile_and_func() -> None:
    x0, noise, t = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 3, 9, 5])

    def loss(x0: Tensor, t: Tensor) -> Tensor:
        return ops.q_sample(x0, t, noise, SCHEDULE).square().sum()

    leaf = x0.clone().requires_grad_()
    expected = torch.autograd.grad(loss(leaf, t), leaf)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf, t), leaf)[0], expected)
    torch.testing.assert_close(torch.func.grad(loss)(x0, t), expected)

    stacked = torch.randn(5, 4, 3), torch.randint(0, 10, (5, 4))
    torch.testing.assert_close(
        torch.vmap(lambda x0, t: ops.q_sample(x0, t, noise, SCHEDULE))(*stacked),
        torch.stack([ops.q_sample(x, t, noise, SCHEDULE) for x, t in zip(*stacked, strict=True)]),
    )


@given(rows=st.integers(0, 5), columns=st.integers(0, 5), half=st.booleans())
def test_any_shape_and_stride(rows: int, columns: int, half: bool) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    x0 = torch.randn(columns, 2 * rows).to(dtype)[:, ::2].T
    noise = torch.randn(1, columns).to(dtype).expand(rows, columns)
    t = torch.randint(0, 10, (2 * rows,))[::2]
    sample = ops.q_sample(x0, t, noise, SCHEDULE)
    assert sample.shape == (rows, columns)
    assert sample.dtype == dtype
    assert torch.equal(sample, ops.q_sample(x0.clone(), t.clone(), noise.clone(), SCHEDULE))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x0": 1.0}, TypeError, "^x0: expected a tensor, got float"),
        ({"x0": torch.ones(4, 3).long()}, TypeError, "^x0: "),
        ({"noise": None}, TypeError, "^noise: "),
        ({"noise": torch.ones(4, 2)}, ValueError, r"^noise: expected shape \[4, 3\], got \[4, 2\]"),
        ({"noise": torch.ones(4, 3).double()}, TypeError, "^noise: "),
        ({"noise": torch.ones(4, 3, device="meta")}, ValueError, "^noise: .* is on meta"),
        ({"t": 3}, TypeError, "^t: expected an integer tensor, got int"),
        ({"t": torch.ones(4)}, TypeError, "^t: expected an integer tensor, got torch.float32"),
        ({"t": torch.ones(4, 1).long()}, ValueError, r"^t: expected shape \[4\], got \[4, 1\]"),
        ({"t": torch.ones(4, device="meta").long()}, ValueError, "^t: .* is on meta"),
        ({"t": torch.tensor([0, 1, 2, 10])}, ValueError, r"^t: expected levels in 0\.\.9"),
        ({"t": torch.tensor([0, 1, 2, -1])}, ValueError, r"^t: expected levels in 0\.\.9"),
        ({"schedule": "cosine"}, TypeError, "^schedule: expected a DiffusionSchedule, got str"),
        ({"backend": "cpu"}, ValueError, "^backend: expected one of reference, triton, got 'cpu'"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "x0": torch.ones(4, 3),
        "t": torch.tensor([0, 1, 2, 3]),
        "noise": torch.ones(4, 3),
        "schedule": SCHEDULE,
    }
    with pytest.raises(error, match=message):
        ops.q_sample(**{**arguments, **change})


def test_scalars_have_no_batch() -> None:
    with pytest.raises(ValueError, match=r"^x0: expected shape"):
        ops.q_sample(torch.tensor(1.0), torch.tensor(0), torch.tensor(1.0), SCHEDULE)
