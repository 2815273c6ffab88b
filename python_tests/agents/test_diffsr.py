"""Diff-SR against the released code's recorded step, and each of its promises one by one."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from doubles import ACTION_DIM, OBSERVATION_DIM, TensorReplay, make_kind, small_diffsr_config
from helpers import load_golden
from torch import Tensor, nn

from diffcore import DiffusionSchedule, ops
from diffcore.agents import Batch, DiffSR, DiffSRConfig
from diffcore.agents.diffsr import ModeSwitches, gram_distance
from diffcore.agents.exploration import kernel_bonus
from diffcore.nn import MLP

SWITCHES = [field.name for field in dataclasses.fields(ModeSwitches)]


def make_agent(*, seed: int = 0, **changes: Any) -> DiffSR:
    agent = make_kind("diffsr", seed=seed, **changes)
    assert isinstance(agent, DiffSR)
    return agent


def random_batch(rows: int = 16) -> Batch:
    return TensorReplay.random().sample(rows, torch.Generator().manual_seed(2))


def copies(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def moved(module: nn.Module, before: list[Tensor]) -> bool:
    pairs = zip(module.parameters(), before, strict=True)
    return any(not torch.equal(new, old) for new, old in pairs)


# ---------------------------------------------------------------- the released code's step


@pytest.mark.parametrize("task", ["pendulum", "halfcheetah"])
@pytest.mark.parametrize("mode", ["fixed", "official"])
def test_one_representation_step_is_the_released_codes(task: str, mode: Any) -> None:
    golden = load_golden(f"diffsr_score_step_{task}")
    state, action = golden["state"], golden["action"]
    config = DiffSRConfig(
        mode=mode,
        feature_dim=golden["feature_dim"],
        psi_hidden_dim=len(golden["psi__z_vector_0_bias"]),
        zeta_hidden_dim=len(golden["zeta__Mu_z_by_s_layer_0_bias"]),
        representation_lr=golden["lr"],
    )
    agent = DiffSR(state.shape[1], action.shape[1], config, seed=0)
    representation = agent.representation
    torch.testing.assert_close(representation.alpha_bar, golden["alphabars"], atol=1e-7, rtol=0)
    assert representation.noise_scale == golden["sigma_scale"]

    def recorded(prefix: str) -> list[Tensor]:
        return [value for name, value in golden.items() if name.startswith(prefix)]

    parameters = list(representation.parameters())
    with torch.no_grad():
        starts = recorded("psi__") + recorded("zeta__")
        for parameter, start in zip(parameters, starts, strict=True):
            parameter.copy_(start)
    seen: list[Tensor] = [torch.empty(0)] * len(parameters)
    for i, parameter in enumerate(parameters):
        parameter.register_post_accumulate_grad_hook(
            lambda p, i=i: seen.__setitem__(i, p.grad.clone())
        )

    rows = len(state)
    batch = Batch(
        index=torch.arange(rows),
        state=state,
        action=action,
        best_action=action,
        reward=torch.zeros(rows, 1),
        next_state=golden["next_state"],
        mask=torch.ones(rows, 1),
    )
    metrics = agent.update_representation(
        batch, level=golden["noise_level"], noise=golden["noise_scaled"] / golden["sigma_scale"]
    )
    assert float(metrics["score_loss"]) == pytest.approx(golden["score_loss"], rel=1e-5)
    gradients = recorded("grad_psi__") + recorded("grad_zeta__")
    steps = recorded("after_psi__") + recorded("after_zeta__")
    for parameter, ours, gradient, after in zip(parameters, seen, gradients, steps, strict=True):
        scale = float(gradient.abs().max())
        error = ours[: len(gradient)] - gradient  # of large tensors 8 rows were recorded
        assert float(error.abs().max()) <= 1e-4 * scale
        torch.testing.assert_close(parameter.detach()[: len(after)], after, atol=1e-5, rtol=1e-4)


def test_the_papers_step_is_equation_18() -> None:
    agent = make_agent(mode="paper", noise_steps=1000)
    schedule = DiffusionSchedule.linear(1000)
    batch, level = random_batch(), torch.arange(16) * 60
    noise = torch.randn(16, OBSERVATION_DIM)
    beta = (1 - schedule.alphas_cumprod[level]).float().unsqueeze(-1)
    perturbed = (1 - beta).sqrt() * batch.next_state + beta.sqrt() * noise
    psi = agent.representation.psi(batch.state, batch.action)
    zeta = agent.representation.zeta(perturbed, 1 - beta, level)
    score = torch.einsum("bd,bds->bs", psi, zeta)
    residual = perturbed + beta * score - (1 - beta).sqrt() * batch.next_state
    expected = residual.square().sum(dim=1).mean()

    metrics = agent.update_representation(batch, level=level, noise=noise)
    torch.testing.assert_close(metrics["score_loss"], expected.detach())


# ---------------------------------------------------------------- modes, switch by switch


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("fixed", ("beta_cdf", 0.449, True, False)),
        ("official", ("beta_cdf", 0.449, False, True)),
        ("paper", ("linear", 1.0, True, False)),
    ],
)
def test_mode_table(mode: str, values: tuple[Any, ...]) -> None:
    agent = make_agent(mode=mode)
    assert dataclasses.asdict(agent.switches) == dict(zip(SWITCHES, values, strict=True))
    assert agent.bootstrap_truncated
    assert agent.representation.noise_scale == values[1]
    schedule: DiffusionSchedule = getattr(DiffusionSchedule, values[0])(10)
    assert torch.equal(agent.representation.schedule.betas, schedule.betas)


@pytest.mark.parametrize("mode", ["fixed", "paper"])
def test_the_critic_is_trained(mode: str) -> None:
    agent, replay = make_agent(mode=mode), TensorReplay.random()
    for network in (agent.critic, agent.critic_target):
        before = copies(network)
        agent.update(replay)
        agent.update(replay)  # the target moves in every second update
        assert all(
            not torch.equal(new, old)
            for new, old in zip(network.parameters(), before, strict=True)
        )


def test_official_keeps_the_fault_that_the_optimiser_holds_a_discarded_critic() -> None:
    agent, replay = make_agent(mode="official"), TensorReplay.random()
    held = {id(p) for group in agent.critic_optimizer.param_groups for p in group["params"]}
    assert held.isdisjoint(map(id, agent.critic.parameters()))
    critic, target = copies(agent.critic), copies(agent.critic_target)
    actor, representation = copies(agent.actor), copies(agent.representation)
    for _ in range(5):
        metrics = agent.update(replay)
    assert float(metrics["critic_loss"]) > 0
    assert not moved(agent.critic, critic)
    assert not moved(agent.critic_target, target)
    assert moved(agent.actor, actor)
    assert moved(agent.representation, representation)


def plain_gram(x: Tensor) -> float:
    """The regulariser, pair by pair."""
    rows, width = x.shape
    pairs = sum(float(x[i] @ x[j]) ** 2 for i in range(rows) for j in range(rows) if i != j)
    norms = sum(float(x[i] @ x[i]) for i in range(rows))
    return pairs / (rows * (rows - 1)) - 2 * norms / rows / width + 1 / width


@pytest.mark.parametrize("mode", ["fixed", "official"])
def test_switch_gram_of_second_layer_twice(mode: str) -> None:
    agent, batch = make_agent(mode=mode, gram_weight=0.5), random_batch()
    with torch.no_grad():
        psi = agent.representation.psi(batch.state, batch.action)
        expected = 0.0
        for q in (agent.critic.q1, agent.critic.q2):
            first, second, _ = q.head.layers
            phi = nn.functional.elu(second(first(psi).sin()))
            expected += plain_gram((second(phi) if mode == "official" else phi).double())
    metrics = agent.update_critic(batch)
    assert float(metrics["gram"]) == pytest.approx(expected, rel=1e-4)


def test_the_gram_regulariser_makes_features_orthogonal() -> None:
    x = torch.randn(8, 32, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.01)
    for _ in range(500):
        optimizer.zero_grad()
        gram_distance(x).backward()
        optimizer.step()
    gram = (x @ x.T).detach()
    off_diagonal = gram - gram.diagonal().diag()
    assert float(off_diagonal.abs().max()) < 0.05 * float(gram.diagonal().min())


def test_no_gram_regulariser_is_computed_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent()
    monkeypatch.setattr(agent, "gram_regularizer", lambda features: pytest.fail("computed"))
    assert "gram" not in agent.update(TensorReplay.random())


@pytest.mark.parametrize("levels", ["beta_cdf", "linear", "cosine"])
def test_noise_levels_by_name(levels: Any) -> None:
    schedule = make_agent(noise_levels=levels).representation.schedule
    expected: DiffusionSchedule = getattr(DiffusionSchedule, levels)(10)
    assert torch.equal(schedule.betas, expected.betas)


def test_the_released_codes_levels_lie_between_0_391_and_0_967() -> None:
    levels = DiffSR(3, 1, DiffSRConfig(), seed=0).representation.alpha_bar
    assert len(levels) == 1000
    assert float(levels.min()) == pytest.approx(0.391, abs=5e-4)
    assert float(levels.max()) == pytest.approx(0.967, abs=5e-4)


# ---------------------------------------------------------------- updates


@pytest.mark.parametrize("extra", [0, 3])
def test_the_last_representation_batch_serves_critic_and_actor(
    extra: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, replay = make_agent(extra_feature_steps=extra), TensorReplay.random()
    calls: list[tuple[str, Batch]] = []

    def remember(name: str) -> None:
        method: Callable[..., Any] = getattr(agent, name)

        def call(batch: Batch, *others: Any, **settings: Any) -> Any:
            calls.append((name, batch))
            return method(batch, *others, **settings)

        monkeypatch.setattr(agent, name, call)

    for name in ("update_representation", "update_critic", "update_actor"):
        remember(name)
    agent.update(replay)
    [drawn] = replay.drawn
    names = ["update_representation", "update_critic", "update_actor"]
    assert [name for name, _ in calls] == names
    stepped_on, critic_batch, actor_batch = [batch for _, batch in calls]
    assert stepped_on is drawn
    assert critic_batch is actor_batch
    for field in dataclasses.fields(Batch):
        every = getattr(drawn, field.name)
        assert len(every) == 16 * (extra + 1)
        assert torch.equal(every[-16:], getattr(critic_batch, field.name))
    assert replay.written == []


@pytest.mark.parametrize("conditioning", ["alpha_bar", "time_embedding"])
def test_steps_on_parts_of_a_batch_are_those_on_its_parts(conditioning: Any) -> None:
    batch, level = random_batch(), torch.arange(16)
    noise = torch.randn(16, OBSERVATION_DIM)
    settings = {"conditioning": conditioning, "noise_steps": 16}
    together, alone = make_agent(**settings), make_agent(**settings)
    metrics = together.update_representation(batch, steps=2, level=level, noise=noise)
    for half, its_level, its_noise in zip(
        batch.split(8), level.split(8), noise.split(8), strict=True
    ):
        expected = alone.update_representation(half, level=its_level, noise=its_noise)
    torch.testing.assert_close(metrics, expected)
    pairs = zip(together.representation.parameters(), alone.representation.parameters(), strict=True)
    for ours, others in pairs:
        torch.testing.assert_close(ours, others)


@pytest.mark.parametrize("conditioning", ["alpha_bar", "time_embedding"])
def test_shapes_that_do_not_fit_the_next_state_are_named(conditioning: Any) -> None:
    agent, batch = make_agent(conditioning=conditioning), random_batch()
    level, noise = torch.zeros(16, dtype=torch.int64), torch.zeros(16, OBSERVATION_DIM)
    with pytest.raises(ValueError, match=r"^level: expected shape \[16\], got \[16, 1\]"):
        agent.update_representation(batch, level=level[:, None])
    with pytest.raises(ValueError, match=r"^noise: expected shape \[16, \d\], got \[1, \d\]"):
        agent.update_representation(batch, noise=noise[:1])
    representation, optimizer = agent.representation, agent.representation_optimizer
    perturbed = representation.perturb(batch.next_state, level=level, noise=noise)
    with pytest.raises(ValueError, match="expected the same rows"):
        representation.step(batch.state[None], batch.action[None], perturbed, optimizer)
    nothing = representation.perturb(batch.next_state[None][:0])
    with pytest.raises(ValueError, match="^state: expected a minibatch at least"):
        representation.step(batch.state[None][:0], batch.action[None][:0], nothing, optimizer)


def test_a_batch_that_steps_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="steps must divide the batch's 16 rows, got 3"):
        make_agent().update_representation(random_batch(), steps=3)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        make_agent().update_representation(random_batch(), steps=0)


def test_only_its_own_loss_trains_the_representation() -> None:
    agent, batch = make_agent(), random_batch()
    before = copies(agent.representation)
    agent.update_critic(batch)
    agent.update_actor(batch)
    agent.update_target()
    assert not moved(agent.representation, before)
    assert all(parameter.requires_grad for parameter in agent.representation.parameters())
    others = [copies(module) for module in (agent.critic, agent.actor, agent.temperature)]
    agent.update_representation(batch)
    assert moved(agent.representation, before)
    for module, unmoved in zip((agent.critic, agent.actor, agent.temperature), others, strict=True):
        assert not moved(module, unmoved)


def test_a_frozen_representation_stays_as_it_was_initialised() -> None:
    agent = make_agent(freeze_representation=True)
    before = copies(agent.representation)
    metrics = agent.update(TensorReplay.random())
    assert not moved(agent.representation, before)
    assert "score_loss" not in metrics


def policy_noise_of(agent: DiffSR, draws: int) -> list[Tensor]:
    """What the agent will draw next for its policy, without drawing it."""
    generator = torch.Generator()
    generator.set_state(agent.generator.get_state())
    return [torch.empty(16, ACTION_DIM).normal_(generator=generator) for _ in range(draws)]


def policy_distribution(agent: DiffSR, state: Tensor) -> torch.distributions.Distribution:
    mean, log_std = agent.actor(state)
    gaussian = torch.distributions.Normal(mean, log_std.exp())
    squash = torch.distributions.TanhTransform(cache_size=1)
    return torch.distributions.TransformedDistribution(gaussian, [squash])


def test_one_critic_step_follows_its_equation() -> None:
    agent, batch = make_agent(gamma=0.9, initial_temperature=0.3), random_batch()
    agent.critic_target.load_state_dict(make_agent(seed=5).critic.state_dict())
    twin, psi = copy.deepcopy(agent.critic), agent.representation.psi
    [noise] = policy_noise_of(agent, 1)

    mean, log_std = agent.actor(batch.next_state)
    next_action = (mean + log_std.exp() * noise).tanh()
    density = policy_distribution(agent, batch.next_state).log_prob(next_action)
    q_next = torch.minimum(*agent.critic_target(psi(batch.next_state, next_action)))
    value = q_next - 0.3 * density.sum(dim=1, keepdim=True)
    target = (batch.reward + 0.9 * batch.mask * value).detach()
    q = twin(psi(batch.state, batch.action).detach())
    loss = sum((each - target).square().mean() for each in q)
    optimizer = torch.optim.Adam(twin.parameters(), lr=3e-4)
    loss.backward()
    optimizer.step()

    metrics = agent.update_critic(batch)
    torch.testing.assert_close(metrics["critic_loss"], loss.detach())
    for ours, theirs in zip(agent.critic.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_the_gram_regulariser_counts_with_its_weight() -> None:
    agent = make_agent(gram_weight=0.3)
    batch = dataclasses.replace(random_batch(), mask=torch.zeros(16, 1))
    twin = copy.deepcopy(agent)
    features = twin.representation.psi(batch.state, batch.action).detach()
    loss, _ = twin.critic.loss(features, batch.reward)
    total = loss + 0.3 * twin.gram_regularizer(features)
    gradients = torch.autograd.grad(total, [*twin.critic.parameters()])
    metrics = agent.update_critic(batch)
    expected = torch.cat([g.flatten() for g in gradients]).norm()
    torch.testing.assert_close(metrics["critic_grad_norm"], expected)


def test_every_optimizer_has_its_learning_rate_and_epsilon() -> None:
    agent = make_agent(lr=0.25, representation_lr=0.5, adam_eps=1e-3)
    settings = {
        name: [(group["lr"], group["eps"]) for group in part.param_groups]
        for name, part in agent.parts().items()
        if isinstance(part, torch.optim.Optimizer)
    }
    assert settings.pop("representation_optimizer") == [(0.5, 1e-3)]
    assert settings.keys() == {f"{name}_optimizer" for name in ("critic", "actor", "temperature")}
    assert all(group == [(0.25, 1e-3)] for group in settings.values())


def test_one_step_of_actor_and_temperature_follows_its_equation() -> None:
    agent, batch = make_agent(initial_temperature=0.3), random_batch()
    twin = copy.deepcopy(agent.actor)
    [noise] = policy_noise_of(agent, 1)
    mean, log_std = twin(batch.state)
    action = (mean + log_std.exp() * noise).tanh()
    gaussian = torch.distributions.Normal(mean, log_std.exp())
    squash = torch.distributions.TanhTransform(cache_size=1)
    policy = torch.distributions.TransformedDistribution(gaussian, [squash])
    density = policy.log_prob(action).sum(dim=1, keepdim=True)
    q = torch.minimum(*agent.critic(agent.representation.psi(batch.state, action)))
    loss = (0.3 * density - q).mean()
    optimizer = torch.optim.Adam(twin.parameters(), lr=3e-4)
    loss.backward()
    optimizer.step()
    critic = copies(agent.critic)

    metrics = agent.update_actor(batch)
    torch.testing.assert_close(metrics["actor_loss"], loss.detach())
    for ours, theirs in zip(agent.actor.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert not moved(agent.critic, critic)
    # Adam's first step is one learning rate: down, where the policy's entropy is above its target.
    entropy = -float(density.detach().mean())
    assert entropy != pytest.approx(-ACTION_DIM, abs=0.1)
    change = float(agent.temperature.log.detach()) - math.log(0.3)
    assert change == pytest.approx(-3e-4 if entropy > -ACTION_DIM else 3e-4, rel=1e-2)


def test_the_temperature_holds_the_entropy_at_its_target() -> None:
    agent, replay = make_agent(lr=1e-2), TensorReplay.random()
    metrics: dict[str, Any] = {}
    for _ in range(400):
        metrics = agent.update(replay)
    assert float(metrics["entropy"]) == pytest.approx(-ACTION_DIM, abs=1.0)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_target_moves_in_every_nth_update(every: int) -> None:
    agent, replay = make_agent(update_target_every=every), TensorReplay.random()
    turns = []
    for _ in range(6):
        before = copies(agent.critic_target)
        agent.update(replay)
        turns.append(moved(agent.critic_target, before))
    assert turns == [(update % every) == 0 for update in range(1, 7)]


def test_an_empty_mask_stops_the_bootstrap() -> None:
    batch = dataclasses.replace(random_batch(), mask=torch.zeros(16, 1))
    metrics = make_agent().update_critic(batch)
    torch.testing.assert_close(metrics["q_target_mean"], batch.reward.mean())


@pytest.mark.parametrize(
    ("compute_dtype", "expected"), [("float32", None), ("bfloat16", torch.bfloat16)]
)
def test_compute_dtype_reaches_every_product(
    compute_dtype: Any, expected: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.dtype | None] = []
    op = ops.representation_step

    def remember(*arguments: Any, compute_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        asked.append(compute_dtype)
        return op(*arguments, compute_dtype=compute_dtype)

    monkeypatch.setattr(ops, "representation_step", remember)
    agent = make_agent(compute_dtype=compute_dtype)
    agent.update(TensorReplay.random())
    assert asked == [expected]
    parts = (agent.representation, agent.critic, agent.critic_target, agent.actor)
    networks = [m for part in parts for m in part.modules() if isinstance(m, MLP)]
    assert {network.compute_dtype for network in networks} == {expected}
    assert all(p.dtype == torch.float32 for p in agent.representation.parameters())


def bandit(state: Tensor, generator: torch.Generator) -> tuple[TensorReplay, Tensor]:
    """Transitions to nowhere, rewarded for closeness to an action that depends on the state."""
    action = 2 * torch.rand(len(state), ACTION_DIM, generator=generator) - 1
    best = 0.6 * (1.5 * state[:, :ACTION_DIM]).tanh()
    replay = TensorReplay(
        state=state,
        action=action,
        reward=-(action - best).square().sum(dim=-1, keepdim=True),
        next_state=state + 0.5 * torch.cat([action, action], dim=-1),
        mask=torch.zeros(len(state), 1),
    )
    return replay, best


@pytest.mark.parametrize(
    ("mode", "conditioning", "learns"),
    [
        ("fixed", "alpha_bar", True),
        ("fixed", "time_embedding", True),
        ("paper", "alpha_bar", True),
        ("official", "alpha_bar", False),  # an untrained critic knows of no reward
    ],
)
def test_learns_a_bandit_whose_best_action_depends_on_the_state(
    mode: Any, conditioning: Any, learns: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    state = torch.randn(512, OBSERVATION_DIM, generator=generator)
    replay, best = bandit(state, generator)
    agent = make_agent(
        mode=mode,
        conditioning=conditioning,
        batch_size=64,
        lr=2e-2,
        initial_temperature=0.01,
        extra_feature_steps=0,
        hidden_dim=64,
        feature_dim=32,
        psi_hidden_dim=64,
    )
    for _ in range(800):
        agent.update(replay)
    error = float((agent.act(state, explore=False) - best).abs().mean())
    without_a_clue = float(best.abs().mean())  # of an action of 0
    assert (error < 0.6 * without_a_clue) is learns


# ---------------------------------------------------------------- acting


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_some_actions_are_uniformly_random(rate: float) -> None:
    agent = make_agent(random_action_rate=rate)
    with torch.no_grad():  # a policy that is known, and far from uniform
        for parameter in agent.actor.parameters():
            parameter.zero_()
        agent.actor.trunk.layers[-1].bias[:ACTION_DIM] = 3.0
        agent.actor.trunk.layers[-1].bias[ACTION_DIM:] = -10.0  # standard deviation e^-5
    actions = agent.act(torch.zeros(4000, OBSERVATION_DIM), explore=True)
    random = (actions - math.tanh(3.0)).abs().amax(dim=1) > 1e-3
    assert float(random.float().mean()) == pytest.approx(rate, abs=0.03)
    if rate > 0:
        drawn = actions[random]
        assert float(drawn.mean()) == pytest.approx(0.0, abs=0.06)
        assert float(drawn.std()) == pytest.approx(1 / math.sqrt(3), abs=0.03)


def test_without_exploration_the_action_is_the_policys_mode() -> None:
    agent, observation = make_agent(), torch.randn(5, OBSERVATION_DIM)
    mean, _ = agent.actor(observation)
    for deterministic in (True, False):
        action = agent.act(observation, explore=False, deterministic=deterministic)
        assert torch.equal(action, mean.tanh())
        assert not action.requires_grad


# ---------------------------------------------------------------- exploration bonus


def test_there_is_no_bonus_by_default() -> None:
    agent, replay = make_agent(), TensorReplay.random()
    assert agent.exploration_bonus(random_batch(), replay) is None
    assert "bonus_mean" not in agent.update(replay)


@pytest.mark.parametrize("bonus", ["elliptical", "kernel"])
def test_the_bonus_is_added_to_the_reward(bonus: Any) -> None:
    agent, replay = make_agent(bonus=bonus, bonus_weight=3.0), TensorReplay.random()
    batch = dataclasses.replace(random_batch(), mask=torch.zeros(16, 1))
    extra = agent.exploration_bonus(batch, replay)
    assert extra is not None
    assert extra.shape == (16, 1)
    assert float(extra.min()) > 0
    metrics = agent.update_critic(batch, extra)
    torch.testing.assert_close(metrics["q_target_mean"], (batch.reward + extra).mean())
    torch.testing.assert_close(metrics["bonus_mean"], extra.mean())


def test_the_elliptical_bonus_is_of_the_first_critics_features() -> None:
    agent = make_agent(bonus="elliptical", bonus_weight=0.5, bonus_ridge=2.0)
    agent.critic_target.load_state_dict(make_agent(seed=5).critic.state_dict())
    batch, replay = random_batch(), TensorReplay.random(64)
    phi = agent.critic.phi(agent.representation.psi(batch.state, batch.action))[0].double()
    # The batch itself has been seen then, and stands for all that the replay holds.
    seen = 64 / 16 * phi.T @ phi + 2.0 * torch.eye(phi.shape[1])
    expected = 0.5 * (phi @ seen.inverse() * phi).sum(dim=1, keepdim=True)
    torch.testing.assert_close(agent.exploration_bonus(batch, replay), expected.float().detach())


def test_the_kernel_bonus_is_of_psi() -> None:
    agent = make_agent(bonus="kernel", bonus_samples=8, bonus_weight=0.5, bonus_ridge=2.0)
    batch, replay, psi = random_batch(), TensorReplay.random(), agent.representation.psi
    given = agent.exploration_bonus(batch, replay)
    [seen] = replay.drawn
    features = psi(batch.state, batch.action), psi(seen.state, seen.action)
    assert len(features[1]) == 8
    torch.testing.assert_close(given, 0.5 * kernel_bonus(*features, 2.0))


@pytest.mark.parametrize("bonus", ["elliptical", "kernel"])
def test_what_was_never_seen_earns_a_larger_bonus(bonus: Any) -> None:
    agent, replay = make_agent(bonus=bonus, bonus_samples=64), TensorReplay.random()
    for _ in range(20):
        agent.update(replay)
    seen = replay.sample(16, agent.generator)
    unseen = dataclasses.replace(seen, state=seen.state + 8.0)
    bonuses = []
    for batch in (seen, unseen):
        each = copy.deepcopy(agent)  # looking at a batch counts it as seen
        bonuses.append(each.exploration_bonus(batch, replay))
    assert float(bonuses[1].mean()) > 1.5 * float(bonuses[0].mean())


# ---------------------------------------------------------------- configuration and bad input


def test_small_tasks_have_small_networks_and_start_sooner() -> None:
    small = DiffSRConfig(
        feature_dim=64, psi_hidden_dim=64, zeta_hidden_dim=128, hidden_dim=128, start_steps=1_000
    )
    pendulum = dataclasses.replace(small, lr=1e-3, update_target_every=1)
    assert DiffSRConfig.for_env("Pendulum-v1") == pendulum
    assert DiffSRConfig.for_env("diffcore/Pendulum-masked-v0") == pendulum
    assert DiffSRConfig.for_env("diffcore/MultiGoal-v0") == small
    assert DiffSRConfig.for_env("HalfCheetah-v5") == DiffSRConfig()


def test_defaults_are_the_released_codes() -> None:
    config = DiffSRConfig()
    assert (config.feature_dim, config.psi_hidden_dim, config.zeta_hidden_dim) == (256, 256, 512)
    assert (config.hidden_dim, config.batch_size, config.extra_feature_steps) == (256, 256, 3)
    assert (config.lr, config.representation_lr, config.noise_steps) == (3e-4, 3e-3, 1000)
    assert (config.tau, config.update_target_every, config.gamma) == (0.005, 2, 0.99)
    assert (config.initial_temperature, config.random_action_rate) == (0.1, 0.01)
    assert (config.start_steps, config.gram_weight, config.bonus) == (25_000, 0.0, "none")


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("mode", "papers", ValueError),
        ("noise_levels", "vp", ValueError),
        ("conditioning", "none", ValueError),
        ("bonus", "ucb", ValueError),
        ("fourier_frequencies", "fixed", ValueError),
        ("fourier_kind", "tan", ValueError),
        ("fourier_lengthscale", 0.0, ValueError),
        ("compute_dtype", "float16", ValueError),
        ("feature_dim", 0, ValueError),
        ("feature_dim", 2.0, TypeError),
        ("psi_hidden_dim", 0, ValueError),
        ("zeta_hidden_dim", -1, ValueError),
        ("hidden_dim", True, TypeError),
        ("noise_steps", 1, ValueError),
        ("noise_steps", 2, ValueError),
        ("extra_feature_steps", -1, ValueError),
        ("update_target_every", 0, ValueError),
        ("batch_size", 0, ValueError),
        ("bonus_samples", 0, ValueError),
        ("bonus_ridge", 0.0, ValueError),
        ("bonus_ridge", float("nan"), ValueError),
        ("bonus_weight", -1.0, ValueError),
        ("representation_lr", 0.0, ValueError),
        ("lr", "3e-4", TypeError),
        ("adam_eps", float("inf"), ValueError),
        ("initial_temperature", 0.0, ValueError),
        ("random_action_rate", 1.1, ValueError),
        ("gram_weight", float("nan"), ValueError),
        ("gamma", 1.01, ValueError),
        ("tau", 0.0, ValueError),
        ("start_steps", -1, ValueError),
        ("buffer_size", 0, ValueError),
    ],
)
def test_bad_hyper_parameters_are_refused(field: str, value: object, error: type) -> None:
    with pytest.raises(error, match=field):
        small_diffsr_config(**{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 1, "gram_weight": 0.1},
            r"batch_size \(with gram_weight above 0\) must be at least 2, got 1",
        ),
        (
            {"bonus": "kernel", "bonus_samples": 1},
            r"bonus_samples \(with bonus 'kernel'\) must be at least 2, got 1",
        ),
    ],
)
def test_what_compares_rows_with_each_other_needs_two(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        small_diffsr_config(**changes)


def test_one_row_alone_has_no_gram_regulariser_and_needs_none() -> None:
    with pytest.raises(ValueError, match="phi must have at least 2 rows to compare, got 1"):
        gram_distance(torch.ones(1, 3))
    metrics = make_agent(batch_size=1, bonus_samples=1).update(TensorReplay.random())
    assert all(torch.isfinite(value) for value in metrics.values())
