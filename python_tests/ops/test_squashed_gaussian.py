"""A policy's sample in one call: values, gradients, and its place in PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import BATCHES, assert_error_at_most_twice_eager, root_mean_square
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffcore import explain, ops
from diffcore.ops import _native
from diffcore.ops.squashed_gaussian import native

KINDS = ["elu", "identity"]
needs_kernels = pytest.mark.skipif(_native._core is None, reason="needs the compiled module")


def make_parameters(widths: Sequence[int] = (5, 9, 4)) -> list[Tensor]:
    layers = [(torch.randn(o, i) / i**0.5, torch.randn(o)) for i, o in itertools.pairwise(widths)]
    return [parameter.requires_grad_() for layer in layers for parameter in layer]


def run(
    x: Tensor,
    parameters: list[Tensor],
    noise: Tensor,
    weights: tuple[Tensor, Tensor],
    kinds: list[str] = KINDS,
    **options: Any,
) -> list[Tensor]:
    """[action, log density, gradients of x and of all parameters]."""
    x = x.detach().requires_grad_()
    results = ops.squashed_gaussian(
        x, parameters[::2], parameters[1::2], kinds, noise, **options
    )
    value = sum((w * r).sum() for w, r in zip(weights, results, strict=True))
    return [*(r.detach() for r in results), *torch.autograd.grad(value, [x, *parameters])]


def draw(batch: int, inputs: int, actions: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """x, noise, and the weights of the results in what is differentiated."""
    weights = torch.randn(batch, actions), torch.randn(batch, 1)
    return torch.randn(batch, inputs), torch.randn(batch, actions), weights


def run_exactly(
    x: Tensor,
    parameters: list[Tensor],
    noise: Tensor,
    weights: tuple[Tensor, Tensor],
    kinds: list[str] = KINDS,
    **options: Any,
) -> list[Tensor]:
    doubled = [p.detach().double().requires_grad_() for p in parameters]
    a, b = weights
    weights = a.double(), b.double()
    return run(x.double(), doubled, noise.double(), weights, kinds, **options)


# -- right values ----------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("actions", [1, 6, 17])
def test_close_to_exact(isa: str, batch: int, actions: int) -> None:
    parameters = make_parameters((5, 9, 2 * actions))
    x, noise, weights = draw(batch, 5, actions)
    ours = run(x, parameters, noise, weights, backend="cpu")
    exact = run_exactly(x, parameters, noise, weights)
    for a, b in zip(ours, exact, strict=True):
        bound = 1e-5 * max([1.0, *b.abs().flatten().tolist()])
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=bound)


@needs_kernels
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_sizes(data: st.DataObject) -> None:
    sizes = st.integers(1, 70)
    depth, actions = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    widths = [*(data.draw(sizes) for _ in range(depth)), 2 * actions]
    kinds = [data.draw(st.sampled_from(_native.NATIVE_ACTIVATIONS)) for _ in range(depth)]
    low = data.draw(st.floats(-10, 1))
    bounds = low, low + data.draw(st.floats(0.01, 5))
    isa = data.draw(st.sampled_from(_native._core.available_isas()))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    x, noise, weights = draw(data.draw(sizes), widths[0], actions)
    parameters = make_parameters(widths)
    before = _native._core.isa()
    _native._core.use_isa(isa)
    arguments = (x, parameters, noise, weights, kinds)
    try:
        ours = run(*arguments, log_std_bounds=bounds, backend="cpu")
    finally:
        _native._core.use_isa(before)
    exact = run_exactly(*arguments, log_std_bounds=bounds)
    for a, b in zip(ours, exact, strict=True):
        bound = 1e-4 * max([1.0, *b.abs().flatten().tolist()])
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=bound)


def identity(width: int) -> list[Tensor]:
    """A layer that hands its input on, bit by bit: what follows is then all that rounds."""
    return [torch.eye(width).requires_grad_(), torch.zeros(width).requires_grad_()]


@needs_kernels
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_error_at_most_twice_eager(isa: str, scale: float) -> None:
    outputs, noise, weights = draw(2048, 12, 6)
    arguments = scale * outputs, identity(12), noise, weights, ["identity"]
    ours = run(*arguments, backend="cpu")
    eager = run(*arguments, backend="reference")
    for results in zip(ours[:3], eager[:3], run_exactly(*arguments)[:3], strict=True):
        assert_error_at_most_twice_eager(*results)


@needs_kernels
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_as_the_network_and_what_follows(
    isa: str, compute_dtype: torch.dtype
) -> None:
    parameters, (x, noise, weights) = make_parameters((17, 100, 12)), draw(70, 17, 6)
    layers = parameters[::2], parameters[1::2], KINDS
    options = {"compute_dtype": compute_dtype, "backend": "cpu"}
    ours = run(x, parameters, noise, weights, **options)
    leaf = x.clone().requires_grad_()
    outputs = ops.mlp(leaf, *layers, **options)
    *values, slope, _, _ = run(outputs, identity(12), noise, weights, ["identity"], backend="cpu")
    grads = torch.autograd.grad(outputs, [leaf, *parameters], slope)
    assert all(map(torch.equal, ours, [*values, *grads]))


@needs_kernels
def test_far_out(isa: str) -> None:
    """Where tanh is 1 its slope is 0, and the log density still grows with u."""
    u = torch.tensor([[-300.0], [-30.0], [-9.0], [0.0], [9.0], [30.0], [300.0]])
    weight, bias = torch.tensor([[1.0], [0.0]]).requires_grad_(), torch.zeros(2)
    weights = torch.ones(7, 1), torch.ones(7, 1)
    arguments = u, [weight, bias.requires_grad_()], torch.zeros(7, 1), weights, ["identity"]
    for a, b in zip(run(*arguments, backend="cpu"), run_exactly(*arguments), strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_nan_stays_nan(isa: str) -> None:
    parameters = make_parameters()
    x, noise, _ = draw(20, 5, 2)
    x[3, 1] = float("nan")
    action, log_prob = ops.squashed_gaussian(x, parameters[::2], parameters[1::2], KINDS, noise)
    assert action[3].isnan().all()
    assert log_prob.isnan().flatten().tolist() == [i == 3 for i in range(20)]


@needs_kernels
def test_bfloat16_is_that_of_the_network(isa: str) -> None:
    parameters, kinds = make_parameters((17, 100, 12)), KINDS
    x, noise, weights = draw(256, 17, 6)
    arguments = x, parameters, noise, weights, kinds
    ours = run(*arguments, compute_dtype=torch.bfloat16, backend="cpu")
    for a, b in zip(ours, run_exactly(*arguments), strict=True):
        assert root_mean_square(a - b) <= 0.02 * root_mean_square(b)
        assert root_mean_square(a - b) >= 1e-4 * root_mean_square(b)  # not float32 after all


@needs_kernels
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(
    isa: str, set_threads: Callable[[int], None], compute_dtype: torch.dtype
) -> None:
    parameters, (x, noise, weights) = make_parameters(), draw(301, 5, 2)
    results = []
    for threads in (1, 2, 2):
        set_threads(threads)
        results.append(run(x, parameters, noise, weights, compute_dtype=compute_dtype))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@needs_kernels
def test_a_row_does_not_know_its_batch(isa: str) -> None:
    parameters, (x, noise, _) = make_parameters(), draw(256, 5, 2)
    layers = parameters[::2], parameters[1::2], KINDS
    whole = ops.squashed_gaussian(x, *layers, noise, backend="cpu")
    for rows in (1, 7, 100):
        part = ops.squashed_gaussian(x[:rows], *layers, noise[:rows], backend="cpu")
        assert all(torch.equal(w[:rows], p) for w, p in zip(whole, part, strict=True))


def test_gradient_of_the_reference() -> None:
    parameters = [p.detach().double().requires_grad_() for p in make_parameters()]
    x, noise = torch.randn(3, 5).double().requires_grad_(), torch.randn(3, 2).double()

    def sample(x: Tensor, noise: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return ops.squashed_gaussian(x, parameters[::2], parameters[1::2], KINDS, noise)

    inputs = (x, noise.requires_grad_(), *parameters)
    assert torch.autograd.gradcheck(sample, inputs)
    assert torch.autograd.gradgradcheck(sample, inputs)


# -- as a part of PyTorch --------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("result", [0, 1])
@pytest.mark.parametrize("wants_x", [False, True])
@pytest.mark.parametrize("wants_parameters", [False, True])
def test_only_wanted_gradients_of_one_result(
    result: int, wants_x: bool, wants_parameters: bool
) -> None:
    parameters, (x, noise, weights) = make_parameters(), draw(9, 5, 2)
    used = weights[result]
    alone = (used, torch.zeros(9, 1)) if result == 0 else (torch.zeros(9, 2), used)
    expected = run(x, parameters, noise, alone)
    x = x.requires_grad_(wants_x)
    for parameter in parameters:
        parameter.requires_grad_(wants_parameters)
    outputs = ops.squashed_gaussian(x, parameters[::2], parameters[1::2], KINDS, noise)
    assert all(torch.equal(o.detach(), e) for o, e in zip(outputs, expected[:2], strict=True))
    assert outputs[result].requires_grad == (wants_x or wants_parameters)
    if outputs[result].requires_grad:
        (used * outputs[result]).sum().backward()
    wanted = [wants_x, *[wants_parameters] * len(parameters)]
    for tensor, want, gradient in zip([x, *parameters], wanted, expected[2:], strict=True):
        if want:
            assert torch.equal(tensor.grad, gradient)
        else:
            assert tensor.grad is None


@needs_kernels
def test_gradients_of_sums() -> None:
    """Which come as one number, expanded."""
    parameters, (x, noise, _) = make_parameters(), draw(9, 5, 2)
    *_, expected = run(x, parameters, noise, (torch.ones(9, 2), torch.ones(9, 1)))
    results = ops.squashed_gaussian(x, parameters[::2], parameters[1::2], KINDS, noise)
    (gradient,) = torch.autograd.grad(sum(r.sum() for r in results), parameters[-1])
    assert torch.equal(gradient, expected)


@needs_kernels
def test_second_derivative_is_refused() -> None:
    parameters, (x, noise, _) = make_parameters(), draw(9, 5, 2)
    action, _ = ops.squashed_gaussian(x, parameters[::2], parameters[1::2], KINDS, noise)
    (slope,) = torch.autograd.grad(action.sum(), parameters[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*backend='reference'"):
        slope.sum().backward()


@needs_kernels
def test_torch_func() -> None:
    parameters, (x, noise, weights) = make_parameters(), draw(9, 5, 2)
    expected = run(x, parameters, noise, weights)

    def value(
        parameters: list[Tensor], x: Tensor, noise: Tensor, a: Tensor, b: Tensor
    ) -> Tensor:
        layers = parameters[::2], parameters[1::2], KINDS
        action, log_prob = ops.squashed_gaussian(x, *layers, noise)
        return (a * action).sum() + (b * log_prob).sum()

    detached = [p.detach() for p in parameters]
    gradients = torch.func.grad(value)(detached, x, noise, *weights)
    assert all(map(torch.equal, gradients, expected[3:]))

    def of_one_row(parameters: list[Tensor], *row: Tensor) -> Tensor:
        return value(parameters, *(t[None] for t in row))

    in_dims = (None, 0, 0, 0, 0)
    per_row = torch.func.vmap(torch.func.grad(of_one_row), in_dims)(detached, x, noise, *weights)
    for gradient, whole in zip(per_row, expected[3:], strict=True):
        assert torch.allclose(gradient.sum(0), whole, atol=1e-5)


@needs_kernels
def test_compiles_without_a_graph_break() -> None:
    parameters, (x, noise, _) = make_parameters(), draw(9, 5, 2)

    def total(x: Tensor) -> Tensor:
        layers = parameters[::2], parameters[1::2], KINDS
        action, log_prob = ops.squashed_gaussian(x, *layers, noise, backend="cpu")
        return action.sum() - log_prob.sum()

    ours = torch.autograd.grad(torch.compile(total, fullgraph=True)(x), parameters)
    assert all(map(torch.equal, ours, torch.autograd.grad(total(x), parameters)))


@needs_kernels
def test_autocast_hands_over_in_float32() -> None:
    parameters, (x, noise, _) = make_parameters(), draw(9, 5, 2)
    layers = parameters[::2], parameters[1::2], KINDS
    with torch.autocast("cpu", torch.bfloat16):
        action, _ = ops.squashed_gaussian(x.bfloat16(), *layers, noise)
    assert torch.equal(action, ops.squashed_gaussian(x.bfloat16().float(), *layers, noise)[0])


@needs_kernels
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_opcheck(precision: str) -> None:
    parameters, (x, noise, weights) = [p.detach() for p in make_parameters()], draw(9, 5, 2)
    for keep in (False, True):
        arguments = (x, noise, parameters, keep, "elu,identity", -5.0, 2.0, precision)
        torch.library.opcheck(native.forward.overload, arguments)
    action, _, saved = native.forward(*arguments)
    for grads in (weights, (None, weights[1])):
        settings = (parameters, "elu,identity", True, True, precision)
        torch.library.opcheck(native.backward.overload, (*grads, x, action, saved, *settings))


@needs_kernels
def test_what_the_kernel_can_not_take() -> None:
    parameters, (x, noise, _) = make_parameters(), draw(9, 5, 2)
    arguments = x, parameters[::2], parameters[1::2], KINDS, noise.requires_grad_()
    answer = explain("squashed_gaussian", *arguments)
    assert answer.backend == "reference"
    assert answer.passed_over["cpu"].startswith("noise requires a gradient")
    ops.squashed_gaussian(*arguments)[0].sum().backward()
    assert noise.grad is not None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": "x"}, TypeError, "^x: expected a tensor, got str"),
        ({"x": torch.zeros(5)}, ValueError, r"^x: expected shape \[B, in\], got \[5\]"),
        ({"biases": []}, ValueError, "^biases: expected 2, one a layer, got 0"),
        ({"noise": torch.zeros(9, 3)}, ValueError, r"^noise: expected shape \[9, 2\], got \[9, 3\]"),
        ({"noise": torch.zeros(9, 2).double()}, TypeError, "^noise: expected torch.float32 like x"),
        ({"log_std_bounds": (2, 1)}, ValueError, r"^log_std_bounds\[1\]: expected more than 2"),
        ({"log_std_bounds": ("a", 1)}, TypeError, r"^log_std_bounds\[0\]: expected a number"),
        ({"compute_dtype": torch.float64}, ValueError, "^compute_dtype: expected None"),
        ({"backend": "gpu"}, ValueError, "^backend: expected one of cpu, reference"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    parameters = make_parameters()
    arguments = {
        "x": torch.randn(9, 5),
        "weights": parameters[::2],
        "biases": parameters[1::2],
        "activations": KINDS,
        "noise": torch.randn(9, 2),
    }
    with pytest.raises(error, match=message):
        ops.squashed_gaussian(**{**arguments, **change})  # type: ignore[arg-type]


def test_an_odd_number_of_outputs_is_named() -> None:
    parameters = make_parameters((5, 9, 3))
    with pytest.raises(ValueError, match=r"^weights\[-1\]: expected an even number"):
        ops.squashed_gaussian(
            torch.randn(9, 5), parameters[::2], parameters[1::2], KINDS, torch.randn(9, 1)
        )
