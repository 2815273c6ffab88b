"""The CUDA kernel of random Fourier features, against the reference in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import assert_error_at_most_twice_eager, load_golden
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffcore import ops
from diffcore.ops.rff_features import native

KINDS = ["sin", "cos", "cos_sin"]


def draw(batch: int, in_dim: int, features: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, in_dim), torch.randn(features, in_dim), torch.randn(features)


def with_gradients(
    inputs: tuple[Tensor, Tensor, Tensor],
    grad_y: Tensor,
    backend: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: object,
) -> list[Tensor]:
    """[y, gradients of x, omega and bias], on the CPU."""
    leaves = [t.detach().to(device, dtype).requires_grad_() for t in inputs]
    y = ops.rff_features(*leaves, backend=backend, **options)
    results = [y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(device, dtype))]
    return [t.cpu() for t in results]


@pytest.mark.parametrize("kind", KINDS)
def test_error_at_most_twice_eager(cuda: str, kind: str) -> None:
    inputs, width = draw(300, 37, 1100), 2200 if kind == "cos_sin" else 1100
    grad_y = torch.randn(300, width)
    results = [
        with_gradients(inputs, grad_y, backend, dtype, device, kind=kind, scale=0.3)
        for backend, dtype, device in (
            ("cuda", torch.float32, cuda),
            ("reference", torch.float32, "cpu"),
            ("reference", torch.float64, "cpu"),
        )
    ]
    for ours, eager, exact in zip(*results, strict=True):
        assert_error_at_most_twice_eager(ours, eager, exact)


@given(
    kind=st.sampled_from(KINDS),
    batch=st.sampled_from([1, 3, 33, 64, 65, 130]),
    in_dim=st.sampled_from([1, 4, 7, 16, 17, 33, 64, 65]),
    features=st.sampled_from([1, 4, 7, 33, 64, 65]),
    phases=st.booleans(),
)
def test_awkward_sizes(
    cuda: str, lanes: str, kind: str, batch: int, in_dim: int, features: int, phases: bool
) -> None:
    x, omega, bias = draw(batch, in_dim, features)
    if not phases:
        bias = torch.zeros_like(bias)
    grad_y = torch.randn(batch, features * (2 if kind == "cos_sin" else 1))
    ours = with_gradients((x, omega, bias), grad_y, "cuda", device=cuda, kind=kind)
    exact = with_gradients((x, omega, bias), grad_y, "reference", torch.float64, kind=kind)
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item())
    if not phases:
        y = ops.rff_features(x.to(cuda), omega.to(cuda), kind=kind, backend="cuda")
        assert torch.equal(y.cpu(), ours[0])


@pytest.mark.parametrize("kind", ["sin", "cos_sin"])
def test_batches_summed_in_pieces(cuda: str, kind: str) -> None:
    """Parameter gradients of more rows than one block sums: the same bits at every call."""
    inputs, width = draw(2500, 5, 33), 66 if kind == "cos_sin" else 33
    grad_y = torch.randn(2500, width)
    ours, again = (with_gradients(inputs, grad_y, "cuda", device=cuda, kind=kind) for _ in range(2))
    exact = with_gradients(inputs, grad_y, "reference", torch.float64, kind=kind)
    for a, b, c in zip(ours, exact, again, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max() + 1e-6
        assert torch.equal(a, c)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(6, 5, 0), (6, 0, 5), (1500, 0, 5), (6, 0, 0)], ids=str)
def test_nothing_to_multiply(cuda: str, kind: str, sizes: tuple[int, int, int]) -> None:
    """No features, or no inputs, of which every phase has its gradient yet."""
    batch, _, features = sizes
    inputs = draw(*sizes)
    grad_y = torch.randn(batch, features * (2 if kind == "cos_sin" else 1))
    ours = with_gradients(inputs, grad_y, "cuda", device=cuda, kind=kind)
    exact = with_gradients(inputs, grad_y, "reference", torch.float64, kind=kind)
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)
    x, *parameters = (t.to(cuda) for t in inputs)
    y = ops.rff_features(x.requires_grad_(), *parameters, kind=kind, backend="cuda")
    (grad_x,) = torch.autograd.grad(y, x, grad_y.to(cuda))
    assert torch.equal(grad_x.cpu(), ours[1])


def test_sine_and_cosine_are_within_one_ulp(cuda: str) -> None:
    """Of any argument, on both sides of 12,867, where another range reduction begins."""
    near = torch.linspace(-13_000, 13_000, 100_000)
    quarters = (torch.arange(-6366, 6367).double() * (torch.pi / 2)).float()
    huge = torch.logspace(4.1, 38.5, 20_000)
    tiny = torch.logspace(-44, 0, 1000)
    z = torch.cat([near, quarters, tiny, -tiny, torch.zeros(1), huge, -huge])[:, None]
    ones = torch.ones(1, 1, device=cuda)
    y = ops.rff_features(z.to(cuda), ones, kind="cos_sin", backend="cuda").cpu()
    for ours, exact in zip(y.T, (z.double().cos(), z.double().sin()), strict=True):
        wanted = exact[:, 0]
        ulp = torch.from_numpy(np.spacing(wanted.float().abs().numpy())).double()
        assert ((ours - wanted).abs() <= ulp).all()


def test_infinite_and_nan_arguments(cuda: str) -> None:
    z = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0], device=cuda)[:, None]
    y = ops.rff_features(z, torch.ones(1, 1, device=cuda), kind="cos_sin", backend="cuda")
    assert y.isnan().all(1).tolist() == [True, True, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_no_other(cuda: str, lanes: str, kind: str) -> None:
    """A NaN stays in its row, and a row has the same bits in any batch."""
    x, omega, bias = draw(131, 23, 75)
    grad_y = torch.randn(131, 150 if kind == "cos_sin" else 75)
    options = {"backend": "cuda", "device": cuda, "kind": kind}
    whole = with_gradients((x, omega, bias), grad_y, **options)
    spoiled = x.clone()
    spoiled[5, 2] = float("nan")
    with_nan = with_gradients((spoiled, omega, bias), grad_y, **options)
    for row in (0, 4, 6, 130):
        one = slice(row, row + 1)
        alone = with_gradients((x[one], omega, bias), grad_y[one], **options)
        for i in (0, 1):
            assert torch.equal(alone[i][0], whole[i][row])
            assert torch.equal(with_nan[i][row], whole[i][row])
    assert with_nan[0][5].isnan().all()


def test_empty_batch_strides_and_wanted_gradients(cuda: str) -> None:
    x, omega, bias = (t.to(cuda) for t in draw(6, 5, 9))
    expected = ops.rff_features(x, omega, bias, backend="cuda")
    strided = (t.T.contiguous().T for t in (x, omega))
    assert torch.equal(ops.rff_features(*strided, bias, backend="cuda"), expected)
    assert ops.rff_features(x[:0], omega, bias, backend="cuda").shape == (0, 9)
    grad_y = torch.randn(6, 9)
    full = with_gradients((x, omega, bias), grad_y, "cuda", device=cuda)[1:]
    for i, wanted in enumerate(full):
        leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate((x, omega, bias))]
        y = ops.rff_features(*leaves, backend="cuda")
        (grad,) = torch.autograd.grad(y, leaves[i], grad_y.to(cuda))
        assert torch.equal(grad.cpu(), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(cuda: str, kind: str) -> None:
    x, omega, bias = (t.to(cuda) for t in draw(6, 5, 9))
    arguments = (x, omega, bias, kind, 0.5, True, "float32", "cuda")
    torch.library.opcheck(native.forward.overload, arguments)
    y, slope = native.forward(*arguments)
    saved = y if kind == "cos_sin" else slope
    wanted = (True, True, True, "float32", "cuda")
    arguments = (torch.randn_like(y), x, omega, saved, kind, *wanted)
    torch.library.opcheck(native.backward.overload, arguments)


def test_golden_critic(cuda: str) -> None:
    """Twin critics of Diff-SR's released code: sin here, then ELU and a linear layer."""
    g = load_golden("diffsr_rff_critic")
    x = g["x"].to(cuda).requires_grad_()
    layers = {
        f"l{i}_{kind}": g[f"critic__l{i}_{kind}"].to(cuda).requires_grad_()
        for i in range(1, 7)
        for kind in ("weight", "bias")
    }
    values = []
    for first in (1, 4):
        h = ops.rff_features(
            x, layers[f"l{first}_weight"], layers[f"l{first}_bias"], backend="cuda"
        )
        for i, activation in (
            (first + 1, torch.nn.functional.elu),
            (first + 2, torch.nn.Identity()),
        ):
            h = torch.nn.functional.linear(h, layers[f"l{i}_weight"], layers[f"l{i}_bias"])
            h = activation(h)
        values.append(h)
    q1, q2 = values
    torch.testing.assert_close(q1.cpu(), g["q1"], rtol=0, atol=1e-5)
    torch.testing.assert_close(q2.cpu(), g["q2"], rtol=0, atol=1e-5)
    (q1.square().sum() + q2.sum()).backward()
    torch.testing.assert_close(x.grad.cpu(), g["grad_x"], rtol=0, atol=1e-5)
    for name, parameter in layers.items():
        recorded = g[f"grad__{name}"]  # of large tensors the first rows only
        ours = parameter.grad[: len(recorded)].cpu()
        torch.testing.assert_close(ours, recorded, rtol=1e-5, atol=1e-5)
