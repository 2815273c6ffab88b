"""The denoising loss: value and gradients in one call."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import ACTIVATIONS, assert_error_at_most_twice_eager, root_mean_square
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffcore import DiffusionSchedule, explain, nn, ops
from diffcore.ops.denoising_loss import _tables, native

SCHEDULE = DiffusionSchedule.cosine(20)
PRECISIONS = [torch.float32, torch.bfloat16]


class Data:
    """A denoiser and one batch for it."""

    def __init__(
        self,
        batch: int,
        state_dim: int = 7,
        action_dim: int = 3,
        weighted: bool = False,
        **options: Any,
    ) -> None:
        self.denoiser = nn.Denoiser(state_dim, action_dim, **{"hidden_dim": 65, **options})
        for parameter in self.denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.state, self.action = torch.randn(batch, state_dim), torch.rand(batch, action_dim)
        self.t, self.noise = torch.randint(20, (batch,)), torch.randn(batch, action_dim)
        self.weight = torch.randn(batch) if weighted else None

    def run(
        self,
        backend: str | None,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        grad_losses: Tensor | None = None,
    ) -> list[Tensor]:
        """[loss, gradients of state, action and the parameters], everything in `dtype`.

        With `grad_losses` ``[B]`` of the losses of rows, each times its part of that.
        """
        denoiser = self.denoiser.to(dtype)
        state, action = (x.to(dtype).requires_grad_() for x in (self.state, self.action))
        given = {"t": self.t, "noise": self.noise.to(dtype), "compute_dtype": compute_dtype}
        if self.weight is not None:
            given["weight"] = self.weight.to(dtype)
        if grad_losses is not None:
            given["reduction"], grad_losses = "none", grad_losses.to(dtype)
        loss = ops.denoising_loss(denoiser, SCHEDULE, state, action, **given, backend=backend)
        grads = torch.autograd.grad(loss, [state, action, *denoiser.parameters()], grad_losses)
        self.denoiser.to(torch.float32)
        return [loss.detach(), *grads]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_at_most_twice_eager(isa: str, activation: str, weighted: bool) -> None:
    data = Data(300, weighted=weighted, activation=activation, hidden_dim=100)
    ours, eager = data.run("cpu"), data.run("reference")
    exact = data.run("reference", torch.float64)
    for a, b, c in zip(ours, eager, exact, strict=True):
        if c.numel() >= 1000:
            assert_error_at_most_twice_eager(a, b, c)
        else:
            assert (a - c).abs().max() <= 1e-6 * max(1.0, c.abs().max().item())


AWKWARD_BATCHES = [1, 2, 7, 8, 63, 65, 130, 257]
AWKWARD_SIZES = [
    {"state_dim": 1, "action_dim": 1, "hidden_dim": 1, "hidden_layers": 1, "time_dim": 2},
    {"state_dim": 17, "action_dim": 6, "hidden_dim": 33, "time_dim": 10},
    {"state_dim": 40, "action_dim": 17, "hidden_dim": 64, "hidden_layers": 2},
]


@pytest.mark.parametrize("batch", AWKWARD_BATCHES)
@pytest.mark.parametrize("sizes", AWKWARD_SIZES)
@pytest.mark.parametrize("weighted", [False, True])
def test_awkward_sizes(isa: str, batch: int, sizes: dict[str, int], weighted: bool) -> None:
    data = Data(batch, weighted=weighted, **sizes)
    for a, b in zip(data.run("cpu"), data.run("reference", torch.float64), strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 2e-6 * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "relu"])
@pytest.mark.parametrize("batch", [300, 64])
def test_bfloat16_is_within_its_bound(isa: str, activation: str, batch: int) -> None:
    data = Data(batch, activation=activation, hidden_dim=100)
    for module in data.denoiser.modules():  # weights as they are in training
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    ours = data.run("cpu", compute_dtype=torch.bfloat16)
    exact = data.run("reference", torch.float64)
    assert abs(ours[0] - exact[0]) <= 0.01 * exact[0]
    for a, b in zip(ours[1:], exact[1:], strict=True):
        # A bias's gradient is a sum over the batch, of which little may be left.
        bound = 0.05 if b.ndim == 1 else 0.02
        assert root_mean_square(a - b) <= bound * root_mean_square(b)
        assert root_mean_square(a - b) >= 1e-4 * root_mean_square(b)  # it isn't float32 after all


def test_gradients_of_the_reference() -> None:
    denoiser = nn.Denoiser(2, 2, hidden_dim=4, hidden_layers=1, time_dim=4).double()
    action = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    state = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    noise, t = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0, 7, 19])
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def loss(state: Tensor, action: Tensor, weight: Tensor | None, *_: Tensor) -> Tensor:
        given = {"t": t, "noise": noise, "weight": weight}
        return ops.denoising_loss(denoiser, SCHEDULE, state, action, **given)

    def losses(state: Tensor, action: Tensor, weight: Tensor | None, *_: Tensor) -> Tensor:
        given = {"t": t, "noise": noise, "weight": weight, "reduction": "none"}
        return ops.denoising_loss(denoiser, SCHEDULE, state, action, **given)

    for w in (None, weight):
        for function in (loss, losses):
            assert torch.autograd.gradcheck(function, (state, action, w, *denoiser.parameters()))
            assert torch.autograd.gradgradcheck(function, (state, action, w))


def test_is_the_loss_written_out() -> None:
    data = Data(50)
    noisy = ops.q_sample(data.action, data.t, data.noise, SCHEDULE)
    squares = (data.denoiser(noisy, data.state, data.t) - data.noise).square()
    torch.testing.assert_close(data.run("cpu")[0], squares.mean(), rtol=1e-6, atol=0)
    data.weight = torch.rand(50)
    expected = sum(w * row.mean() for w, row in zip(data.weight, squares, strict=True)) / 50
    torch.testing.assert_close(data.run("cpu")[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
def test_a_weight_of_one_changes_no_bit_and_of_zero_leaves_a_row_out(
    isa: str, compute_dtype: torch.dtype
) -> None:
    data = Data(65)
    plain = data.run("cpu", compute_dtype=compute_dtype)
    data.weight = torch.ones(65)
    ones = data.run("cpu", compute_dtype=compute_dtype)
    assert all(torch.equal(a, b) for a, b in zip(ones, plain, strict=True))
    data.weight[5] = 0.0
    loss, grad_state, grad_action, *_ = data.run("cpu", compute_dtype=compute_dtype)
    assert loss < plain[0]
    for grad, before in ((grad_state, plain[1]), (grad_action, plain[2])):
        assert not grad[5].any()
        others = torch.arange(65) != 5
        assert torch.equal(grad[others], before[others])


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_same_bits_for_any_number_of_threads_and_on_repeat(
    isa: str, set_threads: Callable[[int], None], compute_dtype: torch.dtype, weighted: bool
) -> None:
    data = Data(301, weighted=weighted)
    results = []
    for threads in (1, 2, 2):
        set_threads(threads)
        results.append(data.run("cpu", compute_dtype=compute_dtype))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_row_does_not_depend_on_its_batch(
    isa: str, compute_dtype: torch.dtype, weighted: bool
) -> None:
    data = Data(256, weighted=weighted)
    whole = data.run("cpu", compute_dtype=compute_dtype)
    for rows in (slice(0, 1), slice(100, 164)):
        part = Data(1)
        part.denoiser = data.denoiser
        part.state, part.action = data.state[rows], data.action[rows]
        part.t, part.noise = data.t[rows], data.noise[rows]
        part.weight = None if data.weight is None else data.weight[rows]
        share = 256 / len(part.t)  # a power of two: exact
        alone = part.run("cpu", compute_dtype=compute_dtype)
        for whole_grad, grad in zip(whole[1:3], alone[1:3], strict=True):
            assert torch.equal(whole_grad[rows] * share, grad)


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_nan_stays_in_its_row(isa: str, compute_dtype: torch.dtype, weighted: bool) -> None:
    data = Data(9, weighted=weighted)
    (data.state[5, 2:3] if data.weight is None else data.weight[5:6]).fill_(float("nan"))
    loss, grad_state, grad_action, *_ = data.run("cpu", compute_dtype=compute_dtype)
    assert torch.isnan(loss)
    for grad in (grad_state, grad_action):
        assert torch.isnan(grad).any(1).tolist() == [i == 5 for i in range(9)]


@settings(deadline=None)
@given(
    batch=st.integers(1, 20),
    sizes=st.fixed_dictionaries(
        {
            "state_dim": st.integers(1, 40),
            "action_dim": st.integers(1, 20),
            "hidden_dim": st.integers(1, 40),
            "hidden_layers": st.integers(1, 4),
        }
    ),
    activation=st.sampled_from(list(ACTIVATIONS)),
    transposed=st.booleans(),
    weighted=st.booleans(),
)
def test_any_shape_and_stride(
    batch: int, sizes: dict[str, int], activation: str, transposed: bool, weighted: bool
) -> None:
    data = Data(batch, activation=activation, weighted=weighted, **sizes)
    if transposed:
        if data.weight is not None:
            data.weight = torch.stack([data.weight, torch.zeros(batch)], dim=1)[:, 0]
        data.state, data.action, data.noise = (
            x.T.contiguous().T for x in (data.state, data.action, data.noise)
        )
    for a, b in zip(data.run("cpu"), data.run("reference", torch.float64), strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item())


def test_only_wanted_gradients() -> None:
    data = Data(6)
    full = data.run("cpu")
    given = {"t": data.t, "noise": data.noise}
    data.action.requires_grad_()
    data.denoiser.requires_grad_(False)
    ops.denoising_loss(data.denoiser, SCHEDULE, data.state, data.action, **given).backward()
    assert torch.equal(data.action.grad, full[2])
    data.denoiser.requires_grad_()
    loss = ops.denoising_loss(data.denoiser, SCHEDULE, data.state, data.action.detach(), **given)
    loss.backward()
    assert all(
        torch.equal(p.grad, g) for p, g in zip(data.denoiser.parameters(), full[3:], strict=True)
    )
    with torch.no_grad():
        loss = ops.denoising_loss(data.denoiser, SCHEDULE, data.state, data.action, **given)
    assert not loss.requires_grad
    assert torch.equal(loss, full[0])


def test_gradients_scale_with_what_follows_and_can_be_taken_twice() -> None:
    data = Data(6)
    full = data.run("cpu")
    given = {"t": data.t, "noise": data.noise}
    loss = ops.denoising_loss(data.denoiser, SCHEDULE, data.state, data.action, **given)
    parameters = list(data.denoiser.parameters())
    for factor in (1.0, 3.0, 1.0):
        grads = torch.autograd.grad(factor * loss, parameters, retain_graph=True)
        for grad, expected in zip(grads, full[3:], strict=True):
            torch.testing.assert_close(grad, factor * expected)


def test_second_derivative_is_refused() -> None:
    data = Data(6)
    loss = ops.denoising_loss(data.denoiser, SCHEDULE, data.state, data.action)
    grads = torch.autograd.grad(loss, list(data.denoiser.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="denoising_loss: the fused kernel has no second"):
        grads[0].sum().backward()


def test_draws_the_same_from_the_same_generator_on_any_backend() -> None:
    data = Data(40)

    def drawn(seed: int, backend: str) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        arguments = (data.denoiser, SCHEDULE, data.state, data.action)
        return ops.denoising_loss(*arguments, generator=generator, backend=backend).detach()

    torch.testing.assert_close(drawn(1, "cpu"), drawn(1, "reference"), rtol=1e-5, atol=0)
    assert not torch.equal(drawn(1, "cpu"), drawn(2, "cpu"))


def test_draws_levels_uniformly() -> None:
    levels: list[Tensor] = []

    def denoiser(x: Tensor, state: Tensor, t: Tensor) -> Tensor:
        levels.append(t)
        return x

    ops.denoising_loss(denoiser, SCHEDULE, torch.zeros(20_000, 1), torch.zeros(20_000, 1))
    counts = torch.bincount(levels[0], minlength=20)
    assert len(counts) == 20
    assert float((counts - 1000).abs().max()) < 190  # six standard deviations


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
def test_empty_batch(compute_dtype: torch.dtype) -> None:
    data = Data(0)
    loss, _, _, *grads = data.run("cpu", compute_dtype=compute_dtype)
    assert torch.isnan(loss)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_any_callable_and_float64_run_on_the_reference() -> None:
    data = Data(5)
    arguments = (SCHEDULE, data.state, data.action)
    answer = explain("denoising_loss", lambda x, s, t: x, *arguments)
    assert "isn't a diffcore.nn.Denoiser" in answer.passed_over["cpu"]
    assert ops.denoising_loss(lambda x, s, t: x, *arguments).ndim == 0
    noise = torch.randn(5, 3, requires_grad=True)
    answer = explain("denoising_loss", data.denoiser, *arguments, noise=noise)
    assert "noise requires a gradient" in answer.passed_over["cpu"]
    ops.denoising_loss(data.denoiser, *arguments, noise=noise).backward()
    assert noise.grad is not None


def test_a_weight_that_requires_a_gradient_runs_on_the_reference() -> None:
    data = Data(5)
    arguments = (data.denoiser, SCHEDULE, data.state, data.action)
    given = {"t": data.t, "noise": data.noise}
    weight = torch.rand(5)
    assert explain("denoising_loss", *arguments, **given, weight=weight).backend == "cpu"
    weight.requires_grad_()
    answer = explain("denoising_loss", *arguments, **given, weight=weight)
    assert answer.backend == "reference"
    assert answer.passed_over["cpu"].startswith("weight requires a gradient")
    with torch.no_grad():  # there is none to be had
        assert explain("denoising_loss", *arguments, **given, weight=weight).backend == "cpu"
    ops.denoising_loss(*arguments, **given, weight=weight).backward()
    noisy = ops.q_sample(data.action, data.t, data.noise, SCHEDULE)
    squares = (data.denoiser(noisy, data.state, data.t) - data.noise).square()
    torch.testing.assert_close(weight.grad, squares.mean(1).detach() / 5)


# -- losses of rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", AWKWARD_BATCHES)
@pytest.mark.parametrize("sizes", AWKWARD_SIZES)
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_of_rows(isa: str, batch: int, sizes: dict[str, int], weighted: bool) -> None:
    data, grad_losses = Data(batch, weighted=weighted, **sizes), torch.randn(batch)
    ours = data.run("cpu", grad_losses=grad_losses)
    exact = data.run("reference", torch.float64, grad_losses=grad_losses)
    assert ours[0].shape == (batch,)
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 2e-6 * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_of_losses_of_rows_at_most_twice_eager(isa: str, activation: str) -> None:
    data, grad_losses = Data(1000, activation=activation, hidden_dim=100), torch.randn(1000)
    ours, eager = (data.run(backend, grad_losses=grad_losses) for backend in ("cpu", "reference"))
    exact = data.run("reference", torch.float64, grad_losses=grad_losses)
    for a, b, c in zip(ours, eager, exact, strict=True):
        if c.numel() >= 1000:
            assert_error_at_most_twice_eager(a, b, c)


@pytest.mark.parametrize("batch", [300, 64])
def test_bfloat16_losses_of_rows_are_within_their_bound(isa: str, batch: int) -> None:
    data, grad_losses = Data(batch, hidden_dim=100), torch.rand(batch)
    for module in data.denoiser.modules():  # weights as they are in training
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    ours = data.run("cpu", compute_dtype=torch.bfloat16, grad_losses=grad_losses)
    exact = data.run("reference", torch.float64, grad_losses=grad_losses)
    for a, b in zip(ours, exact, strict=True):
        bound = 0.05 if b.ndim == 1 and len(b) != batch else 0.02  # as of the mean's gradients
        assert root_mean_square(a - b) <= bound * root_mean_square(b)
        assert root_mean_square(a - b) >= 1e-4 * root_mean_square(b)  # it isn't float32 after all


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_of_the_losses_of_rows_is_the_loss(
    isa: str, compute_dtype: torch.dtype, weighted: bool
) -> None:
    """With gradients of the same bits, where the number of rows is a power of two."""
    data = Data(64, weighted=weighted)
    losses, *grads = data.run(
        "cpu", compute_dtype=compute_dtype, grad_losses=torch.full((64,), 1 / 64)
    )
    loss, *expected = data.run("cpu", compute_dtype=compute_dtype)
    torch.testing.assert_close(losses.mean(), loss)
    assert all(map(torch.equal, grads, expected))


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
def test_weights_of_rows_before_and_after_are_the_same(
    isa: str, compute_dtype: torch.dtype
) -> None:
    data, weight = Data(65), torch.randn(65)
    plain, *after = data.run("cpu", compute_dtype=compute_dtype, grad_losses=weight)
    data.weight = weight
    weighted, *before = data.run("cpu", compute_dtype=compute_dtype, grad_losses=torch.ones(65))
    assert all(map(torch.equal, before, after))
    torch.testing.assert_close(weighted, weight * plain)


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
def test_same_bits_of_losses_of_rows_for_any_number_of_threads(
    isa: str, set_threads: Callable[[int], None], compute_dtype: torch.dtype
) -> None:
    data, grad_losses, results = Data(301), torch.randn(301), []
    for threads in (1, 2, 2):
        set_threads(threads)
        results.append(data.run("cpu", compute_dtype=compute_dtype, grad_losses=grad_losses))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
def test_a_row_s_loss_does_not_depend_on_its_batch(isa: str, compute_dtype: torch.dtype) -> None:
    """Nor do its gradients, of however many rows."""
    data, grad_losses = Data(256, weighted=True), torch.randn(256)
    whole = data.run("cpu", compute_dtype=compute_dtype, grad_losses=grad_losses)
    for rows in (slice(0, 1), slice(99, 112), slice(20, 153)):
        part = Data(1)
        part.denoiser = data.denoiser
        for name in ("state", "action", "t", "noise", "weight"):
            setattr(part, name, getattr(data, name)[rows])
        alone = part.run("cpu", compute_dtype=compute_dtype, grad_losses=grad_losses[rows])
        for of_whole, own in zip(whole[:3], alone[:3], strict=True):
            assert torch.equal(of_whole[rows], own)


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
@pytest.mark.parametrize("where", ["state", "weight", "grad_losses"])
def test_nan_stays_in_its_row_s_loss(isa: str, compute_dtype: torch.dtype, where: str) -> None:
    data, grad_losses = Data(9, weighted=True), torch.randn(9)
    values = {"state": data.state, "weight": data.weight, "grad_losses": grad_losses}[where]
    assert values is not None
    values[5] = float("nan")
    losses, *grads = data.run("cpu", compute_dtype=compute_dtype, grad_losses=grad_losses)[:3]
    assert losses.isnan().tolist() == [i == 5 and where != "grad_losses" for i in range(9)]
    for grad in grads:
        assert grad.isnan().any(1).tolist() == [i == 5 for i in range(9)]


def test_only_wanted_gradients_of_losses_of_rows() -> None:
    data, grad_losses = Data(6), torch.randn(6)
    full = data.run("cpu", grad_losses=grad_losses)
    given = {"t": data.t, "noise": data.noise, "reduction": "none"}
    arguments = (data.denoiser, SCHEDULE, data.state.detach())
    assert explain("denoising_loss", *arguments, data.action, **given).backend == "cpu"
    data.denoiser.requires_grad_(False)
    ops.denoising_loss(*arguments, data.action, **given).backward(grad_losses)
    assert torch.equal(data.action.grad, full[2])
    data.denoiser.requires_grad_()
    ops.denoising_loss(*arguments, data.action.detach(), **given).backward(grad_losses)
    for parameter, expected in zip(data.denoiser.parameters(), full[3:], strict=True):
        assert torch.equal(parameter.grad, expected)
    with torch.no_grad():
        losses = ops.denoising_loss(*arguments, data.action, **given)
    assert not losses.requires_grad
    assert torch.equal(losses, full[0])


def test_gradients_of_losses_of_rows_can_be_taken_again() -> None:
    """With other weights, which may depend on the losses; not of parameters changed meanwhile."""
    data = Data(6)
    given = {"t": data.t, "noise": data.noise, "reduction": "none"}
    parameters = list(data.denoiser.parameters())
    losses = ops.denoising_loss(data.denoiser, SCHEDULE, data.state, data.action, **given)
    for scale in (1.0, 3.0):
        softmax = torch.softmax(scale * losses.detach(), 0)
        grads = torch.autograd.grad(softmax @ losses, parameters, retain_graph=True)
        expected = data.run("cpu", grad_losses=softmax)[3:]
        assert all(map(torch.equal, grads, expected))
    grads = torch.autograd.grad(losses.square().sum(), parameters, retain_graph=True)
    exact = data.run("reference", torch.float64, grad_losses=2 * losses.detach())[3:]
    for ours, theirs in zip(grads, exact, strict=True):
        assert (ours - theirs).abs().max() <= 2e-6 * max(1.0, theirs.abs().max().item())
    with torch.no_grad():
        parameters[0] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_losses_of_rows_go_forward_once_more() -> None:
    data, counts = Data(6), {}
    arguments = (data.denoiser, SCHEDULE, data.state, data.action)
    for reduction in ("mean", "none"):
        with FlopCounterMode(display=False) as forward:
            loss = ops.denoising_loss(*arguments, reduction=reduction, backend="cpu")
        with FlopCounterMode(display=False) as backward:
            loss.sum().backward()
        counts[reduction] = (forward.get_total_flops(), backward.get_total_flops())
    (of_mean, nothing), (once, again) = counts["mean"], counts["none"]
    assert nothing == 0
    assert once > 0
    assert again == of_mean  # which is forward and back


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
def test_losses_of_an_empty_batch(compute_dtype: torch.dtype) -> None:
    for backend in ("cpu", "reference"):
        losses, grad_state, grad_action, *grads = Data(0).run(
            backend, compute_dtype=compute_dtype, grad_losses=torch.empty(0)
        )
        assert losses.shape == (0,)
        assert (grad_state.shape, grad_action.shape) == ((0, 7), (0, 3))
        assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_of_rows_compile_whole(compute_dtype: torch.dtype, weighted: bool) -> None:
    data, grad_losses = Data(16, weighted=weighted), torch.randn(16)
    given = {"t": data.t, "noise": data.noise, "weight": data.weight, "compute_dtype": compute_dtype}
    expected = data.run("cpu", compute_dtype=compute_dtype, grad_losses=grad_losses)

    def losses(state: Tensor, action: Tensor) -> Tensor:
        arguments = (data.denoiser, SCHEDULE, state, action)
        return ops.denoising_loss(*arguments, **given, reduction="none")

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    result = compiled(data.state, data.action)
    torch.testing.assert_close(result.detach(), expected[0])
    result.backward(grad_losses)
    for parameter, gradient in zip(data.denoiser.parameters(), expected[3:], strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_func_grad_and_vmap_of_losses_of_rows() -> None:
    data, grad_losses = Data(12, weighted=True), torch.randn(3, 4)

    def weighed(action: Tensor, weight: Tensor, grad_losses: Tensor) -> Tensor:
        given = {"t": data.t[:4], "noise": data.noise[:4], "weight": weight, "reduction": "none"}
        losses = ops.denoising_loss(data.denoiser, SCHEDULE, data.state[:4], action, **given)
        return grad_losses @ losses

    rows = (*(x.unflatten(0, (3, 4)) for x in (data.action, data.weight)), grad_losses)
    grads = torch.func.vmap(torch.func.grad(weighed))(*rows)
    for grad, action, weight, of_losses in zip(grads, *rows, strict=True):
        expected = action.clone().requires_grad_()
        weighed(expected, weight, of_losses).backward()
        torch.testing.assert_close(grad, expected.grad)


def test_losses_of_rows_of_any_callable() -> None:
    data = Data(5)
    given = {"t": data.t, "noise": data.noise, "reduction": "none"}
    losses = ops.denoising_loss(lambda x, s, t: x, SCHEDULE, data.state, data.action, **given)
    noisy = ops.q_sample(data.action, data.t, data.noise, SCHEDULE)
    torch.testing.assert_close(losses, (noisy - data.noise).square().mean(1))


# -- as a part of PyTorch --------------------------------------------------------------------------


def test_opcheck() -> None:
    data = Data(5)
    levels, embedding = _tables(SCHEDULE, 32, torch.device("cpu"))
    parameters = [p.detach() for p in data.denoiser.parameters()]
    rows, tables = (data.state, data.action, data.noise), (data.t, levels, embedding, "mish")
    cases = itertools.product(
        ((True, None), (False, None), (True, torch.rand(5))),
        ("mean", "none"),
        ("float32", "bfloat16"),
    )
    for (wanted, weight), reduction, precision in cases:
        flags = [wanted] * (2 + len(parameters))
        arguments = (*rows, weight, *tables, reduction, flags, parameters, precision, "cpu")
        torch.library.opcheck(native.loss_and_gradients.overload, arguments)
    torch.library.opcheck(native.normals.overload, (torch.tensor(3), data.action, "cpu"))


@pytest.mark.parametrize("compute_dtype", PRECISIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_compiles_whole(compute_dtype: torch.dtype, weighted: bool) -> None:
    data = Data(16, weighted=weighted)
    given = {"t": data.t, "noise": data.noise, "weight": data.weight, "compute_dtype": compute_dtype}
    expected_gradients = data.run("cpu", compute_dtype=compute_dtype)[3:]

    def loss(state: Tensor, action: Tensor) -> Tensor:
        return ops.denoising_loss(data.denoiser, SCHEDULE, state, action, **given)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(data.state, data.action).backward()
    for parameter, expected in zip(data.denoiser.parameters(), expected_gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("known", [True, False])
def test_compiles_with_what_it_draws_for_any_schedule(known: bool) -> None:
    """An open number of levels, where torch.compile leaves sizes open."""
    ours, state, action = nn.Denoiser(5, 3, 8), torch.randn(4, 5), torch.randn(4, 3)
    denoiser = ours if known else lambda x, s, t: ours(x, s, t)

    def loss(schedule: DiffusionSchedule) -> Tensor:
        return ops.denoising_loss(denoiser, schedule, state, action)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps in (4, 6):
        schedule = DiffusionSchedule.linear(steps)
        drawn = []
        for call in (compiled, loss):
            torch.manual_seed(0)
            drawn.append(call(schedule))
        torch.testing.assert_close(*drawn)


def test_func_grad_and_vmap() -> None:
    data = Data(12, weighted=True)

    def loss(action: Tensor, noise: Tensor, weight: Tensor | None) -> Tensor:
        given = {"t": data.t[:4], "noise": noise, "weight": weight}
        return ops.denoising_loss(data.denoiser, SCHEDULE, data.state[:4], action, **given)

    rows = [x.unflatten(0, (3, 4)) for x in (data.action, data.noise, data.weight)]
    for weights, dim in ((rows[2], 0), ([None] * 3, None)):
        in_dims = (0, 0, dim)
        mapped = torch.func.vmap(torch.func.grad(loss), in_dims)
        grads = mapped(*rows[:2], None if dim is None else weights)
        for grad, action, noise, weight in zip(grads, *rows[:2], weights, strict=True):
            expected = action.clone().requires_grad_()
            loss(expected, noise, weight).backward()
            torch.testing.assert_close(grad, expected.grad)


def test_autocast_hands_over_in_float32() -> None:
    """What layers before it computed in bfloat16 is widened; the loss itself isn't touched."""
    data = Data(5, weighted=True)
    rows = [x.bfloat16() for x in (data.state, data.action, data.noise, data.weight)]
    state, action, noise, weight = rows
    with torch.autocast("cpu", torch.bfloat16):
        given = {"t": data.t, "noise": noise, "weight": weight, "backend": "cpu"}
        loss = ops.denoising_loss(data.denoiser, SCHEDULE, state, action, **given)
    data.state, data.action, data.noise, data.weight = (x.float() for x in rows)
    assert torch.equal(loss.detach(), data.run("cpu")[0])


