"""The critics' loss in one call: the same as its parts one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BATCHES, assert_error_at_most_twice_eager, root_mean_square
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffcore import explain, ops
from diffcore.ops import _native
from diffcore.ops.critic_loss import native

KINDS = ["mish", "sin", "identity"]
needs_kernels = pytest.mark.skipif(_native._core is None, reason="needs the compiled module")


def make_networks(count: int = 2, widths: tuple[int, ...] = (5, 9, 7, 1)) -> list[list[Tensor]]:
    def network() -> list[Tensor]:
        layers = [(torch.randn(o, i) / i**0.5, torch.randn(o)) for i, o in itertools.pairwise(widths)]
        return [parameter.requires_grad_() for layer in layers for parameter in layer]

    return [network() for _ in range(count)]


def in_parts(
    x: Tensor,
    networks: list[list[Tensor]],
    kinds: list[str],
    target: Tensor,
    weight: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    q = ops.mlp_ensemble(x, networks, kinds, **options)
    losses = [torch.nn.functional.mse_loss(own, target, reduction="none") for own in q]
    if weight is not None:
        losses = [weight[:, None] * loss for loss in losses]
    return torch.stack([loss.mean() for loss in losses]).sum(), q.detach()


def with_gradients(
    loss: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    networks: list[list[Tensor]],
    target: Tensor,
    weight: Tensor | None = None,
    kinds: list[str] = KINDS,
    **options: Any,
) -> list[Tensor]:
    """[loss, q, gradients of x and of all parameters]."""
    x = x.detach().requires_grad_()
    value, q = loss(x, networks, kinds, target, weight=weight, **options)
    assert not q.requires_grad
    return [value.detach(), q, *torch.autograd.grad(value, [x, *itertools.chain(*networks)])]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def double(networks: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[p.detach().double().requires_grad_() for p in network] for network in networks]


def in_double(
    x: Tensor, networks: list[list[Tensor]], target: Tensor, weight: Tensor | None
) -> tuple[Any, ...]:
    weight = None if weight is None else weight.double()
    return x.double(), double(networks), target.double(), weight


weighted_or_not = pytest.mark.parametrize("weighted", [False, True])


def draw_weight(batch: int, weighted: bool) -> Tensor | None:
    return torch.randn(batch) if weighted else None


# -- right values ----------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("batch", BATCHES[1:])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@weighted_or_not
def test_the_same_as_its_parts(
    isa: str, count: int, batch: int, compute_dtype: torch.dtype | None, weighted: bool
) -> None:
    networks = make_networks(count, (5, 43, 35, 2))
    rows = torch.randn(batch, 5), networks, torch.randn(batch, 2)
    arguments = (*rows, draw_weight(batch, weighted))
    options = {"compute_dtype": compute_dtype, "backend": "cpu"}
    loss, *ours = with_gradients(ops.critic_loss, *arguments, **options)
    expected, *theirs = with_gradients(in_parts, *arguments, **options)
    # A sum that torch takes in another order; of terms of either sign, if they have weights.
    assert torch.allclose(loss, expected, rtol=1e-6, atol=1e-6 if weighted else 1e-8)
    for a, b in zip(ours, theirs, strict=True):
        # torch multiplies by 2 / count and by the loss's slope, of two outputs one after the other.
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7 if compute_dtype is None else 1e-3)
    assert torch.equal(ours[0], theirs[0])


@needs_kernels
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_sizes(data: st.DataObject) -> None:
    sizes = st.integers(1, 70)
    depth = data.draw(st.integers(1, 4))
    widths = tuple(data.draw(sizes) for _ in range(depth + 1))
    kinds = [data.draw(st.sampled_from(_native.NATIVE_ACTIVATIONS)) for _ in range(depth)]
    batch, count = data.draw(sizes), data.draw(st.integers(1, 3))
    isa = data.draw(st.sampled_from(_native._core.available_isas()))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    networks = make_networks(count, widths)
    weight = draw_weight(batch, data.draw(st.booleans()))
    arguments = torch.randn(batch, widths[0]), networks, torch.randn(batch, widths[-1]), weight
    before = _native._core.isa()
    _native._core.use_isa(isa)
    try:
        ours = with_gradients(ops.critic_loss, *arguments, kinds, backend="cpu")
    finally:
        _native._core.use_isa(before)
    exact = with_gradients(ops.critic_loss, *in_double(*arguments), kinds)
    for a, b in zip(ours, exact, strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-5 * max(1, b.abs().max().item()))


@weighted_or_not
def test_close_to_exact(backend: str, weighted: bool) -> None:
    rows = torch.randn(9, 5), make_networks(), torch.randn(9, 1)
    arguments = (*rows, draw_weight(9, weighted))
    ours = with_gradients(ops.critic_loss, *arguments, backend=backend)
    exact = with_gradients(ops.critic_loss, *in_double(*arguments))
    for a, b in zip(ours, exact, strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-6)


@needs_kernels
@weighted_or_not
def test_error_at_most_twice_eager(isa: str, weighted: bool) -> None:
    rows = torch.randn(256, 23), make_networks(2, (23, 256, 256, 1)), torch.randn(256, 1)
    arguments = (*rows, draw_weight(256, weighted))
    ours = with_gradients(ops.critic_loss, *arguments, backend="cpu")
    eager = with_gradients(ops.critic_loss, *arguments, backend="reference")
    exact = with_gradients(ops.critic_loss, *in_double(*arguments))
    flat = [torch.cat([t.flatten() for t in tensors[1:]]) for tensors in (ours, eager, exact)]
    assert_error_at_most_twice_eager(*flat)


@needs_kernels
@weighted_or_not
def test_bfloat16_is_within_its_bound(isa: str, weighted: bool) -> None:
    networks, kinds = make_networks(2, (23, 100, 256, 1)), ["mish", "elu", "identity"]
    weight = torch.rand(256) if weighted else None
    arguments = torch.randn(256, 23), networks, torch.randn(256, 1), weight
    ours = with_gradients(
        ops.critic_loss, *arguments, kinds, compute_dtype=torch.bfloat16, backend="cpu"
    )
    exact = with_gradients(ops.critic_loss, *in_double(*arguments), kinds)
    assert torch.allclose(ours[0].double(), exact[0], rtol=0.01)
    for a, b in zip(ours[1:], exact[1:], strict=True):
        assert root_mean_square(a - b) <= 0.02 * root_mean_square(b)
        assert root_mean_square(a - b) >= 1e-4 * root_mean_square(b)  # not float32 after all


@needs_kernels
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@weighted_or_not
def test_same_bits_for_any_number_of_threads(
    isa: str, set_threads: Callable[[int], None], compute_dtype: torch.dtype, weighted: bool
) -> None:
    rows = torch.randn(301, 5), make_networks(3), torch.randn(301, 1)
    arguments = (*rows, draw_weight(301, weighted))
    results = []
    for threads in (1, 2, 2):
        set_threads(threads)
        results.append(with_gradients(ops.critic_loss, *arguments, compute_dtype=compute_dtype))
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_weights_of_one_change_no_bit_and_of_zero_leave_a_row_out(
    backend: str, compute_dtype: torch.dtype
) -> None:
    networks, x, target = make_networks(), torch.randn(65, 5), torch.randn(65, 1)
    options = {"compute_dtype": compute_dtype, "backend": backend}
    plain = with_gradients(ops.critic_loss, x, networks, target, **options)
    weight = torch.ones(65)
    assert_same(with_gradients(ops.critic_loss, x, networks, target, weight, **options), plain)
    weight[5] = 0.0
    weighted = with_gradients(ops.critic_loss, x, networks, target, weight, **options)
    assert weighted[0] < plain[0]
    assert torch.equal(weighted[1], plain[1])
    others = torch.arange(65) != 5
    assert torch.equal(weighted[2][others], plain[2][others])
    assert not weighted[2][5].any()
    without = x[others], networks, target[others]
    expected = with_gradients(ops.critic_loss, *without, **options)[3:]
    for ours, theirs in zip(weighted[3:], expected, strict=True):
        close = 1e-6 if compute_dtype is torch.float32 else 1e-2  # of deltas scaled by other means
        assert torch.allclose(ours * (65 / 64), theirs, rtol=close, atol=close)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_nan_stays_in_its_row(backend: str, compute_dtype: torch.dtype) -> None:
    arguments, weight = (torch.randn(9, 5), make_networks(), torch.randn(9, 1)), torch.randn(9)
    options = {"compute_dtype": compute_dtype, "backend": backend}
    before = with_gradients(ops.critic_loss, *arguments, weight, **options)
    weight[5] = torch.nan
    loss, q, grad_x, *_ = with_gradients(ops.critic_loss, *arguments, weight, **options)
    assert loss.isnan()
    assert torch.equal(q, before[1])
    assert grad_x.isnan().all(1).tolist() == [i == 5 for i in range(9)]
    others = torch.arange(9) != 5
    assert torch.equal(grad_x[others], before[2][others])


@needs_kernels
def test_a_row_does_not_know_its_batch(isa: str) -> None:
    networks, x, target = make_networks(), torch.randn(256, 5), torch.randn(256, 1)
    whole = ops.critic_loss(x, networks, KINDS, target, backend="cpu")[1]
    part = ops.critic_loss(x[:13], networks, KINDS, target[:13], backend="cpu")[1]
    assert torch.equal(whole[:, :13], part)


@needs_kernels
def test_weights_changed_behind_autograd_count(isa: str) -> None:
    networks, x, target = make_networks(), torch.randn(9, 5), torch.randn(9, 1)
    before = with_gradients(ops.critic_loss, x, networks, target, backend="cpu")
    networks[1][2].data[0, 0] += 1
    changed = with_gradients(ops.critic_loss, x, networks, target, backend="cpu")
    assert torch.equal(before[1][0], changed[1][0])
    assert not torch.equal(before[1][1], changed[1][1])
    networks[1][2].detach().numpy()[0, 0] += 1
    again = with_gradients(ops.critic_loss, x, networks, target, backend="cpu")
    assert not torch.equal(changed[1][1], again[1][1])
    assert not torch.equal(changed[2], again[2])


def test_gradient_of_the_reference() -> None:
    networks = double(make_networks())
    x, target, given_ = (torch.randn(3, n).double().requires_grad_() for n in (5, 1, 1))
    parameters = [*itertools.chain(*networks)]

    def loss(x: Tensor, target: Tensor, weight: Tensor | None, *parameters: Tensor) -> Tensor:
        critics = [parameters[:6], parameters[6:]]
        weight = None if weight is None else weight[:, 0]
        return ops.critic_loss(x, critics, KINDS, target, weight=weight)[0]

    for weight in (None, given_):
        inputs = (x, target, weight, *parameters)
        assert torch.autograd.gradcheck(loss, inputs)
        assert torch.autograd.gradgradcheck(loss, inputs)


@weighted_or_not
def test_empty_batch_gives_what_a_mean_over_nothing_is(backend: str, weighted: bool) -> None:
    rows = torch.empty(0, 5), make_networks(), torch.empty(0, 1)
    arguments = (*rows, draw_weight(0, weighted))
    loss, q, grad_x, *grads = with_gradients(ops.critic_loss, *arguments, backend=backend)
    assert loss.isnan()
    assert q.shape == (2, 0, 1)
    assert grad_x.shape == (0, 5)
    assert not any(g.any() for g in grads)


# -- as a part of PyTorch --------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("wants_x", [False, True])
@pytest.mark.parametrize("wants_parameters", [False, True])
def test_only_wanted_gradients(wants_x: bool, wants_parameters: bool) -> None:
    networks, x, target = make_networks(), torch.randn(9, 5), torch.randn(9, 1)
    expected = with_gradients(ops.critic_loss, x, networks, target)
    x = x.requires_grad_(wants_x)
    parameters = [p.requires_grad_(wants_parameters) for p in itertools.chain(*networks)]
    loss, q = ops.critic_loss(x, networks, KINDS, target)
    assert_same([loss.detach(), q], expected[:2])
    assert loss.requires_grad == (wants_x or wants_parameters)
    if loss.requires_grad:
        loss.backward()
    tensors, wanted = [x, *parameters], [wants_x, *[wants_parameters] * len(parameters)]
    for tensor, want, gradient in zip(tensors, wanted, expected[2:], strict=True):
        if want:
            assert torch.equal(tensor.grad, gradient)
        else:
            assert tensor.grad is None


@needs_kernels
def test_backward_twice_and_scaled() -> None:
    networks, x, target = make_networks(), torch.randn(9, 5), torch.randn(9, 1)
    expected = with_gradients(ops.critic_loss, x, networks, target)[3:]
    parameters = [*itertools.chain(*networks)]
    loss, _ = ops.critic_loss(x, networks, KINDS, target)
    for factor in (1.0, 3.0):
        gradients = torch.autograd.grad(factor * loss, parameters, retain_graph=True)
        assert_same(list(gradients), [factor * g for g in expected])
        for gradient in gradients:
            gradient.zero_()  # it belongs to whom it was given
    loss.backward()
    assert_same([p.grad for p in parameters], expected)  # type: ignore[misc]
    loss, _ = ops.critic_loss(x, networks, KINDS, target)
    assert_same(list(torch.autograd.grad(0.5 * loss, parameters)), [0.5 * g for g in expected])


@needs_kernels
def test_second_derivative_is_refused() -> None:
    networks = make_networks()
    loss, _ = ops.critic_loss(torch.randn(9, 5), networks, KINDS, torch.randn(9, 1))
    (slope,) = torch.autograd.grad(loss, networks[1][0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*backend='reference'"):
        slope.sum().backward()


@needs_kernels
@weighted_or_not
def test_torch_func(weighted: bool) -> None:
    networks, x, target = make_networks(), torch.randn(9, 5), torch.randn(9, 1)
    weight = draw_weight(9, weighted)
    expected = with_gradients(ops.critic_loss, x, networks, target, weight)

    def loss(parameters: list[Tensor], x: Tensor, target: Tensor, w: Tensor | None) -> Tensor:
        critics = [parameters[:6], parameters[6:]]
        return ops.critic_loss(x, critics, KINDS, target, weight=w)[0]

    parameters = [p.detach() for p in itertools.chain(*networks)]
    assert_same(torch.func.grad(loss)(parameters, x, target, weight), expected[3:])

    def of_one_row(parameters: list[Tensor], x: Tensor, target: Tensor, w: Tensor | None) -> Tensor:
        return loss(parameters, x[None], target[None], None if w is None else w[None])

    in_dims = (None, 0, 0, 0 if weighted else None)
    per_row = torch.func.vmap(torch.func.grad(of_one_row), in_dims)(parameters, x, target, weight)
    for gradient, whole in zip(per_row, expected[3:], strict=True):
        assert torch.allclose(gradient.mean(0), whole, atol=1e-5)


@needs_kernels
def test_func_grad_of_the_weights() -> None:
    """Which the kernels haven't: the reference runs."""
    networks, x, target = make_networks(), torch.randn(9, 5), torch.randn(9, 1)

    def loss(weight: Tensor) -> Tensor:
        return ops.critic_loss(x, networks, KINDS, target, weight=weight)[0]

    q = ops.mlp_ensemble(x, networks, KINDS)
    expected = (q - target).square().sum((0, 2)).detach() / 9
    torch.testing.assert_close(torch.func.grad(loss)(torch.randn(9)), expected)


