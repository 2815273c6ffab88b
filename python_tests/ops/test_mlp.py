"""The fused MLP: forward, and backward for input, weights and biases."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    AMX_EDGES,
    BATCHES,
    assert_error_at_most_twice_eager,
    quantile,
    root_mean_square,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffcore import explain, nn, ops
from diffcore.ops import _activations, _backends, _native
from diffcore.ops.mlp import native

Layers = tuple[list[Tensor], list[Tensor], list[str]]
PRECISIONS = [torch.float32, torch.bfloat16]


def make_layers(
    widths: list[int], activation: str = "mish", dtype: torch.dtype = torch.float32
) -> Layers:
    """Weights, biases and activations of an MLP with a linear output."""
    pairs = list(itertools.pairwise(widths))
    weights = [torch.randn(o, i, dtype=dtype) / i**0.5 for i, o in pairs]
    biases = [0.1 * torch.randn(o, dtype=dtype) for _, o in pairs]
    return weights, biases, [activation] * (len(pairs) - 1) + ["identity"]


def run(
    x: Tensor,
    layers: Layers,
    grad_y: Tensor,
    backend: str,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """[y, gradient of x, gradients of weights, of biases], everything computed in `dtype`."""
    weights, biases, activations = layers
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *weights, *biases)]
    x, weights, biases = leaves[0], leaves[1 : 1 + len(weights)], leaves[1 + len(weights) :]
    y = ops.mlp(x, weights, biases, activations, compute_dtype=compute_dtype, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(dtype))]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_at_most_twice_eager(isa: str, activation: str) -> None:
    layers = make_layers([23, 100, 100, 65], activation)
    x, grad_y = torch.randn(300, 23), torch.randn(300, 65)
    ours = run(x, layers, grad_y, "cpu")
    eager = run(x, layers, grad_y, "reference")
    exact = run(x, layers, grad_y, "reference", torch.float64)
    for a, b, c in zip(ours, eager, exact, strict=True):
        if c.numel() >= 1000:
            assert_error_at_most_twice_eager(a, b, c)
        else:  # biases: too few values for statistics, so the largest error against a known bound
            assert (a - c).abs().max() <= 1e-6 * max(1.0, c.abs().max().item())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_at_most_twice_eager_in_long_sums(isa: str, activation: str) -> None:
    """Into few outputs too: eager PyTorch sums those in four parts, with half the error."""
    sizes = ((64, 8), (100, 33), (256, 1), (256, 8), (512, 6), (512, 40), (1024, 40))
    for hidden, outputs in sizes:
        for seed in range(3):
            torch.manual_seed(seed)
            layers = make_layers([17, hidden, hidden, outputs], activation)
            x = torch.randn(max(256, 1024 // outputs), 17)
            ours = ops.mlp(x, *layers, backend="cpu")
            eager = ops.mlp(x, *layers, backend="reference")
            weights, biases = ([p.double() for p in group] for group in layers[:2])
            exact = ops.mlp(x.double(), weights, biases, layers[2], backend="reference")
            assert_error_at_most_twice_eager(ours, eager, exact)


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_value_is_the_same_where_a_gradient_will_be_taken(
    isa: str, activation: str, compute_dtype: torch.dtype
) -> None:
    layers = make_layers([5, 40, 33], activation)
    x = 3 * torch.randn(100, 5)
    alone = ops.mlp(x, *layers, compute_dtype=compute_dtype, backend="cpu")
    kept = ops.mlp(x.requires_grad_(), *layers, compute_dtype=compute_dtype, backend="cpu")
    assert kept.requires_grad
    assert torch.equal(kept, alone)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_at_zero_and_far_out(isa: str, activation: str) -> None:
    """Relu's at its kink is 0, as torch has it; nothing grows where the value is a constant."""
    x = torch.tensor([0.0, -0.0, 1e3, -1e3, 1e38, -1e38])[:, None]
    layers = ([torch.ones(1, 1)], [torch.zeros(1)], [activation])
    y, slope, *_ = run(x, layers, torch.ones_like(x), "cpu")
    exact = x.double().requires_grad_()
    expected = ACTIVATIONS[activation](exact)
    torch.testing.assert_close(y.double(), expected.detach(), rtol=1e-6, atol=1e-30)
    (expected_slope,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(slope.double(), expected_slope, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7, 12, 13, 63, 64, 65, 130, 257, 600])
