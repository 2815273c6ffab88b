"""The exploration bonuses against their equations, and over a million steps."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffcore.agents.exploration import EllipticalBonus, kernel_bonus


def direct(phi: Tensor, seen: Tensor, ridge: float) -> Tensor:
    """Eq. 23 by inverting the matrix."""
    covariance = seen.T @ seen + ridge * torch.eye(seen.shape[1], dtype=seen.dtype)
    return torch.einsum("bi,ij,bj->b", phi, torch.linalg.inv(covariance), phi).unsqueeze(-1)


@given(
    rows=st.sampled_from([0, 1, 7, 33]),
    width=st.sampled_from([1, 5, 16]),
    batch=st.integers(0, 9),
    ridge=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 99),
)
def test_elliptical_is_equation_23(
    rows: int, width: int, batch: int, ridge: float, seed: int
) -> None:
    torch.manual_seed(seed)
    seen, phi = torch.randn(rows, width).double(), torch.randn(batch, width).double()
    bonus = EllipticalBonus(width, ridge, decay=1.0)
    for part in seen.split(3):
        bonus.add(part)
    torch.testing.assert_close(bonus(phi), direct(phi, seen, ridge), rtol=1e-9, atol=1e-12)


def test_elliptical_stands_for_as_many_rows_as_it_is_told() -> None:
    seen, phi = torch.randn(40, 6).double(), torch.randn(5, 6).double()
    bonus = EllipticalBonus(6, 0.5, decay=1.0)
    bonus.add(seen)
    expected = direct(phi, seen.repeat(25, 1), 0.5)
    torch.testing.assert_close(bonus(phi, count=1000), expected, rtol=1e-9, atol=0)


def test_elliptical_forgets_by_its_decay() -> None:
    old, new, phi = (torch.randn(rows, 4).double() for rows in (9, 5, 3))
    bonus = EllipticalBonus(4, 1.0, decay=0.25)
    bonus.add(old)
    bonus.add(new)
    expected = direct(phi, torch.cat([0.5 * old, new]), 1.0)  # a weight of 0.25 is a factor of 0.5
    torch.testing.assert_close(bonus(phi), expected, rtol=1e-9, atol=0)
    assert float(bonus.weight) == 0.25 * 9 + 5


@pytest.mark.parametrize("decay", [1.0, 0.99])
def test_elliptical_is_exact_after_a_million_rows(decay: float) -> None:
    """Of nearly collinear features, for which an updated inverse loses all digits."""
    width, batch, steps = 8, 500, 2000
    torch.manual_seed(0)
    mixing = torch.randn(width, width).double() * 10.0 ** (-0.5 * torch.arange(width).double())
    bonus, ridge = EllipticalBonus(width, 1e-3, decay=decay), 1e-3
    blocks = [torch.randn(batch, width).double() @ mixing.T for _ in range(steps)]
    for block in blocks:
        bonus.add(block)
    weights = decay ** torch.arange(steps - 1, -1, -1).double()
    total = torch.stack([w * (b.T @ b) for w, b in zip(weights, blocks, strict=True)]).sum(0)
    exact = total + ridge * torch.eye(width).double()
    phi = torch.randn(64, width).double() @ mixing.T
    expected = (phi * torch.linalg.solve(exact, phi.T).T).sum(1, keepdim=True)
    torch.testing.assert_close(bonus(phi), expected, rtol=1e-6, atol=0)
    assert torch.isfinite(bonus(phi.float())).all()


def test_elliptical_is_exact_after_a_million_updates() -> None:
    """Four rows by turns: in the end a geometric series of each."""
    width, ridge = 4, 1e-3
    torch.manual_seed(0)
    mixing = torch.randn(width, width).double() * 10.0 ** (-torch.arange(width).double())
    rows = (torch.randn(4, width).double() @ mixing.T).split(1)
    bonus = EllipticalBonus(width, ridge)
    for _ in range(250_000):
        for row in rows:
            bonus.add(row)
    last = bonus.decay ** torch.arange(3.0, -1.0, -1.0).double() / (1 - bonus.decay**4)
    total = sum(w * (row.T @ row) for w, row in zip(last, rows, strict=True))
    exact = total + ridge * torch.eye(width).double()
    phi = torch.randn(64, width).double() @ mixing.T
    expected = (phi * torch.linalg.solve(exact, phi.T).T).sum(1, keepdim=True)
    torch.testing.assert_close(bonus(phi), expected, rtol=1e-6, atol=0)


def test_elliptical_falls_as_one_over_the_visits() -> None:
    bonus, phi = EllipticalBonus(3, 1e-6, decay=1.0), torch.tensor([[3.0, 4.0, 0.0]])
    for visits in range(1, 6):
        bonus.add(phi)
        assert float(bonus(phi)) == pytest.approx(1 / visits, rel=1e-4)
    assert float(bonus(torch.tensor([[0.0, 0.0, 1.0]]))) == pytest.approx(1e6, rel=1e-4)


def test_elliptical_without_data_has_its_prior() -> None:
    phi = torch.randn(4, 3)
    expected = phi.square().sum(dim=1, keepdim=True) / 2.0
    torch.testing.assert_close(EllipticalBonus(3, 2.0)(phi), expected)
    torch.testing.assert_close(EllipticalBonus(3, 2.0)(phi, count=10), expected)


def test_elliptical_is_saved_and_loaded() -> None:
    first, second = EllipticalBonus(3, 1.0), EllipticalBonus(3, 1.0)
    first.add(torch.randn(9, 3))
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for bonus in (first, second):
        bonus.add(torch.ones(2, 3))
    phi = torch.randn(5, 3)
    assert torch.equal(first(phi), second(phi))


def test_nan_in_one_row_stays_in_that_row() -> None:
    bonus, phi = EllipticalBonus(3, 1.0), torch.randn(4, 3)
    bonus.add(torch.randn(9, 3))
    phi[2, 1] = float("nan")
    for values in (bonus(phi), kernel_bonus(phi, torch.randn(9, 3), 1.0)):
        assert torch.isnan(values).flatten().tolist() == [False, False, True, False]


@pytest.mark.parametrize("rows", [2, 3, 4, 7])
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_kernel_is_equation_22(ridge: float, rows: int) -> None:
    x, seen = torch.randn(5, 3).double(), torch.randn(rows, 3).double()
    distances = sorted(float((a - b).norm()) for a, b in itertools.combinations(seen, 2))
    bandwidth = distances[(len(distances) - 1) // 2]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(a - b).square().sum() / (2 * bandwidth**2))

    k = torch.stack([torch.stack([kernel(a, b) for b in seen]) for a in x])
    matrix = torch.stack([torch.stack([kernel(a, b) for b in seen]) for a in seen])
    inverse = torch.linalg.inv(matrix + ridge * torch.eye(rows).double())
    expected = 1 - torch.einsum("bi,ij,bj->b", k, inverse, k)
    torch.testing.assert_close(kernel_bonus(x, seen, ridge).squeeze(-1), expected)


def test_kernel_is_near_zero_where_it_has_been_and_near_one_far_away() -> None:
    seen = torch.randn(50, 2)
    at, far = kernel_bonus(seen, seen, 1e-3), kernel_bonus(seen + 1e3, seen, 1e-3)
    assert float(at.max()) < 0.01
    assert float(far.min()) > 0.999
    assert float(at.min()) >= 0.0


def test_kernel_of_one_place_seen_again_and_again_is_finite() -> None:
    seen = torch.ones(20, 3)
    bonus = kernel_bonus(torch.cat([seen[:1], seen[:1] + 1]), seen, 1e-3).flatten().tolist()
    assert bonus[0] == pytest.approx(0.0, abs=1e-4)
    assert bonus[1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 1.0), ValueError, "features must be at least 1, got 0"),
        ((3, 0.0), ValueError, "ridge must be above 0, got 0.0"),
        ((3, float("nan")), ValueError, "ridge must be finite"),
        ((3, "1"), TypeError, "ridge must be a number"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[int, float], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        EllipticalBonus(*arguments)


def test_a_bad_decay_or_ridge_is_refused() -> None:
    with pytest.raises(ValueError, match="decay must be above 0 and at most 1, got 1.5"):
        EllipticalBonus(3, 1.0, decay=1.5)
    with pytest.raises(ValueError, match="ridge must be above 0, got 0"):
        kernel_bonus(torch.ones(2, 3), torch.ones(2, 3), 0)


def test_a_kernel_of_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="seen must have at least 2 rows, .* got 1"):
        kernel_bonus(torch.ones(2, 3), torch.ones(1, 3), 1.0)