@needs_kernels
@weighted_or_not
def test_compiles_without_a_graph_break(weighted: bool) -> None:
    networks, x, target = make_networks(), torch.randn(9, 5), torch.randn(9, 1)
    options = {"weight": draw_weight(9, weighted), "backend": "cpu"}

    def twice(x: Tensor) -> Tensor:
        return 2 * ops.critic_loss(x, networks, KINDS, target, **options)[0]

    parameters = [*itertools.chain(*networks)]
    ours = torch.autograd.grad(torch.compile(twice, fullgraph=True)(x), parameters)
    assert_same(list(ours), list(torch.autograd.grad(twice(x), parameters)))


@needs_kernels
def test_autocast_hands_over_in_float32() -> None:
    networks, x, target = make_networks(), torch.randn(9, 5).bfloat16(), torch.randn(9, 1)
    weight = torch.randn(9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = ops.critic_loss(x, networks, KINDS, target, weight=weight)
    expected, _ = ops.critic_loss(x.float(), networks, KINDS, target, weight=weight.float())
    assert torch.equal(loss, expected)


@needs_kernels
@pytest.mark.parametrize("wanted", [[True, True], [False, False], [True, False]])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@weighted_or_not
def test_opcheck(wanted: list[bool], precision: str, weighted: bool) -> None:
    parameters = [p.detach() for p in itertools.chain(*make_networks())]
    rows = torch.randn(9, 5), torch.randn(9, 1), draw_weight(9, weighted)
    arguments = (*rows, parameters, ",".join(KINDS), wanted)
    torch.library.opcheck(native.loss_and_gradients.overload, (*arguments, precision, "cpu"))


@needs_kernels
def test_what_the_kernel_can_not_take() -> None:
    target = torch.randn(9, 1, requires_grad=True)
    arguments = torch.randn(9, 5), make_networks(), KINDS, target
    answer = explain("critic_loss", *arguments)
    assert answer.backend == "reference"
    assert answer.passed_over["cpu"].startswith("target requires a gradient")
    ops.critic_loss(*arguments)[0].backward()
    assert target.grad is not None
    weight = torch.ones(9)
    arguments = (*arguments[:3], target.detach())
    assert explain("critic_loss", *arguments, weight=weight).backend == "cpu"
    answer = explain("critic_loss", *arguments, weight=weight.requires_grad_())
    assert answer.backend == "reference"
    assert answer.passed_over["cpu"].startswith("weight requires a gradient")
    ops.critic_loss(*arguments, weight=weight)[0].backward()
    assert weight.grad is not None
    nine = make_networks(9)
    answer = explain("critic_loss", arguments[0], nine, KINDS, target.detach())
    assert "9 networks, the CPU kernels take at most 8" in answer.passed_over["cpu"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": "x"}, TypeError, "^x: expected a tensor, got str"),
        ({"x": torch.zeros(9, 2, 5)}, ValueError, r"^x: expected shape \[B, in\], got \[9, 2, 5\]"),
        ({"networks": []}, ValueError, "^networks: expected at least one network, got none"),
        ({"target": torch.zeros(9)}, ValueError, r"^target: expected shape \[9, 1\], got \[9\]"),
        ({"target": torch.zeros(9, 2)}, ValueError, r"^target: expected shape \[9, 1\], got \[9, 2"),
        ({"target": torch.zeros(9, 1).double()}, TypeError, "^target: expected torch.float32 like x"),
        ({"weight": 0.5}, TypeError, "^weight: expected a tensor, got float"),
        ({"weight": torch.ones(9, 1)}, ValueError, r"^weight: expected shape \[9\], got \[9, 1\]"),
        ({"weight": torch.ones(8)}, ValueError, r"^weight: expected shape \[9\], got \[8\]"),
        ({"weight": torch.ones(9).long()}, TypeError, "^weight: expected a floating-point tensor"),
        ({"weight": torch.ones(9).double()}, TypeError, "^weight: expected torch.float32 like x"),
        ({"weight": torch.ones(9, device="meta")}, ValueError, "^weight: expected to be on cpu"),
        ({"compute_dtype": torch.float64}, ValueError, "^compute_dtype: expected None"),
        ({"backend": "gpu"}, ValueError, "^backend: expected one of cpu, reference"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "x": torch.randn(9, 5),
        "networks": make_networks(),
        "activations": KINDS,
        "target": torch.randn(9, 1),
    }
    with pytest.raises(error, match=message):
        ops.critic_loss(**{**arguments, **change})  # type: ignore[arg-type]