@pytest.mark.parametrize(
    "widths", [[1, 1, 1], [4, 3, 2], [17, 31, 33, 1], [5, 16, 32, 48], [376, 40, 9], [7, 3]]
)
def test_awkward_sizes(isa: str, batch: int, widths: list[int]) -> None:
    layers = make_layers(widths)
    x, grad_y = torch.randn(batch, widths[0]), torch.randn(batch, widths[-1])
    ours = run(x, layers, grad_y, "cpu")
    exact = run(x, layers, grad_y, "reference", torch.float64)
    for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
        assert a.shape == b.shape
        # What is rounded are the partial sums: of order 1 for y and the input's gradient, of order
        # sqrt(batch) for the parameters', which sum over the batch and may cancel.
        partial_sums = 1.0 if i < 2 else batch**0.5
        assert (a - b).abs().max() <= 2e-6 * max(partial_sums, b.abs().max().item())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16_is_within_its_bound(isa: str, activation: str) -> None:
    layers = make_layers([23, 100, 256, 65], activation)
    x, grad_y = torch.randn(300, 23), torch.randn(300, 65)
    ours = run(x, layers, grad_y, "cpu", compute_dtype=torch.bfloat16)
    exact = run(x, layers, grad_y, "reference", torch.float64)
    for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
        # Rounding takes some of relu's arguments to the other side of 0, where the slope is another.
        bound = 0.15 if activation == "relu" and i > 0 else 0.01
        assert root_mean_square(a - b) <= bound * root_mean_square(b)
    # It isn't float32 after all.
    assert root_mean_square(ours[2] - exact[2]) >= 1e-3 * root_mean_square(exact[2])


@pytest.mark.parametrize("batch", [b for b in BATCHES if b] + [257, 600])
@pytest.mark.parametrize(
    "widths",
    [[1, 1, 1], [17, 31, 33, 1], [7, 3], [376, 41, 9], *([n, n + 1, n] for n in AMX_EDGES)],
)
def test_awkward_sizes_in_bfloat16(isa: str, batch: int, widths: list[int]) -> None:
    layers = make_layers(widths)
    x, grad_y = torch.randn(batch, widths[0]), torch.randn(batch, widths[-1])
    ours = run(x, layers, grad_y, "cpu", compute_dtype=torch.bfloat16)
    exact = run(x, layers, grad_y, "reference", torch.float64)
    for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
        assert a.shape == b.shape
        # See test_awkward_sizes.
        partial_sums = 1.0 if i < 2 else batch**0.5
        assert (a - b).abs().max() <= 0.03 * max(partial_sums, b.abs().max().item())


def test_bfloat16_rounds_like_torch(isa: str) -> None:
    """x on the way in and grad_y on the way back; every value passes through one product."""
    between = 1 + torch.arange(1, 64, 2) / 256  # of two neighbours, of which the even one is taken
    values = torch.cat([torch.randn(500) * 10.0**e for e in range(-30, 30, 6)] + [between, -between])
    values, weight, bias = values[:, None], torch.ones(1, 1), torch.zeros(1)
    y, grad_x, *_ = run(
        values, ([weight], [bias], ["identity"]), values, "cpu", compute_dtype=torch.bfloat16
    )
    for result in (y, grad_x):
        assert torch.equal(result, values.bfloat16().float())
    as_weights = ([values], [torch.zeros(len(values))], ["identity"])
    y, *_ = run(weight, as_weights, values.T, "cpu", compute_dtype=torch.bfloat16)
    assert torch.equal(y, values.bfloat16().float().T)
    quiet, signalling = 0x7FC00000, 0x7F800001  # of which the upper half alone is infinity
    nans = torch.tensor([quiet, signalling, quiet - 2**31], dtype=torch.int32).view(torch.float32)
    y = ops.mlp(nans[:, None], [weight], [bias], ["identity"], compute_dtype=torch.bfloat16)
    assert y.isnan().all()


def test_float16_has_no_kernel() -> None:
    layers = make_layers([4, 8, 3])
    answer = explain("mlp", torch.randn(5, 4), *layers, compute_dtype=torch.float16)
    assert answer.backend == "reference"
    assert answer.passed_over["cpu"] == "compute_dtype torch.float16 has no CPU kernel"


