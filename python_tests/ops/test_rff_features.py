"""Random Fourier features against float64, with gradients, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_error_at_most_twice_eager, load_golden
from torch import Tensor

from diffcore import ops
from diffcore.ops.rff_features import native


def run(
    x: Tensor,
    omega: Tensor,
    bias: Tensor | None,
    backend: str,
    dtype: torch.dtype = torch.float32,
    *,
    kind: str = "sin",
    scale: float = 1.0,
) -> Tensor:
    """The features in a precision."""
    x, omega = x.to(dtype), omega.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return ops.rff_features(x, omega, bias, kind=kind, scale=scale, backend=backend)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kind", ["sin", "cos", "cos_sin"])
def test_reference_is_the_equation(kind: str, with_bias: bool) -> None:
    x, omega, bias = torch.randn(4, 3).double(), torch.randn(5, 3).double(), torch.randn(5).double()
    z = x @ omega.T + (bias if with_bias else 0)
    blocks = {"sin": [z.sin()], "cos": [z.cos()], "cos_sin": [z.cos(), z.sin()]}[kind]
    y = run(
        x, omega, bias if with_bias else None, "reference", torch.float64, kind=kind, scale=0.5
    )
    torch.testing.assert_close(y, 0.5 * torch.cat(blocks, 1))


KINDS = ["sin", "cos", "cos_sin"]


def draw(batch: int, in_dim: int, features: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, in_dim), torch.randn(features, in_dim), torch.randn(features)


def with_gradients(
    inputs: tuple[Tensor, Tensor, Tensor],
    grad_y: Tensor,
    backend: str,
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> list[Tensor]:
    """[y, gradients of x, omega and bias]."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    y = ops.rff_features(*leaves, backend=backend, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(dtype))]


@pytest.mark.parametrize("kind", KINDS)
def test_error_at_most_twice_eager(isa: str, kind: str) -> None:
    inputs, width = draw(300, 37, 1100), 2200 if kind == "cos_sin" else 1100
    grad_y = torch.randn(300, width)
    results = [
        with_gradients(inputs, grad_y, backend, dtype, kind=kind, scale=0.3)
        for backend, dtype in (
            ("cpu", torch.float32),
            ("reference", torch.float32),
            ("reference", torch.float64),
        )
    ]
    for ours, eager, exact in zip(*results, strict=True):
        assert_error_at_most_twice_eager(ours, eager, exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3, 7, 33, 65])
@pytest.mark.parametrize(("in_dim", "features"), [(1, 1), (7, 33), (33, 7), (16, 48), (5, 100)])
def test_awkward_sizes(isa: str, kind: str, batch: int, in_dim: int, features: int) -> None:
    inputs = draw(batch, in_dim, features)
    grad_y = torch.randn(batch, features * (2 if kind == "cos_sin" else 1))
    ours = with_gradients(inputs, grad_y, "cpu", kind=kind)
    exact = with_gradients(inputs, grad_y, "reference", torch.float64, kind=kind)
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item())


def test_sine_and_cosine_are_within_one_ulp(isa: str) -> None:
    """Of any argument: to 1e4 by range reduction, beyond in double precision."""
    near = torch.linspace(-1e4, 1e4, 400_000)
    quarters = (torch.arange(-6366, 6367).double() * (torch.pi / 2)).float()
    huge = torch.logspace(4, 38, 1000)
    tiny = torch.logspace(-44, 0, 1000)
    z = torch.cat([near, quarters, huge, -huge, tiny, -tiny, torch.zeros(1)])[:, None]
    y = ops.rff_features(z, torch.ones(1, 1), kind="cos_sin", backend="cpu")
    for ours, exact in zip(y.T, (z.double().cos(), z.double().sin()), strict=True):
        wanted = exact[:, 0]
        ulp = torch.from_numpy(np.spacing(wanted.float().abs().numpy())).double()
        assert ((ours - wanted).abs() <= ulp).all()


def test_infinite_and_nan_arguments(isa: str) -> None:
    z = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0])[:, None]
    y = ops.rff_features(z, torch.ones(1, 1), kind="cos_sin", backend="cpu")
    assert y.isnan().all(1).tolist() == [True, True, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_threads_batches_and_nan(
    isa: str, kind: str, set_threads: Callable[[int], None]
) -> None:
    """The same bits for any number of threads; a row depends on no other."""
    x, omega, bias = draw(131, 23, 75)
    grad_y = torch.randn(131, 150 if kind == "cos_sin" else 75)
    results = []
    for threads in (1, 2, 2):
        set_threads(threads)
        results.append(with_gradients((x, omega, bias), grad_y, "cpu", kind=kind))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    x[5, 2] = float("nan")
    with_nan = with_gradients((x, omega, bias), grad_y, "cpu", kind=kind)
    for row in (0, 4, 6, 130):
        alone = with_gradients(
            (x[row : row + 1], omega, bias), grad_y[row : row + 1], "cpu", kind=kind
        )
        for i in (0, 1):
            assert torch.equal(alone[i][0], results[0][i][row])
            assert torch.equal(with_nan[i][row], results[0][i][row])
    assert with_nan[0][5].isnan().all()


def test_empty_batch_strides_and_autocast() -> None:
    x, omega, bias = draw(6, 5, 9)
    expected = ops.rff_features(x, omega, bias)
    strided = (t.T.contiguous().T for t in (x, omega))
    assert torch.equal(ops.rff_features(*strided, bias), expected)
    for grad in with_gradients((x[:0], omega, bias), torch.empty(0, 9), "cpu")[2:]:
        assert torch.equal(grad, torch.zeros_like(grad))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.rff_features(x.bfloat16(), omega, bias, backend="cpu")
    assert torch.equal(y, ops.rff_features(x.bfloat16().float(), omega, bias))


def test_changed_frequencies_are_seen() -> None:
    x, omega, bias = draw(6, 5, 9)
    ops.rff_features(x, omega, bias)
    omega.numpy()[3, 2] += 1
    expected = ops.rff_features(x, omega, bias, backend="reference")
    torch.testing.assert_close(ops.rff_features(x, omega, bias), expected, rtol=0, atol=1e-5)


def test_only_wanted_gradients() -> None:
    inputs, grad_y = draw(6, 5, 9), torch.randn(6, 9)
    full = with_gradients(inputs, grad_y, "cpu")[1:]
    for i, expected in enumerate(full):
        leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate(inputs)]
        (grad,) = torch.autograd.grad(ops.rff_features(*leaves), leaves[i], grad_y)
        assert torch.equal(grad, expected)


