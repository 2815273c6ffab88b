"""The soft value and the policy's loss in one call: the same as its parts one by one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BATCHES, root_mean_square
from torch import Tensor, nn
from torch.func import functional_call

from diffcore import explain, ops
from diffcore.agents.optimization import frozen
from diffcore.nn import Psi, SquashedGaussian, TwinRFFCritic
from diffcore.ops import _native
from diffcore.ops.soft_value import native

STATE, ACTION = 5, 2
needs_kernels = pytest.mark.skipif(_native._core is None, reason="needs the compiled module")
Networks = tuple[SquashedGaussian, Psi, TwinRFFCritic]


def make_networks(
    hidden: int = 9, features: int = 7, action: int = ACTION, **options: Any
) -> Networks:
    """Of which the policy is to be trained, judged by the others."""
    policy = SquashedGaussian(STATE, action, hidden, **options)
    psi = Psi(STATE, action, features, hidden + 1, **options)
    critics = TwinRFFCritic(features, hidden + 2, **options)
    return policy, psi.requires_grad_(False), critics.requires_grad_(False)


def make_inputs(batch: int = 9, action: int = ACTION) -> list[Tensor]:
    """state, noise and temperature."""
    return [torch.randn(batch, STATE), torch.randn(batch, action), torch.tensor(0.3)]


def in_parts(
    policy: SquashedGaussian, psi: Psi, critics: TwinRFFCritic, *inputs: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    state, noise, temperature = inputs
    action, log_prob = policy.sample(state, noise, **options)
    q = torch.minimum(*critics(psi(state, action, **options), **options))
    value = q - temperature * log_prob
    return -value.mean(), value.detach(), log_prob.detach()


def with_gradients(
    run: Callable[..., tuple[Tensor, Tensor, Tensor]],
    networks: Networks,
    inputs: list[Tensor],
    **options: Any,
) -> list[Tensor]:
    """[loss, V, log pi, gradients of the policy's parameters]."""
    loss, value, log_prob = run(*networks, *inputs, **options)
    assert not value.requires_grad
    assert not log_prob.requires_grad
    gradients = torch.autograd.grad(loss, list(networks[0].parameters()))
    return [loss.detach(), value, log_prob, *gradients]


def exactly(networks: Networks, inputs: list[Tensor]) -> list[Tensor]:
    policy, psi, critics = (copy.deepcopy(network).double() for network in networks)
    return with_gradients(ops.soft_value, (policy, psi, critics), [t.double() for t in inputs])


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- right values ----------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("batch", BATCHES[1:])
@pytest.mark.parametrize(("hidden", "features", "action"), [(9, 7, 2), (43, 35, 6), (20, 64, 17)])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_the_same_as_its_parts(
    isa: str,
    batch: int,
    hidden: int,
    features: int,
    action: int,
    compute_dtype: torch.dtype | None,
) -> None:
    networks = make_networks(hidden, features, action, compute_dtype=compute_dtype)
    inputs = make_inputs(batch, action)
    ours = with_gradients(ops.soft_value, networks, inputs, backend="cpu")
    theirs = with_gradients(in_parts, networks, inputs)
    assert torch.equal(ours[2], theirs[2])
    # torch rounds temperature times log pi; a loss is the sum of its rows in another order.
    bound = 1e-6 if compute_dtype is None else 2e-3
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=bound * max([1.0, *b.abs().flatten().tolist()]))


def test_close_to_exact(backend: str) -> None:
    networks, inputs = make_networks(), make_inputs()
    ours = with_gradients(ops.soft_value, networks, inputs, backend=backend)
    for a, b in zip(ours, exactly(networks, inputs), strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-6)


@needs_kernels
def test_bfloat16_is_within_its_bound(isa: str) -> None:
    networks = make_networks(100, 70, 6, compute_dtype=torch.bfloat16)
    inputs = make_inputs(512, 6)
    ours = with_gradients(ops.soft_value, networks, inputs, backend="cpu")
    for a, b in zip(ours[1:], exactly(networks, inputs)[1:], strict=True):
        assert root_mean_square(a - b) <= 0.03 * root_mean_square(b)
        assert root_mean_square(a - b) >= 1e-4 * root_mean_square(b)  # not float32 after all


@needs_kernels
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(
    isa: str, set_threads: Callable[[int], None], compute_dtype: torch.dtype | None
) -> None:
    networks, inputs = make_networks(compute_dtype=compute_dtype), make_inputs(301)
    results = []
    for threads in (1, 2, 2):
        set_threads(threads)
        results.append(with_gradients(ops.soft_value, networks, inputs))
    for other in results[1:]:
        assert_same(results[0], other)


