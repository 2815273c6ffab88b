"""Random Fourier features on the Triton kernels, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import load_golden, root_mean_square
from torch import Tensor

from diffcore import ops
from diffcore.ops.rff_features import KINDS, native

Inputs = tuple[Tensor, Tensor, Tensor]


def draw(batch: int, in_dim: int, features: int) -> Inputs:
    """x, omega and bias, with arguments of order 3."""
    omega = 3 * torch.randn(features, in_dim) / in_dim**0.5
    return torch.randn(batch, in_dim), omega, 6.3 * torch.rand(features)


def run(
    inputs: Inputs,
    grad_y: Tensor,
    backend: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    kind: str = "sin",
) -> list[Tensor]:
    """[y, gradients of x, omega and bias], everything computed in `dtype`."""
    leaves = [t.detach().to(device, dtype).requires_grad_() for t in inputs]
    y = ops.rff_features(*leaves, kind=kind, scale=0.3, backend=backend)
    grads = torch.autograd.grad(y, leaves, grad_y.to(device, dtype))
    return [t.detach().cpu() for t in (y, *grads)]


def width(features: int, kind: str) -> int:
    return 2 * features if kind == "cos_sin" else features


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch", "in_dim", "features"), [(0, 3, 5), (1, 1, 1), (33, 7, 70), (7, 33, 16)]
)
def test_awkward_sizes(device: str, kind: str, batch: int, in_dim: int, features: int) -> None:
    inputs = draw(batch, in_dim, features)
    grad_y = torch.randn(batch, width(features, kind))
    ours = run(inputs, grad_y, "triton", device, kind=kind)
    exact = run(inputs, grad_y, "reference", dtype=torch.float64, kind=kind)
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape
        if a.numel():
            assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item())


def test_sine_and_cosine_are_within_one_ulp(device: str) -> None:
    """Of any argument: to 1e4 by parts of pi / 2, beyond by as many bits as it takes."""
    powers = 2.0 ** torch.arange(-16, 16)[:, None]  # products with them are exact
    quarters = torch.arange(-199, 200, 2).double() * (torch.pi / 2)
    magnitudes = torch.logspace(-38, 33, 100)
    omega = torch.cat([torch.linspace(-3, 3, 240), quarters.float(), magnitudes, -magnitudes])
    arguments = (powers * omega).double()
    y = ops.rff_features(
        powers.to(device), omega[:, None].to(device), kind="cos_sin", backend="triton"
    )
    results = zip(y.cpu().chunk(2, dim=1), (arguments.cos(), arguments.sin()), strict=True)
    for ours, wanted in results:
        ulp = torch.from_numpy(np.spacing(wanted.float().abs().numpy())).double()
        # Below the normal numbers a GPU may give 0 for a sum.
        assert ((ours - wanted).abs() <= ulp.clamp(min=1.2e-38)).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy in the interpreter
def test_infinite_and_nan_arguments(device: str) -> None:
    z = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0], device=device)[:, None]
    omega = torch.ones(1, 1, device=device)
    y = ops.rff_features(z, omega, kind="cos_sin", backend="triton")
    assert y.isnan().all(1).tolist() == [True, True, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_row(device: str, kind: str) -> None:
    x, omega, bias = draw(9, 5, 20)
    x[5, 2] = float("nan")
    grad_y = torch.ones(9, width(20, kind))
    y, grad_x, *_ = run((x, omega, bias), grad_y, "triton", device, kind=kind)
    for result in (y, grad_x):
        assert result.isnan().any(1).tolist() == [i == 5 for i in range(9)]


def test_float16_is_within_a_percent(device: str) -> None:
    x, omega, bias = (t.to(device) for t in draw(40, 20, 70))
    omega = omega / 3
    y, slope = native.forward(x, omega, bias, "sin", 1.0, True, "float16", "triton")
    grad_y = torch.randn(40, 70, device=device)
    wanted = (True, True, True)
    grads = native.backward(grad_y, x, omega, slope, "sin", *wanted, "float16", "triton")
    leaves = [t.double().requires_grad_() for t in (x, omega, bias)]
    exact = ops.rff_features(*leaves, backend="reference")
    expected = torch.autograd.grad(exact, leaves, grad_y.double())
    for a, b in zip((y, *grads), (exact, *expected), strict=True):
        assert root_mean_square((a - b).cpu()) <= 0.01 * root_mean_square(b.cpu())


def test_without_phases_and_only_wanted_gradients(device: str) -> None:
    inputs, grad_y = draw(6, 5, 9), torch.randn(6, 9)
    x, omega, _ = inputs
    without = ops.rff_features(x.to(device), omega.to(device), backend="triton")
    exact = ops.rff_features(x.double(), omega.double(), backend="reference")
    assert (without.cpu() - exact).abs().max() <= 1e-6
    full = run(inputs, grad_y, "triton", device)[1:]
    for i, expected in enumerate(full):
        leaves = [t.to(device).requires_grad_(i == j) for j, t in enumerate(inputs)]
        y = ops.rff_features(*leaves, scale=0.3, backend="triton")
        (grad,) = torch.autograd.grad(y, leaves[i], grad_y.to(device))
        assert torch.equal(grad.cpu(), expected)


def test_strides_and_repeats(device: str) -> None:
    x, omega, bias = (t.to(device) for t in draw(6, 5, 9))
    expected = ops.rff_features(x, omega, bias, backend="triton")
    strided = [t.t().contiguous().t() for t in (x, omega)]
    assert torch.equal(ops.rff_features(*strided, bias, backend="triton"), expected)


def test_golden_critic(device: str) -> None:
    """Twin critics of Diff-SR's released code: sin features, then ELU, linear."""
    g = load_golden("diffsr_rff_critic")
    x = g["x"].to(device)
    for first, name in ((1, "q1"), (4, "q2")):
        layers = [
            (g[f"critic__l{i}_weight"].to(device), g[f"critic__l{i}_bias"].to(device))
            for i in range(first, first + 3)
        ]
        weights, biases = zip(*layers, strict=True)
        features = ops.rff_features(x, weights[0], biases[0], backend="triton")
        q = ops.mlp(features, weights[1:], biases[1:], ["elu", "identity"], backend="triton")
        torch.testing.assert_close(q.cpu(), g[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["sin", "cos_sin"])
def test_opcheck(device: str, kind: str) -> None:
    x, omega, bias = (t.to(device) for t in draw(6, 5, 9))
    arguments = (x, omega, bias, kind, 0.5, True, "float32", "triton")
    torch.library.opcheck(native.forward.overload, arguments)
    y, slope = native.forward(*arguments)
    saved = y if kind == "cos_sin" else slope
    wanted = (True, True, True)
    settings = (kind, *wanted, "float32", "triton")
    torch.library.opcheck(
        native.backward.overload, (torch.randn_like(y), x, omega, saved, *settings)
    )