def test_second_derivative() -> None:
    x, omega, bias = (t.double().requires_grad_() for t in draw(3, 2, 4))
    assert torch.autograd.gradcheck(ops.rff_features, (x, omega, bias))
    assert torch.autograd.gradgradcheck(ops.rff_features, (x, omega, bias))
    x = torch.randn(3, 2, requires_grad=True)
    y = ops.rff_features(x, omega.detach().float())
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*backend='reference'"):
        slope.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_torch_func_and_compile(kind: str) -> None:
    x, omega, bias = draw(6, 5, 9)

    def loss(x: Tensor, omega: Tensor, bias: Tensor) -> Tensor:
        return ops.rff_features(x, omega, bias, kind=kind, backend="cpu").square().sum()

    every = (0, 1, 2)
    whole = torch.func.grad(loss, argnums=every)(x, omega, bias)
    rows = torch.func.vmap(torch.func.grad(loss, argnums=every), in_dims=(0, None, None))(
        x, omega, bias
    )
    for i in every:
        total = rows[i] if i == 0 else rows[i].sum(0)
        torch.testing.assert_close(total, whole[i], rtol=1e-4, atol=1e-4)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in (x, omega, bias)]
    for grad, expected in zip(torch.autograd.grad(compiled(*leaves), leaves), whole, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    x, omega, bias = draw(6, 5, 9)
    settings = ("float32", "cpu")
    arguments = (x, omega, bias, kind, 0.5, True, *settings)
    torch.library.opcheck(native.forward.overload, arguments)
    y, slope = native.forward(*arguments)
    saved = y if kind == "cos_sin" else slope
    arguments = (torch.randn_like(y), x, omega, saved, kind, True, True, True, *settings)
    torch.library.opcheck(native.backward.overload, arguments)


@pytest.mark.parametrize("how", ["features and mlp", "mlp"])
def test_golden_critic(backend: str, how: str) -> None:
    """Twin critics of Diff-SR's released code: sin, ELU, linear."""
    g = load_golden("diffsr_rff_critic")
    x = g["x"].requires_grad_()
    layers = {
        k: g[f"critic__{k}"].requires_grad_()
        for i in range(1, 7)
        for k in (f"l{i}_weight", f"l{i}_bias")
    }
    values = []
    for first in (1, 4):
        weights = [layers[f"l{i}_weight"] for i in range(first, first + 3)]
        biases = [layers[f"l{i}_bias"] for i in range(first, first + 3)]
        if how == "mlp":
            q = ops.mlp(x, weights, biases, ["sin", "elu", "identity"], backend=backend)
        else:
            features = ops.rff_features(x, weights[0], biases[0], backend=backend)
            q = ops.mlp(features, weights[1:], biases[1:], ["elu", "identity"], backend=backend)
        values.append(q)
    q1, q2 = values
    torch.testing.assert_close(q1, g["q1"], rtol=0, atol=1e-5)
    torch.testing.assert_close(q2, g["q2"], rtol=0, atol=1e-5)
    (q1.square().sum() + q2.sum()).backward()
    torch.testing.assert_close(x.grad, g["grad_x"], rtol=0, atol=1e-5)
    for name, parameter in layers.items():
        recorded = g[f"grad__{name}"]  # of large tensors the first rows only
        torch.testing.assert_close(
            parameter.grad[: len(recorded)], recorded, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": "x"}, TypeError, "x: expected a tensor, got str"),
        ({"x": torch.randn(6, 4)}, ValueError, r"omega: expected shape \[features, 4\]"),
        ({"omega": torch.randn(9, 5).double()}, TypeError, "omega: expected torch.float32 like x"),
        ({"bias": torch.randn(8)}, ValueError, r"bias: expected shape \[9\], got \[8\]"),
        ({"kind": "tan"}, ValueError, "kind: expected one of sin, cos, cos_sin, got 'tan'"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of cpu, reference"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, omega, bias = draw(6, 5, 9)
    with pytest.raises(error, match=message):
        ops.rff_features(**{"x": x, "omega": omega, "bias": bias, **change})
