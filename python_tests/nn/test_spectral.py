"""Diff-SR's networks and soft actor-critic's policy: values, layout, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import load_golden
from torch import Tensor

from diffcore import nn, ops

# -- the policy ------------------------------------------------------------------------------------


def test_squashed_gaussian_samples_have_their_density() -> None:
    policy, state, noise = nn.SquashedGaussian(4, 2, 16), torch.randn(33, 4), torch.randn(33, 2)
    mean, log_std = policy(state)
    action, log_prob = policy.sample(state, noise)
    gaussian = torch.distributions.Normal(mean.double(), log_std.double().exp())
    squash = torch.distributions.TanhTransform()
    exact = torch.distributions.TransformedDistribution(gaussian, [squash])
    u = mean.double() + log_std.double().exp() * noise
    torch.testing.assert_close(action, u.tanh().float())
    log_det = squash.log_abs_det_jacobian(u, u.tanh())
    expected = (gaussian.log_prob(u) - log_det).sum(dim=1, keepdim=True)
    torch.testing.assert_close(log_prob.double(), expected, atol=1e-5, rtol=1e-5)
    inner = (action.double().abs() < 0.99).all(dim=1)
    again = exact.log_prob(action.double()).sum(dim=1, keepdim=True)
    torch.testing.assert_close(log_prob[inner].double(), again[inner], atol=1e-3, rtol=1e-3)
    assert torch.equal(policy.mode(state), mean.tanh())


def test_squashed_gaussian_is_finite_at_the_bounds() -> None:
    policy = nn.SquashedGaussian(3, 2, 8)
    state = 1e4 * torch.randn(16, 3)
    action, log_prob = policy.sample(state, torch.randn(16, 2))
    (action.sum() + log_prob.sum()).backward()
    assert torch.isfinite(log_prob).all()
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters() if p.grad is not None)


def test_log_standard_deviations_keep_their_bounds() -> None:
    policy = nn.SquashedGaussian(3, 2, 8, log_std_bounds=(-1.0, 0.5))
    _, log_std = policy(1e3 * torch.randn(64, 3))
    assert -1.0 <= float(log_std.min()) < -0.9
    assert 0.4 < float(log_std.max()) <= 0.5
    assert nn.SquashedGaussian(3, 2, 8).log_std_bounds == (-5.0, 2.0)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_a_sample_is_of_the_policys_bounds_and_precision(compute_dtype: torch.dtype | None) -> None:
    policy = nn.SquashedGaussian(3, 2, 32, log_std_bounds=(-1.0, 0.5), compute_dtype=compute_dtype)
    state, noise = torch.randn(64, 3), torch.randn(64, 2)
    mean, log_std = policy(state)
    action, _ = policy.sample(state, noise)
    torch.testing.assert_close(action, (mean + log_std.exp() * noise).tanh(), rtol=0, atol=1e-6)


class Doubtful(nn.SquashedGaussian):
    """A policy with a forward of its own, which knows nothing of backends."""

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        mean, log_std = super().forward(state)
        return mean, log_std + 1


def test_a_policy_that_is_more_than_its_weights_is_called() -> None:
    policy, state, noise = Doubtful(4, 2, 16), torch.randn(33, 4), torch.randn(33, 2)
    mean, log_std = policy(state)
    action, _ = policy.sample(state, noise)
    torch.testing.assert_close(action, (mean + log_std.exp() * noise).tanh())
    plain = nn.SquashedGaussian(4, 2, 16)
    before, _ = plain.sample(state, noise)
    with plain.trunk.register_forward_hook(lambda module, inputs, output: output + 1):
        after, _ = plain.sample(state, noise)
    assert (after > before).any()


@pytest.mark.parametrize("make", [lambda: nn.TwinCritic(3, 2, 8), lambda: nn.TwinRFFCritic(5, 8)])
def test_the_loss_of_critics_that_are_more_than_their_weights(make: Callable[[], Any]) -> None:
    critics, target = make(), torch.randn(7, 1)
    inputs = (torch.randn(7, 3), torch.randn(7, 2))
    if isinstance(critics, nn.TwinRFFCritic):
        inputs = (torch.cat(inputs, dim=1),)  # type: ignore[assignment]
    loss, q = critics.loss(*inputs, target)
    q1, q2 = critics(*inputs)
    torch.testing.assert_close(q, torch.stack([q1, q2]).detach())
    torch.testing.assert_close(loss, (q1 - target).square().mean() + (q2 - target).square().mean())
    weights, squares = torch.randn(7), (q1 - target).square() + (q2 - target).square()
    weighted = (weights[:, None] * squares).mean()
    torch.testing.assert_close(critics.loss(*inputs, target, weight=weights)[0], weighted)
    with critics.register_forward_hook(lambda module, inputs, q: (q[0] + 1, q[1])):
        moved, q_moved = critics.loss(*inputs, target)
        ones, _ = critics.loss(*inputs, target, weight=torch.ones(7))
        again, _ = critics.loss(*inputs, target, weight=weights)
        with torch.autocast("cpu", torch.bfloat16):
            lower, _ = critics.loss(*inputs, target, weight=weights.bfloat16())
    assert torch.equal(ones, moved)
    squares = (q1 + 1 - target).square() + (q2 - target).square()
    torch.testing.assert_close(again, (weights[:, None] * squares).mean())
    torch.testing.assert_close(lower, again, rtol=0.1, atol=0.1)
    torch.testing.assert_close(q_moved, torch.stack([q1 + 1, q2]).detach())
    assert moved.requires_grad
    assert not torch.equal(moved, loss)


def test_policy_weights_start_orthogonal() -> None:
    weight = nn.SquashedGaussian(4, 2, 16).trunk.layers[1].weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(16), atol=1e-5, rtol=0)


def test_temperature_is_kept_as_a_logarithm() -> None:
    temperature = nn.Temperature(0.1)
    assert temperature().item() == pytest.approx(0.1)
    assert [p.item() for p in temperature.parameters()] == [pytest.approx(math.log(0.1))]


# -- psi and zeta ----------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", ["alpha_bar", "time_embedding"])
@pytest.mark.parametrize("batch", [0, 1, 7])
def test_zeta_is_its_last_layer_on_what_enters_it(conditioning: str, batch: int) -> None:
    zeta = nn.Zeta(3, 5, 8, conditioning=conditioning)
    perturbed, alpha_bar = torch.randn(batch, 3), torch.rand(batch, 1)
    level = torch.arange(batch)
    whole = zeta(perturbed, alpha_bar, level)
    hidden = zeta.hidden(perturbed, alpha_bar, level)
    assert whole.shape == (batch, 5, 3)
    assert hidden.shape == (batch, 8)
    for d in range(5):
        rows = zeta.last.weight[3 * d : 3 * d + 3], zeta.last.bias[3 * d : 3 * d + 3]
        torch.testing.assert_close(whole[:, d], torch.nn.functional.linear(hidden, *rows))


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_the_last_layer_of_zeta_is_one_of_its_op(
    compute_dtype: torch.dtype | None, set_threads: Callable[[int], None]
) -> None:
    """In its precision, and with its promises: no bit depends on threads or batch."""
    zeta = nn.Zeta(17, 64, compute_dtype=compute_dtype)
    inputs = torch.randn(65, 17), torch.rand(65, 1), torch.arange(65)
    parameters = list(zeta.trunk.parameters())
    exact = ops.mlp(
        zeta.inputs(*inputs),
        parameters[::2],
        parameters[1::2],
        zeta.trunk.activations,
        compute_dtype=compute_dtype,
    )
    for threads in (1, 2, 3):
        set_threads(threads)
        assert torch.equal(zeta(*inputs).flatten(1), exact)
    for rows in (1, 7, 64):
        assert torch.equal(zeta(*(t[:rows] for t in inputs)).flatten(1), exact[:rows])


def test_zeta_knows_the_level_by_its_condition_alone() -> None:
    perturbed, level = torch.randn(4, 3), torch.tensor([0, 1, 500, 999])
    one, other = torch.full((4, 1), 0.5), torch.full((4, 1), 0.9)
    by_alpha_bar, by_time = nn.Zeta(3, 5, 8), nn.Zeta(3, 5, 8, conditioning="time_embedding")
    assert torch.equal(by_alpha_bar(perturbed, one, level), by_alpha_bar(perturbed, one, 0 * level))
    assert not torch.equal(
        by_alpha_bar(perturbed, one, level), by_alpha_bar(perturbed, other, level)
    )
    assert torch.equal(by_time(perturbed, one, level), by_time(perturbed, other, level))
    assert not torch.equal(by_time(perturbed, one, level), by_time(perturbed, one, 0 * level))


def test_layers_start_as_torchs_own() -> None:
    layer = nn.Psi(2, 2, 10, 5000).trunk.layers[0]
    for values in (layer.weight, layer.bias):
        assert float(values.abs().max()) <= 0.5  # 1 / sqrt(4)
        assert float(values.std()) == pytest.approx(0.5 / math.sqrt(3), rel=0.05)


# -- the critic ------------------------------------------------------------------------------------


def test_the_critic_is_the_released_codes() -> None:
    golden = load_golden("diffsr_rff_critic")
    width = golden["x"].shape[1]
    critic = nn.TwinRFFCritic(width, len(golden["critic__l1_bias"]))
    with torch.no_grad():
        recorded = [value for name, value in golden.items() if name.startswith("critic__")]
        for parameter, value in zip(critic.parameters(), recorded, strict=True):
            parameter.copy_(value)
    x = golden["x"].clone().requires_grad_()
    q1, q2 = critic(x)
    torch.testing.assert_close(q1, golden["q1"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(q2, golden["q2"], atol=1e-5, rtol=1e-5)
    (q1.square().sum() + q2.sum()).backward()
    torch.testing.assert_close(x.grad, golden["grad_x"], atol=1e-5, rtol=1e-5)
    gradients = [value for name, value in golden.items() if name.startswith("grad__")]
    for parameter, value in zip(critic.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        error = parameter.grad[: len(value)] - value  # of large tensors 8 rows were recorded
        assert float(error.abs().max()) <= 1e-5 * float(value.abs().max())


@pytest.mark.parametrize("frequencies", ["learned", "gaussian", "orthogonal"])
@pytest.mark.parametrize("kind", ["sin", "cos", "cos_sin"])
def test_q_is_linear_in_phi(frequencies: str, kind: str) -> None:
    critic = nn.TwinRFFCritic(6, 8, frequencies, kind)
    psi = torch.randn(5, 6)
    for q, phi, one in zip(critic(psi), critic.phi(psi), (critic.q1, critic.q2), strict=True):
        assert phi.shape == (5, 8)
        torch.testing.assert_close(q, one.head.layers[-1](phi))
        torch.testing.assert_close(q, one(psi))


@pytest.mark.parametrize("frequencies", ["gaussian", "orthogonal"])
def test_drawn_frequencies_are_saved_but_not_trained(frequencies: str) -> None:
    critic = nn.RFFCritic(6, 8, frequencies)
    assert critic.fourier is not None
    assert [tuple(p.shape) for p in critic.parameters()] == [(8, 8), (8,), (1, 8), (1,)]
    other = nn.RFFCritic(6, 8, frequencies)
    psi = torch.randn(5, 6)
    assert not torch.equal(critic(psi), other(psi))
    other.load_state_dict(critic.state_dict())
    assert torch.equal(critic(psi), other(psi))


def test_learned_frequencies_are_trained() -> None:
    for kind, width in (("sin", 8), ("cos", 8), ("cos_sin", 16)):
        critic = nn.RFFCritic(6, 8, "learned", kind)
        assert tuple(next(critic.parameters()).shape) == (8, 6)
        assert critic.second.weight.shape == (8, width)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Psi(3, 2, 0), "feature_dim: expected at least 1, got 0"),
        (lambda: nn.Psi(0, 2), "state_dim: expected at least 1, got 0"),
        (lambda: nn.Zeta(3, 0), "feature_dim: expected at least 1, got 0"),
        (lambda: nn.Zeta(3, 2, conditioning="beta"), "conditioning: expected one of"),
        (lambda: nn.Zeta(3, 2, time_dim=3), "time_dim: expected an even number, got 3"),
        (lambda: nn.TwinRFFCritic(0), "feature_dim: expected at least 1, got 0"),
        (lambda: nn.RFFCritic(3, 8, "fixed"), "frequencies: expected one of"),
        (lambda: nn.RFFCritic(3, 8, "learned", "tan"), "kind: expected one of"),
        (lambda: nn.RFFCritic(3, 8, "gaussian", lengthscale=0.0), "lengthscale: expected more"),
        (lambda: nn.Temperature(0.0), "initial: expected more than 0.0, got 0.0"),
        (lambda: nn.SquashedGaussian(3, 2, log_std_bounds=(1.0, 1.0)), "log_std_bounds"),
        (lambda: nn.SquashedGaussian(3, 2)(torch.randn(4, 2)), r"state: expected shape \[..., 3\]"),
        (lambda: nn.Psi(3, 2)(torch.randn(4, 3), torch.randn(4, 3)), "action: expected shape"),
        (lambda: nn.TwinRFFCritic(3)(torch.randn(4, 2)), r"psi: expected shape \[..., 3\]"),
        (lambda: nn.MLP(3, 8, 2, init="zeros"), "init: expected one of"),
        (lambda: nn.MLP(3, 8, 2, 2, ("sin",)), "activation: expected 2, one a layer"),
        (lambda: nn.MLP(3, 8, 2, 2, ("sin", "sine")), "activation: expected one of"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_hidden_is_what_enters_the_last_layer() -> None:
    mlp = nn.MLP(3, 8, 2, 2, ("sin", "elu"), "uniform")
    x = torch.randn(2, 5, 3)
    hidden: Tensor = mlp.hidden(x)
    first, second, last = mlp.layers
    expected = torch.nn.functional.elu(second(first(x).sin()))
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(mlp(x), last(expected))


@pytest.mark.parametrize("place", ["q1", "head"])
def test_hooks_on_a_critics_parts_run(place: str) -> None:
    critics, psi = nn.TwinRFFCritic(6, 8), torch.randn(3, 6)
    before = critics(psi)
    calls: list[str] = []
    module = critics.q1 if place == "q1" else critics.q1.head
    with module.register_forward_pre_hook(lambda module, inputs: calls.append(place)):
        again = critics(psi)
        critics.loss(psi, torch.zeros(3, 1))
        assert len(calls) == 2
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, again, strict=True))


def test_unequal_critics_are_refused() -> None:
    """They are run together, as one's widths say."""
    policy, psi, critics = nn.SquashedGaussian(4, 2, 8), nn.Psi(4, 2, 6, 8), nn.TwinRFFCritic(6, 8)
    critics.q2 = nn.RFFCritic(6, 64)
    for call in (
        lambda: critics(torch.ones(3, 6)),
        lambda: critics.loss(torch.ones(3, 6), torch.ones(3, 1)),
        lambda: ops.soft_value(
            policy, psi, critics, torch.ones(3, 4), torch.ones(3, 2), torch.tensor(0.1)
        ),
    ):
        with pytest.raises(ValueError, match="^q2: expected layers, activations"):
            call()


