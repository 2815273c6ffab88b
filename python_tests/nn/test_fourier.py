"""Random Fourier features as a module: kernel estimates, frequencies, state, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import nn


def build(seed: int, *args: Any, **options: Any) -> nn.RandomFourierFeatures:
    return nn.RandomFourierFeatures(*args, **options, generator=torch.Generator().manual_seed(seed))


def kernel_error(features: int, **options: Any) -> float:
    """Root mean square over pairs of points and over draws."""
    x, lengthscale = torch.randn(40, 6), 1.7
    exact = torch.exp(-torch.cdist(x, x).square() / (2 * lengthscale**2))
    errors = []
    for seed in range(20):
        phi = build(seed, 6, features, lengthscale=lengthscale, **options)(x)
        errors.append((phi @ phi.T - exact).square().mean())
    return torch.stack(errors).mean().sqrt().item()


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("kind", ["cos", "cos_sin"])
def test_kernel_estimate_converges_at_the_monte_carlo_rate(kind: str, orthogonal: bool) -> None:
    few = kernel_error(256, kind=kind, orthogonal=orthogonal)
    many = kernel_error(4096, kind=kind, orthogonal=orthogonal)
    assert few < 1.5 / math.sqrt(256)  # one product of features has a variance of at most 3/2
    assert 3.2 < few / many < 5  # sqrt(16) = 4


def test_orthogonal_frequencies_estimate_better() -> None:
    plain = kernel_error(60, kind="cos_sin")
    assert kernel_error(60, kind="cos_sin", orthogonal=True) < 0.9 * plain


@pytest.mark.parametrize(("in_dim", "features"), [(1, 5), (5, 3), (5, 5), (4, 11), (16, 4096)])
def test_orthogonal_frequencies(in_dim: int, features: int) -> None:
    omega = build(0, in_dim, features, orthogonal=True, lengthscale=0.5).omega
    assert omega.shape == (features, in_dim)
    for block in omega.double().split(in_dim):
        products = block @ block.T
        off_diagonal = products - products.diagonal().diag()
        assert (off_diagonal.abs() <= 1e-5 * products.diagonal().max()).all()
    if features > 1000:  # squared lengths are chi-squared: mean in_dim / lengthscale^2
        assert omega.square().sum(1).mean().item() == pytest.approx(4 * in_dim, rel=0.05)


def test_orthogonal_frequencies_have_either_sign() -> None:
    """As rotations of a line are 1 and -1; QR alone gives the same sign every time."""
    omega = build(0, 1, 1000, orthogonal=True).omega
    assert 400 < int((omega > 0).sum()) < 600


@pytest.mark.parametrize("kind", ["sin", "cos", "cos_sin"])
def test_values(backend: str, kind: str) -> None:
    module, x = build(0, 3, 7, kind=kind, lengthscale=2.0), torch.randn(2, 5, 3)
    z = x @ module.omega.T + (0 if module.bias is None else module.bias)
    scale = {"sin": 1, "cos": math.sqrt(2 / 7), "cos_sin": 1 / math.sqrt(7)}[kind]
    blocks = {"sin": [z.sin()], "cos": [z.cos()], "cos_sin": [z.cos(), z.sin()]}[kind]
    y = module(x, backend=backend)
    assert y.shape == (2, 5, module.out_dim)
    torch.testing.assert_close(y, scale * torch.cat(blocks, -1), rtol=0, atol=1e-6)


def test_fixed_frequencies_are_buffers_and_learnable_ones_parameters() -> None:
    fixed, learnable = build(0, 3, 4, kind="cos"), build(0, 3, 4, kind="cos", learnable=True)
    assert list(fixed.parameters()) == []
    assert [name for name, _ in learnable.named_parameters()] == ["omega", "bias"]
    assert list(fixed.state_dict()) == list(learnable.state_dict()) == ["omega", "bias"]
    assert torch.equal(fixed.omega, learnable.omega)
    x = torch.randn(5, 3, requires_grad=True)
    fixed(x).sum().backward()
    assert x.grad is not None
    learnable(x).sum().backward()
    assert learnable.omega.grad.abs().max() > 0
    assert learnable.bias.grad.abs().max() > 0


def test_state_dict_round_trip_and_seed() -> None:
    first, second, x = build(1, 3, 4, kind="cos"), build(2, 3, 4, kind="cos"), torch.randn(5, 3)
    assert torch.equal(first(x), build(1, 3, 4, kind="cos")(x))
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_default_dtype(dtype: torch.dtype, orthogonal: bool) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        module = build(0, 3, 4, kind="cos", orthogonal=orthogonal)
        assert module.omega.dtype == module(torch.randn(2, 3)).dtype == dtype
    finally:
        torch.set_default_dtype(before)


def test_phases() -> None:
    phases = build(0, 3, 5000, kind="cos").bias
    assert isinstance(phases, Tensor)
    assert phases.min() >= 0
    assert phases.max() < 2 * math.pi
    assert phases.mean().item() == pytest.approx(math.pi, abs=0.1)
    assert build(0, 3, 4).bias is None
    assert build(0, 3, 4, kind="cos_sin").bias is None
    assert build(0, 3, 4, bias=True).bias is not None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"in_dim": 0}, ValueError, "in_dim: expected at least 1"),
        ({"features": 2.5}, TypeError, "features: expected an integer"),
        ({"kind": "tan"}, ValueError, "kind: expected one of sin, cos, cos_sin"),
        ({"lengthscale": 0}, ValueError, "lengthscale: expected more than 0"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nn.RandomFourierFeatures(**{"in_dim": 3, "features": 4, **change})


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \[..., 3\]"):
        build(0, 3, 4)(torch.randn(5, 2))