@needs_kernels
def test_a_row_does_not_know_its_batch(isa: str) -> None:
    networks, (state, noise, temperature) = make_networks(), make_inputs(256)
    with torch.no_grad():
        _, *whole = ops.soft_value(*networks, state, noise, temperature)
        for rows in (1, 7, 100):
            _, *part = ops.soft_value(*networks, state[:rows], noise[:rows], temperature)
            assert_same([w[:rows] for w in whole], part)


@needs_kernels
def test_critics_that_agree_share_the_gradient(isa: str) -> None:
    policy, psi, critics = make_networks()
    critics.q2.load_state_dict(critics.q1.state_dict())
    networks, inputs = (policy, psi, critics), make_inputs()
    ours = with_gradients(ops.soft_value, networks, inputs, backend="cpu")
    for a, b in zip(ours, exactly(networks, inputs), strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("critic", ["q1", "q2"])
def test_nan_stays_nan(isa: str, critic: str) -> None:
    networks, (state, noise, temperature) = make_networks(), make_inputs()
    getattr(networks[2], critic).head.layers[-1].bias.fill_(float("nan"))
    for result in with_gradients(ops.soft_value, networks, [state, noise, temperature])[3:]:
        assert result.isnan().any()
    assert ops.soft_value(*networks, state, noise, temperature)[1].isnan().all()


@needs_kernels
def test_weights_changed_behind_autograd_count(isa: str) -> None:
    networks, inputs = make_networks(), make_inputs()
    layers = (networks[0].trunk, networks[1].trunk, networks[2].q2.head)
    before = with_gradients(ops.soft_value, networks, inputs)
    for layer in layers:
        layer.layers[0].weight.data[0] += 1
        after = with_gradients(ops.soft_value, networks, inputs)
        assert not torch.equal(before[-1], after[-1])
        before = after


def test_gradient_of_the_reference() -> None:
    policy, psi, critics = (network.double() for network in make_networks())
    inputs = [t.double().requires_grad_() for t in make_inputs(3)]

    def loss(*inputs: Tensor) -> Tensor:
        return ops.soft_value(policy, psi, critics, *inputs)[0]  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(loss, inputs)


def test_empty_batch_gives_what_a_mean_over_nothing_is(backend: str) -> None:
    arguments = make_networks(), make_inputs(0)
    loss, value, log_prob, *grads = with_gradients(ops.soft_value, *arguments, backend=backend)
    assert loss.isnan()
    assert value.shape == log_prob.shape == (0, 1)
    assert not any(g.any() for g in grads)


# -- as a part of PyTorch --------------------------------------------------------------------------


@needs_kernels
def test_without_gradients() -> None:
    networks, inputs = make_networks(), make_inputs()
    expected = with_gradients(ops.soft_value, networks, inputs)[:3]
    with torch.no_grad():
        results = ops.soft_value(*networks, *inputs)
    assert not results[0].requires_grad
    assert_same(list(results), expected)


@needs_kernels
def test_backward_twice_and_scaled() -> None:
    networks, inputs = make_networks(), make_inputs()
    expected = with_gradients(ops.soft_value, networks, inputs)[3:]
    parameters = list(networks[0].parameters())
    loss, _, _ = ops.soft_value(*networks, *inputs)
    for factor in (1.0, 3.0):
        gradients = torch.autograd.grad(factor * loss, parameters, retain_graph=True)
        assert_same(list(gradients), [factor * g for g in expected])
    loss.backward()
    assert_same([p.grad for p in parameters], expected)  # type: ignore[misc]


@needs_kernels
def test_second_derivative_is_refused() -> None:
    networks = make_networks()
    loss, _, _ = ops.soft_value(*networks, *make_inputs())
    parameter = next(networks[0].parameters())
    (slope,) = torch.autograd.grad(loss, parameter, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*backend='reference'"):
        slope.sum().backward()


@needs_kernels
def test_torch_func() -> None:
    networks, inputs = make_networks(), make_inputs()
    expected = with_gradients(ops.soft_value, networks, inputs)
    policy, *judges = networks

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = policy

        def forward(self, *inputs: Tensor) -> Tensor:
            return ops.soft_value(self.policy, *judges, *inputs)[0]

    module = Loss()
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        return functional_call(module, parameters, inputs)  # type: ignore[no-any-return]

    gradients = torch.func.grad(loss)(parameters, *inputs)
    assert_same(list(gradients.values()), expected[3:])

    def of_one_row(parameters: dict[str, Tensor], *row: Tensor) -> Tensor:
        state, noise, temperature = row
        return loss(parameters, state[None], noise[None], temperature)

    in_dims = (None, 0, 0, None)
    per_row = torch.func.vmap(torch.func.grad(of_one_row), in_dims)(parameters, *inputs)
    for gradient, whole in zip(per_row.values(), expected[3:], strict=True):
        assert torch.allclose(gradient.mean(0), whole, atol=1e-5)


@needs_kernels
def test_compiles_without_a_graph_break() -> None:
    networks, inputs = make_networks(), make_inputs()

    def twice(*inputs: Tensor) -> Tensor:
        return 2 * ops.soft_value(*networks, *inputs, backend="cpu")[0]

    parameters = list(networks[0].parameters())
    ours = torch.autograd.grad(torch.compile(twice, fullgraph=True)(*inputs), parameters)
    assert_same(list(ours), list(torch.autograd.grad(twice(*inputs), parameters)))


@needs_kernels
def test_autocast_hands_over_in_float32() -> None:
    networks, (state, noise, temperature) = make_networks(), make_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = ops.soft_value(*networks, state.bfloat16(), noise, temperature)
    raised = state.bfloat16().float()
    assert torch.equal(loss, ops.soft_value(*networks, raised, noise, temperature)[0])


@needs_kernels
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_opcheck(wanted: bool, precision: str) -> None:
    policy, psi, critics = ([p.detach() for p in n.parameters()] for n in make_networks())
    kinds = ("elu,elu,identity", "elu,identity", "sin,elu,identity")
    arguments = (*make_inputs(), psi, critics, policy, wanted, *kinds, -5.0, 2.0, precision)
    torch.library.opcheck(native.values_and_gradients.overload, arguments)


@needs_kernels
def test_what_the_kernel_can_not_take() -> None:
    (policy, psi, critics), inputs = make_networks(), make_inputs()

    def why(critics: TwinRFFCritic = critics, psi: Psi = psi) -> str:
        answer = explain("soft_value", policy, psi, critics, *inputs)
        assert answer.backend == "reference"
        return answer.passed_over["cpu"]

    assert why(TwinRFFCritic(7, 8, "gaussian")).endswith("an op of their own")
    assert "compute_dtypes" in why(psi=make_networks(compute_dtype=torch.bfloat16)[1])
    for network in (policy, policy.trunk, psi, psi.trunk, critics, critics.q2, critics.q1.head):
        with network.register_forward_hook(lambda *_: None):
            assert "has hooks" in why()
    psi.requires_grad_(True)
    assert why().startswith("something beside the policy requires a gradient")
    ours = ops.soft_value(policy, psi, critics, *inputs)
    expected = in_parts(policy, psi, critics, *inputs)
    assert_same([t.detach() for t in ours], [t.detach() for t in expected])
    ours[0].backward()
    assert all(p.grad is not None for p in itertools.chain(policy.parameters(), psi.parameters()))
    with frozen(psi.parameters()):
        assert explain("soft_value", policy, psi, critics, *inputs).backend == "cpu"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"policy": nn.Linear(5, 6)}, TypeError, "^policy: expected a diffcore.nn.SquashedGaussian"),
        ({"psi": None}, TypeError, "^psi: expected a diffcore.nn.Psi, got NoneType"),
        ({"critics": None}, TypeError, "^critics: expected a diffcore.nn.TwinRFFCritic, got None"),
        ({"psi": Psi(5, 3, 7)}, ValueError, "^psi: expected states of 5 and actions of 2 numbers"),
        ({"critics": TwinRFFCritic(6)}, ValueError, "^critics: expected 7 features like psi"),
        ({"psi": Psi(5, 2, 7).double()}, TypeError, "^psi: expected torch.float32 like state"),
        ({"state": "x"}, TypeError, "^state: expected a tensor, got str"),
        ({"state": torch.zeros(9, 4)}, ValueError, r"^state: expected shape \[B, 5\], got \[9, 4\]"),
        ({"noise": torch.zeros(8, 2)}, ValueError, r"^noise: expected shape \[9, 2\], got \[8, 2\]"),
        ({"temperature": torch.zeros(1)}, ValueError, r"^temperature: expected shape \[\], got"),
        ({"temperature": 0.1}, TypeError, "^temperature: expected a tensor, got float"),
        ({"backend": "gpu"}, ValueError, "^backend: expected one of cpu, reference"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    names = ("policy", "psi", "critics", "state", "noise", "temperature")
    arguments = dict(zip(names, (*make_networks(), *make_inputs()), strict=True))
    with pytest.raises(error, match=message):
        ops.soft_value(**{**arguments, **change})