def test_func_grad_of_the_weight() -> None:
    data = Data(5, weighted=True)

    def loss(weight: Tensor) -> Tensor:
        given = {"t": data.t, "noise": data.noise, "weight": weight}
        return ops.denoising_loss(data.denoiser, SCHEDULE, data.state, data.action, **given)

    expected = torch.autograd.functional.jacobian(loss, data.weight)
    torch.testing.assert_close(torch.func.grad(loss)(data.weight), expected)
    assert expected.abs().min() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"denoiser": 3}, "denoiser: expected a Denoiser or a callable, got int"),
        ({"schedule": 3}, "schedule: expected a DiffusionSchedule, got int"),
        ({"state": torch.randn(5, 8)}, r"state: expected shape \[B, 7\], got \[5, 8\]"),
        ({"action": torch.randn(4, 3)}, r"action: expected shape \[5, 3\], got \[4, 3\]"),
        ({"action": torch.randn(5, 3).double()}, "action: expected torch.float32 like state"),
        ({"t": torch.zeros(5)}, "t: expected an integer tensor, got torch.float32"),
        ({"t": torch.zeros(4, dtype=torch.int64)}, r"t: expected shape \[5\], got \[4\]"),
        ({"t": torch.full((5,), 20)}, "t: expected levels in 0..19"),
        ({"t": torch.full((5,), -1)}, "t: expected levels in 0..19"),
        ({"noise": torch.randn(5, 2)}, r"noise: expected shape \[5, 3\], got \[5, 2\]"),
        ({"weight": 0.5}, "weight: expected a tensor, got float"),
        ({"weight": torch.ones(5, 1)}, r"weight: expected shape \[5\], got \[5, 1\]"),
        ({"weight": torch.ones(5).double()}, "weight: expected torch.float32 like action"),
        ({"reduction": "sum"}, "reduction: expected one of mean, none, got 'sum'"),
        ({"reduction": None}, "reduction: expected one of mean, none, got None"),
        ({"generator": 3}, "generator: expected a torch.Generator, got int"),
        ({"compute_dtype": torch.float64}, "compute_dtype: expected None"),
        ({"backend": "gpu"}, "backend: expected one of cpu, reference"),
        ({"denoiser": lambda x, s, t: x[:, None]}, r"^denoiser: .* shape \[5, \d+\] like x, got"),
        ({"denoiser": lambda x, s, t: x.mean()}, r"^denoiser: .* like x, got \[\]"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    data = Data(5)
    arguments = {
        "denoiser": data.denoiser,
        "schedule": SCHEDULE,
        "state": data.state,
        "action": data.action,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        ops.denoising_loss(**{**arguments, **change})
