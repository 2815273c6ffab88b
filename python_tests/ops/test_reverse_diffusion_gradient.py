"""The chain as a differentiable function: eager, torch.func, torch.compile, autocast."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import ACTIVATIONS
from torch import Tensor

from diffcore import DiffusionSchedule, nn, ops
from diffcore.ops.reverse_diffusion.native import chain, chain_backward
from diffcore.schedule import SOLVERS

STEPS = 6
SCHEDULE = DiffusionSchedule.linear(STEPS)


class Policy(torch.nn.Module):
    """The chain as a module, so that torch.func can hand it parameters."""

    def __init__(
        self, denoiser: nn.Denoiser, schedule: DiffusionSchedule = SCHEDULE, **options: Any
    ) -> None:
        super().__init__()
        self.denoiser, self.schedule, self.options = denoiser, schedule, options

    def forward(self, state: Tensor, x_init: Tensor, noise: Tensor) -> Tensor:
        return ops.reverse_diffusion(
            self.denoiser, self.schedule, state, x_init=x_init, noise=noise, **self.options
        )


def draw(rows: int = 9, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """state, x_init, noise."""
    shapes = (rows, 5), (rows, 3), (STEPS, rows, 3)
    state, x_init, noise = (torch.randn(*shape, dtype=dtype) for shape in shapes)
    return state, x_init, noise


def gradients(policy: Policy, inputs: tuple[Tensor, ...], weights: Tensor) -> dict[str, Tensor]:
    """Of a weighted sum of the actions, in every input and parameter."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    names = ["state", "x_init", "noise", *(name for name, _ in policy.named_parameters())]
    loss = (policy(*leaves) * weights).sum()
    grads = torch.autograd.grad(loss, [*leaves, *policy.parameters()])
    return dict(zip(names, grads, strict=True))


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.5, math.inf])
@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_are_the_reference_s(isa: str, solver: str, clip: float) -> None:
    """Clipped or not, all are known to 1e-4 of the largest of their tensor."""
    denoiser, inputs, weights = nn.Denoiser(5, 3, 24, 2), draw(65), torch.randn(65, 3)
    options = {"solver": solver, "clip": clip, "noise_scale": 0.8}
    native = gradients(Policy(denoiser, backend="cpu", **options), inputs, weights)
    reference = gradients(Policy(denoiser, backend="reference", **options), inputs, weights)
    for name, expected in reference.items():
        scale = expected.abs().max().item()
        if name == "noise" and not SCHEDULE.solver(solver).coefficients[:, 5].any():
            assert scale == 0  # a deterministic sampler
        else:
            assert scale > 0
        torch.testing.assert_close(native[name], expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layers", [1, 3])
def test_gradients_of_every_activation(activation: str, layers: int) -> None:
    denoiser = nn.Denoiser(5, 3, 17, layers, activation=activation)
    inputs, weights = draw(13), torch.randn(13, 3)
    fastest = gradients(Policy(denoiser, clip=2.0), inputs, weights)
    exact = gradients(
        Policy(copy.deepcopy(denoiser).double(), clip=2.0),
        tuple(value.double() for value in inputs),
        weights.double(),
    )
    for name, expected in exact.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(fastest[name].double(), expected, rtol=0, atol=1e-4 * scale)


def test_gradients_of_a_long_chain(isa: str) -> None:
    """K = 100 and the width of the paper's network."""
    denoiser, schedule = nn.Denoiser(17, 6), DiffusionSchedule.cosine(100)
    state, x, noise = torch.randn(16, 17), torch.randn(16, 6), torch.randn(100, 16, 6)
    state.requires_grad_()
    grads = []
    for backend in ("cpu", "reference"):
        actions = ops.reverse_diffusion(
            denoiser, schedule, state, x_init=x, noise=noise, backend=backend
        )
        grads.append(torch.autograd.grad(actions.sum(), [state, *denoiser.parameters()]))
    for native, reference in zip(*grads, strict=True):
        scale = reference.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(native, reference, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradcheck_of_the_reference(solver: str) -> None:
    """First and second derivatives in float64, in every input and parameter of a tiny network."""
    schedule = DiffusionSchedule(SCHEDULE.betas[:3])
    denoiser = nn.Denoiser(2, 2, 3, 1, time_dim=2).double()
    policy = Policy(denoiser, schedule, solver=solver, clip=1.5)
    names = [name for name, _ in policy.named_parameters()]

    def actions(state: Tensor, x: Tensor, noise: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(policy, values, (state, x, noise))

    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in ((2, 2), (2, 2), (3, 2, 2))]
    leaves = [t.detach().clone().requires_grad_() for t in (*inputs, *policy.parameters())]
    assert torch.autograd.gradcheck(actions, leaves)
    assert torch.autograd.gradgradcheck(actions, leaves)


def test_drawn_noise_is_differentiated_through(isa: str) -> None:
    """What is drawn inside is a constant: the gradient is that of the same noise given."""
    denoiser, state = nn.Denoiser(5, 3, 16), torch.randn(9, 5)
    grads = []
    for backend in ("cpu", "reference"):
        generator = torch.Generator().manual_seed(4)
        actions = ops.reverse_diffusion(
            denoiser, SCHEDULE, state, generator=generator, backend=backend
        )
        grads.append(torch.autograd.grad(actions.square().sum(), list(denoiser.parameters())))
    for native, reference in zip(*grads, strict=True):
        scale = reference.abs().max().item()
        torch.testing.assert_close(native, reference, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("wanted", ["state", "x_init", "noise", "parameters"])
def test_only_what_requires_a_gradient_gets_one(wanted: str) -> None:
    denoiser = nn.Denoiser(5, 3, 8).requires_grad_(wanted == "parameters")
    tensors = dict(zip(("state", "x_init", "noise"), draw(), strict=True))
    for name, value in tensors.items():
        value.requires_grad_(name == wanted)
    ops.reverse_diffusion(denoiser, SCHEDULE, **tensors).sum().backward()
    for name, value in tensors.items():
        assert (value.grad is not None) == (name == wanted)
    for parameter in denoiser.parameters():
        assert (parameter.grad is not None) == (wanted == "parameters")


def test_no_gradient_where_none_is_asked_for() -> None:
    policy, inputs = Policy(nn.Denoiser(5, 3, 8)), draw()
    assert policy(*inputs).requires_grad
    with torch.no_grad():
        assert not policy(*inputs).requires_grad
    policy.requires_grad_(False)
    assert not policy(*inputs).requires_grad


def test_batch_of_zero(backend: str) -> None:
    policy = Policy(nn.Denoiser(5, 3, 8), backend=backend)
    grads = gradients(policy, draw(0), torch.randn(0, 3))
    assert grads["state"].shape == (0, 5)
    for name, parameter in policy.named_parameters():
        assert torch.equal(grads[name], torch.zeros_like(parameter))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_training_after_inference_mode(backend: str) -> None:
    """What is cached in inference mode must serve training too."""
    schedule = DiffusionSchedule.linear(STEPS)  # a new one: in no cache yet
    policy, inputs = Policy(nn.Denoiser(5, 3, 8), schedule, backend=backend), draw()
    with torch.inference_mode():
        before = policy(*inputs)
    actions = policy(*inputs)
    actions.sum().backward()
    torch.testing.assert_close(actions, before)


def test_bfloat16_chain_has_gradients(isa: str) -> None:
    """The way back runs in float32 from the x of the bfloat16 chain: near float32's gradient."""
    denoiser, inputs, weights = nn.Denoiser(5, 3, 24, 2), draw(65), torch.randn(65, 3)
    half = gradients(Policy(denoiser, compute_dtype=torch.bfloat16), inputs, weights)
    full = gradients(Policy(denoiser), inputs, weights)
    for name, expected in full.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(half[name], expected, rtol=0, atol=0.05 * scale)


# -- second derivatives ----------------------------------------------------------------------------


def test_second_derivative_says_that_there_is_none() -> None:
    state, x_init, noise = draw()
    denoiser = nn.Denoiser(5, 3, 8)
    state.requires_grad_()
    message = "no second derivative; pass backend='reference'"

    loss = Policy(denoiser, backend="cpu")(state, x_init, noise).square().sum()
    (first,) = torch.autograd.grad(loss, state, create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(first.sum(), state)

    def twice(policy: Policy) -> Tensor:
        def slope(state: Tensor) -> Tensor:
            return torch.func.grad(lambda s: policy(s, x_init, noise).square().sum())(state).sum()

        return torch.func.grad(slope)(state.detach())

    with pytest.raises(RuntimeError, match=message):
        twice(Policy(denoiser, backend="cpu"))
    assert twice(Policy(denoiser, backend="reference")).abs().max() > 0


def test_forward_mode_runs_on_the_reference() -> None:
    """Forward over reverse gives second derivatives too; frozen weights change nothing."""
    state, x_init, noise = draw(2, torch.float32)
    for trained in (True, False):
        policy = Policy(nn.Denoiser(5, 3, 8).requires_grad_(trained), clip=3.0)

        def actions(state: Tensor, policy: Policy = policy) -> Tensor:
            return policy(state, x_init, noise)

        direction = torch.randn_like(state)
        tangent = torch.func.jvp(actions, (state,), (direction,))[1]
        jacobian = torch.func.jacrev(actions)(state)
        expected = (jacobian * direction).sum(dim=(2, 3))
        assert expected.abs().max() > 0
        torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-6)
        hessian = torch.func.hessian(lambda s, f=actions: f(s).square().sum())(state)
        assert hessian.abs().max() > 0


# -- torch.func ------------------------------------------------------------------------------------


def test_func_grad() -> None:
    policy, inputs, weights = Policy(nn.Denoiser(5, 3, 8)), draw(), torch.randn(9, 3)
    expected = gradients(policy, inputs, weights)

    def loss(*inputs: Tensor) -> Tensor:
        return (policy(*inputs) * weights).sum()

    for i, name in enumerate(("state", "x_init", "noise")):
        torch.testing.assert_close(torch.func.grad(loss, argnums=i)(*inputs), expected[name])


def test_vmap() -> None:
    """Over any of the inputs; the kernel runs the whole as one batch, bitwise the same."""
    policy = Policy(nn.Denoiser(5, 3, 8)).requires_grad_(False)
    columns = zip(*(draw() for _ in range(4)), strict=True)
    state, x_init, noise = (torch.stack(column) for column in columns)
    for dims in ((0, 0, 0), (0, None, None), (None, 0, 0), (None, None, 0)):
        values = [v if d == 0 else v[0] for v, d in zip((state, x_init, noise), dims, strict=True)]
        expected = torch.stack(
            [
                policy(*(v[i] if d == 0 else v for v, d in zip(values, dims, strict=True)))
                for i in range(4)
            ]
        )
        assert torch.equal(torch.vmap(policy, in_dims=dims)(*values), expected)
    other = torch.vmap(policy, in_dims=(1, 2, 3), out_dims=1)(
        state.movedim(0, 1), x_init.movedim(0, 2), noise.movedim(0, 3)
    )
    assert torch.equal(other.movedim(1, 0), torch.vmap(policy)(state, x_init, noise))


def test_vmap_of_grad_gives_gradients_per_sample() -> None:
    policy, (state, x_init, noise) = Policy(nn.Denoiser(5, 3, 8)), draw()

    def loss(state: Tensor, x: Tensor, z: Tensor) -> Tensor:
        return policy(state[None], x[None], z[:, None]).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(0, 0, 1))(state, x_init, noise)
    state.requires_grad_()
    (expected,) = torch.autograd.grad(policy(state, x_init, noise).square().sum(), state)
    torch.testing.assert_close(per_sample, expected)


def test_functional_parameters() -> None:
    """torch.func's way of training: parameters are an argument; and an ensemble of them."""
    policies = [Policy(nn.Denoiser(5, 3, 8)) for _ in range(3)]
    inputs, weights = draw(), torch.randn(9, 3)
    expected = [gradients(policy, inputs, weights) for policy in policies]

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        actions = torch.func.functional_call(policies[0], parameters, inputs)
        return (actions * weights).sum()

    stacked, _ = torch.func.stack_module_state(policies)
    stacked = {name: value.detach() for name, value in stacked.items()}
    one = torch.func.grad(loss)({name: value[1] for name, value in stacked.items()})
    ensemble = torch.vmap(torch.func.grad(loss))(stacked)
    for name, value in one.items():
        torch.testing.assert_close(value, expected[1][name])
        for i in range(3):
            torch.testing.assert_close(ensemble[name][i], expected[i][name])


def test_vmap_with_drawn_noise() -> None:
    denoiser, states = nn.Denoiser(5, 3, 8).requires_grad_(False), torch.randn(4, 9, 5)

    def actions(state: Tensor) -> Tensor:
        return ops.reverse_diffusion(denoiser, SCHEDULE, state)

    torch.manual_seed(3)
    same = torch.vmap(actions, randomness="same")(states)
    for state, result in zip(states, same, strict=True):
        torch.manual_seed(3)
        assert torch.equal(result, actions(state))
    torch.manual_seed(3)
    different = torch.vmap(actions, randomness="different")(states[:1].expand(4, -1, -1))
    assert len({tuple(row.flatten().tolist()) for row in different}) == 4
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(actions)(states)


# -- torch.library and torch.compile ---------------------------------------------------------------


def op_arguments(rows: int, given: bool) -> tuple[list[Any], list[Any]]:
    """state, x_init, noise, seed, parameters, and the settings up to the activation's name."""
    denoiser, (state, x_init, noise) = nn.Denoiser(5, 3, 8, 2), draw(rows)
    parameters = [p.detach() for p in denoiser.parameters()]
    table = SCHEDULE.solver("ddpm")
    embedding = nn.time_embedding(table.timesteps, denoiser.time_dim).float()
    seed = None if given else torch.tensor(5)
    tensors = [state, *((x_init, noise) if given else (None, None)), seed, parameters]
    return tensors, [table.coefficients.float(), embedding, 1.0, 1.0, "mish"]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("keep_trajectory", [True, False])
def test_opcheck_of_the_chain(given: bool, keep_trajectory: bool) -> None:
    tensors, settings = op_arguments(4, given)
    arguments = (*tensors, *settings, "float32", keep_trajectory, "cpu")
    torch.library.opcheck(torch.ops.diffcore.reverse_diffusion.default, arguments)


@pytest.mark.parametrize("wants_noise", [True, False])
def test_opcheck_of_its_gradient(wants_noise: bool) -> None:
    (state, *rest), settings = op_arguments(4, True)
    _, trajectory = chain(state, *rest, *settings, "float32", True, "cpu")
    arguments = (torch.randn(4, 3), trajectory, state, rest[-1], *settings, wants_noise, "cpu")
    torch.library.opcheck(torch.ops.diffcore.reverse_diffusion_backward.default, arguments)
    assert len(chain_backward(*arguments)) == 3 + len(rest[-1])


def test_compile() -> None:
    """Forward and backward in one graph, for another batch and another solver too."""
    policy, weights = Policy(nn.Denoiser(5, 3, 8)), torch.randn(3)
    for solver in ("ddpm", "dpmpp_2m"):
        policy.options = {"solver": solver}
        compiled = torch.compile(policy, fullgraph=True, backend="aot_eager")
        for rows in (4, 9):
            inputs = draw(rows)
            expected = gradients(policy, inputs, weights)
            actual = gradients(compiled, inputs, weights)
            for (name, value), wanted in zip(actual.items(), expected.values(), strict=True):
                torch.testing.assert_close(value, wanted, msg=lambda m, n=name: f"{n}: {m}")
        with torch.no_grad():
            assert torch.equal(compiled(*inputs), policy(*inputs))


def test_compile_with_inductor() -> None:
    """A policy-gradient step as one graph: features, chain, critic, loss and gradients."""
    encoder, critic = torch.nn.Linear(7, 5), nn.TwinCritic(5, 3, 8)
    denoiser = nn.Denoiser(5, 3, 8)

    def loss(observation: Tensor, x: Tensor, noise: Tensor) -> Tensor:
        state = torch.tanh(encoder(observation))
        actions = ops.reverse_diffusion(denoiser, SCHEDULE, state, x_init=x, noise=noise)
        return -torch.min(*critic(state, actions)).mean()

    _, x, noise = draw(4)
    observation = torch.randn(4, 7)
    parameters = [*encoder.parameters(), *denoiser.parameters(), *critic.parameters()]
    expected = torch.autograd.grad(loss(observation, x, noise), parameters)
    compiled = torch.compile(loss, fullgraph=True)
    actual = torch.autograd.grad(compiled(observation, x, noise), parameters)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_with_drawn_noise() -> None:
    """The key is drawn in the graph from the default generator, anew at every call."""
    denoiser = nn.Denoiser(5, 3, 8).requires_grad_(False)

    def actions(state: Tensor) -> Tensor:
        return ops.reverse_diffusion(denoiser, SCHEDULE, state)

    compiled = torch.compile(actions, fullgraph=True, backend="aot_eager")
    state = torch.randn(4, 5)
    torch.manual_seed(2)
    expected = [actions(state), actions(state)]
    torch.manual_seed(2)
    assert torch.equal(compiled(state), expected[0])
    assert torch.equal(compiled(state), expected[1])


# -- autocast --------------------------------------------------------------------------------------


def test_autocast() -> None:
    """The kernels stay in float32, both ways, and take what autocast's layers hand them."""
    encoder, policy = torch.nn.Linear(7, 5), Policy(nn.Denoiser(5, 3, 8), backend="cpu")
    state, x_init, noise = draw()
    parameters = list(policy.parameters())
    expected = policy(state, x_init, noise)
    grads = torch.autograd.grad(expected.sum(), parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actions = policy(state, x_init, noise)
        assert torch.equal(actions, expected)
        for a, b in zip(torch.autograd.grad(actions.sum(), parameters), grads, strict=True):
            assert torch.equal(a, b)
        features = encoder(torch.randn(9, 7))
        assert features.dtype == torch.bfloat16
        from_features = policy(features, x_init.bfloat16(), noise)
    from_features.sum().backward()
    assert from_features.dtype == torch.float32
    assert encoder.weight.grad.abs().max() > 0


def test_the_way_back_of_a_gpu_s_chain_is_float32_under_autocast() -> None:
    """It is made of torch's own products, which run here as well."""
    (state, *rest), settings = op_arguments(4, True)
    _, trajectory = chain(state, *rest, *settings, "float32", True, "cpu")
    arguments = (torch.randn(4, 3), trajectory, state, rest[-1], *settings, True, "triton")
    expected = chain_backward.kernel(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, chain_backward.kernel(*arguments), expected))


def test_autocast_of_the_reference() -> None:
    """There the network's layers run in autocast's precision, as anywhere in eager PyTorch."""
    policy, inputs = Policy(nn.Denoiser(5, 3, 8), backend="reference"), draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actions = policy(*inputs)
    actions.sum().backward()
    assert actions.dtype == torch.float32
    torch.testing.assert_close(actions, policy(*inputs), rtol=0, atol=2e-2)