def test_sixteen_layers_run_on_the_kernels_and_seventeen_on_the_reference() -> None:
    for depth, backend in ((16, "cpu"), (17, "reference")):
        layers = make_layers([4] * (depth + 1), "tanh")
        x = torch.randn(3, 4)
        assert ops.mlp(x, *layers).shape == (3, 4)
        assert explain("mlp", x, *layers).backend == backend


def test_activations_without_a_kernel_run_on_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_native, "NATIVE_ACTIVATIONS", ("identity", "relu"))
    monkeypatch.setattr(_backends, "may_go_straight", lambda *_: False)  # the kernels know them all
    layers = make_layers([3, 5, 2], "gelu")
    x = torch.randn(4, 3)
    assert torch.equal(ops.mlp(x, *layers), ops.mlp(x, *layers, backend="reference"))
    with pytest.raises(ValueError, match="backend.*'gelu' has no CPU kernel"):
        ops.mlp(x, *layers, backend="cpu")


def test_every_activation_has_a_kernel() -> None:
    assert set(_native.NATIVE_ACTIVATIONS) == set(_activations.ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
def test_same_bits_for_any_number_of_threads_and_on_repeat(
    isa: str, set_threads: Callable[[int], None], compute_dtype: torch.dtype
) -> None:
    layers = make_layers([23, 100, 70, 5])
    x, grad_y = torch.randn(301, 23), torch.randn(301, 5)
    results = []
    for threads in (1, 2, 2, 3):
        set_threads(threads)
        results.append(run(x, layers, grad_y, "cpu", compute_dtype=compute_dtype))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
def test_a_row_does_not_depend_on_its_batch(isa: str, compute_dtype: torch.dtype) -> None:
    layers = make_layers([23, 100, 70, 5])
    x, grad_y = torch.randn(256, 23), torch.randn(256, 5)
    y, grad_x = run(x, layers, grad_y, "cpu", compute_dtype=compute_dtype)[:2]
    for first, count in ((0, 1), (1, 1), (100, 1), (255, 1), (40, 2), (101, 33)):
        rows = slice(first, first + count)
        alone = run(x[rows], layers, grad_y[rows], "cpu", compute_dtype=compute_dtype)
        assert torch.equal(alone[0], y[rows])
        assert torch.equal(alone[1], grad_x[rows])


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
def test_nan_stays_in_its_row(isa: str, compute_dtype: torch.dtype) -> None:
    for activation in ACTIVATIONS:
        layers = make_layers([4, 21, 70, 3], activation)
        x = torch.randn(9, 4)
        x[5, 2] = float("nan")
        y, grad_x = run(x, layers, torch.ones(9, 3), "cpu", compute_dtype=compute_dtype)[:2]
        rows = torch.isnan(y).any(1)
        assert rows.tolist() == [i == 5 for i in range(9)]
        assert not torch.isnan(grad_x[~rows]).any()


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
@pytest.mark.parametrize("width", [21, 32, 33])
def test_infinity_is_a_number_like_others(isa: str, width: int, compute_dtype: torch.dtype) -> None:
    """What tanh makes of it is finite, whatever stands past the end of a layer's rows."""
    layers = make_layers([4, width, width, 3], "tanh")
    x = torch.randn(9, 4)
    x[5, 2] = float("inf")
    y, grad_x, *grads = run(x, layers, torch.ones(9, 3), "cpu", compute_dtype=compute_dtype)
    expected = run(x, layers, torch.ones(9, 3), "reference")
    tolerance = 1e-5 if compute_dtype is torch.float32 else 0.05
    torch.testing.assert_close(y, expected[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(grad_x[5], expected[1][5], rtol=0, atol=tolerance)
    for ours, theirs in zip(grads, expected[2:], strict=True):
        assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs))


# Around where a sum's last products are taken row by row, and where it is cut into chunks.
DEPTHS = [*range(1, 9), *range(60, 71), *range(252, 264), *range(508, 518)]


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
@pytest.mark.parametrize("out", [6, 40, 64])
def test_sums_of_any_depth_are_exact_where_numbers_are_small_integers(
    isa: str, out: int, compute_dtype: torch.dtype
) -> None:
    for depth in DEPTHS:
        for rows in (1, 3, 11, 12, 25):
            x, weight, bias = (
                torch.randint(-3, 4, shape).float() for shape in ((rows, depth), (out, depth), (out,))
            )
            y = ops.mlp(x, [weight], [bias], ["identity"], compute_dtype=compute_dtype, backend="cpu")
            assert torch.equal(y, x @ weight.T + bias), (depth, rows)


@given(
    batch=st.integers(1, 14),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 17),
    compute_dtype=st.sampled_from(PRECISIONS),
)
def test_few_outputs(
    isa: str, batch: int, inputs: int, outputs: int, compute_dtype: torch.dtype
) -> None:
    """There weights lie in groups, and the rows end anywhere in one: what lies behind isn't read."""
    [weight], [bias], _ = make_layers([inputs, outputs])
    x = torch.randn(batch, inputs)

    def layer(x: Tensor, **settings: Any) -> Tensor:
        return ops.mlp(x, [weight], [bias], ["identity"], **settings)

    y = layer(x, compute_dtype=compute_dtype, backend="cpu")
    bits = (lambda t: t) if compute_dtype is torch.float32 else (lambda t: t.bfloat16())
    rounded = [bits(t).double() for t in (x, weight)]
    exact = rounded[0] @ rounded[1].T + bias.double()
    assert (y - exact).abs().max() <= 2e-6 * max(1.0, exact.abs().max().item())
    poisoned = x.clone()
    poisoned[batch // 2 :] = float("nan")
    again = layer(poisoned, compute_dtype=compute_dtype, backend="cpu")
    assert torch.equal(again[: batch // 2], y[: batch // 2])
    assert again[batch // 2 :].isnan().all()


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
def test_a_layer_without_inputs_is_its_bias(isa: str, compute_dtype: torch.dtype) -> None:
    layers = make_layers([0, 3])
    y, _, _, grad_bias = run(
        torch.empty(5, 0), layers, torch.ones(5, 3), "cpu", compute_dtype=compute_dtype
    )
    assert torch.equal(y, layers[1][0].detach().expand(5, 3))
    assert torch.equal(grad_bias, torch.full((3,), 5.0))


@given(
    batch=st.integers(0, 20),
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    activation=st.sampled_from(list(ACTIVATIONS)),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e4, 1e30]),
    transposed=st.booleans(),
    compute_dtype=st.sampled_from(PRECISIONS),
)
def test_any_shape_stride_and_magnitude(
    batch: int,
    widths: list[int],
    activation: str,
    scale: float,
    transposed: bool,
    compute_dtype: torch.dtype,
) -> None:
    weights, biases, activations = make_layers(widths, activation)
    x = scale * torch.randn(batch, widths[0])
    if transposed:
        x = x.T.contiguous().T
        weights = [w.T.contiguous().T for w in weights]
    layers = (weights, biases, activations)
    y = ops.mlp(x, *layers, compute_dtype=compute_dtype, backend="cpu")
    exact = ops.mlp(
        x.double(), [w.double() for w in weights], [b.double() for b in biases], activations
    )
    assert y.shape == (batch, widths[-1])
    assert torch.isfinite(y).all()
    wave = activation in ("sin", "cos") and len(widths) > 2 and scale > 1.0
    if wave and compute_dtype is torch.bfloat16:
        # A sine doesn't care how small its argument's error is beside the argument, but it is a sine.
        most = weights[-1].abs().sum(1) + biases[-1].abs()
        assert (y.abs() <= 1.02 * most).all()
        return
    # Relative to the size that values have on their way, layer by layer.
    size = max([scale * 5.0, 1.0]) * 3.0 ** len(widths)
    bound = 1e-5 if compute_dtype is torch.float32 else 0.02
    assert ((y - exact).abs() <= bound * size).all()


def test_leading_dimensions_and_none_at_all() -> None:
    layers = make_layers([4, 8, 3])
    x = torch.randn(2, 5, 4)
    y = ops.mlp(x, *layers)
    assert y.shape == (2, 5, 3)
    assert torch.equal(y[1, 2], ops.mlp(x[1, 2], *layers))
    assert ops.mlp(torch.empty(0, 4), *layers).shape == (0, 3)


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
def test_gradients_of_an_empty_batch_are_zero(compute_dtype: torch.dtype) -> None:
    layers = make_layers([4, 8, 3])
    x, grad_y = torch.empty(0, 4), torch.empty(0, 3)
    for grad in run(x, layers, grad_y, "cpu", compute_dtype=compute_dtype)[2:]:
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
def test_only_wanted_gradients(compute_dtype: torch.dtype) -> None:
    weights, biases, activations = make_layers([4, 8, 3])
    settings = {"compute_dtype": compute_dtype}
    x = torch.randn(6, 4, requires_grad=True)
    full = run(x, (weights, biases, activations), torch.ones(6, 3), "cpu", **settings)
    ops.mlp(x, weights, biases, activations, **settings).sum().backward()
    assert torch.equal(x.grad, full[1])
    parameters = [*weights, *biases]
    for parameter, expected in zip(parameters, full[2:], strict=True):
        parameter.requires_grad_()
        ops.mlp(x.detach(), weights, biases, activations, **settings).sum().backward()
        assert torch.equal(parameter.grad, expected)
        parameter.requires_grad_(False)


def test_a_call_may_want_more_than_the_one_before() -> None:
    """A gradient in x, for which the first layer is packed the other way round as well."""
    weights, biases, activations = make_layers([4, 8, 3])
    x, grad_y = torch.randn(6, 4), torch.ones(6, 3)
    for parameter in (*weights, *biases):
        parameter.requires_grad_()
    ops.mlp(x, weights, biases, activations, backend="cpu").backward(grad_y)
    ours = run(x, (weights, biases, activations), grad_y, "cpu")
    torch.testing.assert_close(ours, run(x, (weights, biases, activations), grad_y, "reference"))


@pytest.mark.parametrize("how", ["in place", "data", "numpy", "fused Adam"])
def test_changed_weights_are_seen(how: str) -> None:
    """However they were changed: torch's fused Adam and `.data` don't even tell autograd."""
    net = nn.MLP(4, 16, 2)
    x = torch.randn(3, 4)
    net(x)
    weight = net.layers[1].weight
    if how == "in place":
        with torch.no_grad():
            weight[3, 5] += 1
    elif how == "data":
        weight.data[3, 5] += 1
    elif how == "numpy":
        weight.detach().numpy()[3, 5] += 1
    else:
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1, fused=True)
        net(x).sum().backward()
        optimizer.step()
    assert torch.allclose(net(x), net(x, backend="reference"), atol=1e-6)


def test_second_derivative_is_refused_and_the_reference_has_it() -> None:
    layers = make_layers([3, 6, 1])
    x = torch.randn(4, 3, requires_grad=True)
    for compute_dtype in PRECISIONS:
        y = ops.mlp(x, *layers, compute_dtype=compute_dtype)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative.*backend='reference'"):
            slope.sum().backward()
    double = make_layers([3, 6, 1], dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def value(x: Tensor) -> Tensor:
        return ops.mlp(x, *double)

    assert torch.autograd.gradcheck(value, x)
    assert torch.autograd.gradgradcheck(value, x)


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
def test_torch_func(compute_dtype: torch.dtype) -> None:
    net = nn.MLP(4, 16, 2, compute_dtype=compute_dtype)
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    x = torch.randn(5, 4)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, parameters, (x,)).square().sum()

    whole = torch.func.grad(loss)(parameters, x)
    per_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    loss(dict(net.named_parameters()), x).backward()
    for name, p in net.named_parameters():
        assert torch.allclose(whole[name], p.grad, atol=1e-5)
        assert torch.allclose(per_row[name].sum(0), p.grad, atol=1e-5)


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
def test_vmap_over_an_ensemble(compute_dtype: torch.dtype) -> None:
    nets = [nn.MLP(4, 8, 2, compute_dtype=compute_dtype) for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(nets)
    x = torch.randn(5, 4)

    def call(parameters: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(nets[0], parameters, (x,))

    with torch.no_grad():
        together = torch.func.vmap(call)({k: v.detach() for k, v in stacked.items()})
        assert torch.equal(together, torch.stack([net(x) for net in nets]))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap_over_inputs(dim: int) -> None:
    net, x = nn.MLP(4, 8, 2), torch.randn(3, 5, 4)
    with torch.no_grad():
        together = torch.func.vmap(net, in_dims=dim)(x.movedim(0, dim))
        torch.testing.assert_close(together, torch.stack([net(rows) for rows in x]))


def test_what_is_saved_has_one_shape_for_all_instruction_sets(isa: str) -> None:
    """It is in graphs that torch.compile keeps on disk, for other machines too."""
    shapes = [(0, 0, 5, 33), (0, 0, 33, 17), (0, 0, 17, 3)]
    core = _native._core
    kinds = native.kinds("mish,mish,identity")
    # Activations and slopes, in whole cache lines.
    assert core.mlp_saved_width(shapes, kinds, core.Precision.float32) == 2 * (48 + 32)
    # Two activations in the place of one, and slopes.
    assert core.mlp_saved_width(shapes, kinds, core.Precision.bfloat16) == (48 + 32) // 2 + 48 + 32


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
def test_compiles_without_a_graph_break(compute_dtype: torch.dtype) -> None:
    net = nn.MLP(4, 16, 2, compute_dtype=compute_dtype)
    compiled = torch.compile(net, fullgraph=True)
    x = torch.randn(5, 4, requires_grad=True)
    (ours,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (eager,) = torch.autograd.grad(net(x).square().sum(), x)
    assert torch.allclose(ours, eager, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_opcheck(precision: str) -> None:
    weights, biases, _ = make_layers([4, 8, 3])
    parameters = [p for pair in zip(weights, biases, strict=True) for p in pair]
    x = torch.randn(5, 4)
    settings = (precision, "cpu")
    arguments = (x, parameters, "mish,identity", True, *settings)
    _, saved = native.forward(*arguments)
    torch.library.opcheck(native.forward.overload, arguments)
    arguments = (torch.randn(1, 5, 3), x, saved, parameters, "mish,identity", True, True, *settings)
    torch.library.opcheck(native.backward.overload, arguments)


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
def test_errors_do_not_grow_along_the_batch(compute_dtype: torch.dtype) -> None:
    """A weight's gradient over 16,384 rows stays as exact, relative to its size, as over 256."""
    layers = make_layers([8, 32, 4])
    errors = []
    for batch in (256, 16_384):
        x, grad_y = torch.randn(batch, 8), torch.randn(batch, 4)
        ours = run(x, layers, grad_y, "cpu", compute_dtype=compute_dtype)[2]
        exact = run(x, layers, grad_y, "reference", torch.float64)[2]
        errors.append(quantile(ours - exact, 0.99) / exact.abs().mean().item())
    assert errors[1] <= 4 * errors[0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(5, 3)}, ValueError, r"weights\[0\]: expected shape \[out, 3\]"),
        ({"x": "x"}, TypeError, "x: expected a tensor, got str"),
        ({"x": torch.ones(5, 4, dtype=torch.int64)}, TypeError, "x: expected a floating-point"),
        ({"x": torch.randn(5, 4).double()}, TypeError, r"weights\[0\]: expected torch.float64"),
        ({"weights": []}, ValueError, "weights: expected at least one layer"),
        ({"biases": [torch.zeros(8)]}, ValueError, "biases: expected 2, one a layer, got 1"),
        ({"biases": [torch.zeros(8), torch.zeros(4)]}, ValueError, r"biases\[1\]: expected shape"),
        ({"activations": ["mish"]}, ValueError, "activations: expected 2, one a layer, got 1"),
        ({"activations": "mish"}, TypeError, "activations: expected a list, .* the text 'mish'"),
        ({"activations": ["mish", "swish"]}, ValueError, r"activations\[1\]: expected one of"),
        ({"activations": ["mish", ["sin"]]}, ValueError, r"activations\[1\]: expected one of"),
        ({"activations": None}, TypeError, "activations: expected a list, .*, got NoneType"),
        ({"weights": torch.randn(2, 8, 4)}, TypeError, "weights: expected a list, .*, got Tensor"),
        ({"weights": torch.nn.Linear(4, 3)}, TypeError, "weights: expected a list, .* got Linear"),
        ({"biases": None}, TypeError, "biases: expected a list, one a layer, got NoneType"),
        (
            {"weights": [torch.randn(8, 4).to_sparse(), torch.randn(3, 8)]},
            TypeError,
            r"weights\[0\]: expected a dense tensor, got one in torch.sparse_coo",
        ),
        ({"compute_dtype": torch.float64}, ValueError, "^compute_dtype: expected None"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of cpu, reference"),
        ({"x": torch.randn(5, 4, device="meta")}, ValueError, "to be on meta like x"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    weights, biases, activations = make_layers([4, 8, 3])
    arguments: dict[str, Any] = {
        "x": torch.randn(5, 4),
        "weights": weights,
        "biases": biases,
        "activations": activations,
    }
    with pytest.raises(error, match=message):
        ops.mlp(**{**arguments, **change})