@pytest.mark.parametrize("frequencies", ["learned", "gaussian"])
def test_targets_and_weights_of_another_kind_are_refused(frequencies: str) -> None:
    critics = nn.TwinRFFCritic(6, 8, frequencies)
    psi, target = torch.ones(3, 6), torch.ones(3, 1)
    with pytest.raises(ValueError, match=r"^target: expected shape \[3, 1\], got \[3\]"):
        critics.loss(psi, torch.ones(3))
    with pytest.raises(ValueError, match=r"^weight: expected shape \[3\], got \[3, 1\]"):
        critics.loss(psi, target, weight=torch.ones(3, 1))
    with pytest.raises(TypeError, match="^weight: expected torch.float32 like .*float64"):
        critics.loss(psi, target, weight=torch.ones(3).double())


@pytest.mark.parametrize("shape", [(3, 2, 4), (4,)])
def test_samples_of_any_leading_shape(shape: tuple[int, ...]) -> None:
    policy, state, noise = nn.SquashedGaussian(4, 2, 16), torch.randn(shape), torch.randn(2)
    action, log_prob = policy.sample(state, noise)
    rows, rows_log_prob = policy.sample(state.reshape(-1, 4), noise.expand(state.numel() // 4, 2))
    assert torch.equal(action, rows.reshape(*shape[:-1], 2))
    assert torch.equal(log_prob, rows_log_prob.reshape(*shape[:-1], 1))
