"""DIPO against the released code's recorded updates, and each of its promises one by one."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doubles import ACTION_DIM, OBSERVATION_DIM, TensorReplay, make_kind, small_dipo_config
from torch import Tensor, nn

from diffcore import DiffusionSchedule, ops
from diffcore.agents import (
    DIPO,
    MODES,
    DiffusionPolicy,
    DIPOConfig,
    MLPPolicy,
    ModeSwitches,
    Policy,
    VAEPolicy,
)
from diffcore.agents.dipo import ACTION_NORM_EVERY
from diffcore.nn import MLP
from diffcore.ops import _backends, _dispatch, _native

GOLDEN = Path(__file__).parents[1] / "golden"
SWITCHES = [field.name for field in dataclasses.fields(ModeSwitches)]


def make_agent(*, seed: int = 0, **changes: Any) -> DIPO:
    return make_kind("dipo", seed=seed, **changes)


# ---------------------------------------------------------------- the released code's updates


class RecordedReplay(TensorReplay):
    """Draws the recorded batches: critic's, then actor's, update after update."""

    def __init__(self, indices: list[Tensor], **columns: Tensor) -> None:
        super().__init__(**columns)
        self.indices = iter(indices)

    def next_index(self, batch_size: int, generator: torch.Generator) -> Tensor:
        return next(self.indices)


def linear_layers(golden: dict[str, Tensor], prefix: str, part: str) -> list[Tensor]:
    """Recorded weight, bias, weight, ... of one MLP from input to output."""
    positions = {int(k.split("_")[-2]) for k in golden if k.startswith(f"{prefix}__{part}_")}
    assert positions
    return [
        golden[f"{prefix}__{part}_{position}_{kind}"]
        for position in sorted(positions)
        for kind in ("weight", "bias")
    ]


def recorded_parameters(golden: dict[str, Tensor], prefix: str) -> list[Tensor]:
    parts = ("model_time_mlp", "model_layer") if "actor" in prefix else ("q1_model", "q2_model")
    return [tensor for part in parts for tensor in linear_layers(golden, prefix, part)]


@torch.no_grad()
def load_parameters(module: nn.Module, values: list[Tensor]) -> None:
    for parameter, value in zip(module.parameters(), values, strict=True):
        assert parameter.shape == value.shape
        parameter.copy_(value)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN / "dipo_update_halfcheetah.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def replay_recorded_updates(
    golden: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> tuple[DIPO, RecordedReplay]:
    """Run the recorded updates through ``DIPO.update``, with everything it draws replaced."""
    config = DIPOConfig(
        diffusion_steps=int(golden["K"]), batch_size=32, **{"mode": "official", **changes}
    )
    agent = DIPO(17, 6, config, seed=0)
    for module in (agent.actor, agent.actor_target):
        load_parameters(module, recorded_parameters(golden, "actor0"))
    for module in (agent.critic, agent.critic_target):
        load_parameters(module, recorded_parameters(golden, "critic0"))

    recorded_indices = zip(golden["critic_idx"], golden["diffusion_idx"], strict=True)
    replay = RecordedReplay(
        indices=[index for update in recorded_indices for index in update],
        state=golden["state"],
        action=golden["action"].clone(),
        reward=golden["reward"],
        next_state=golden["next_state"],
        mask=golden["mask"] / config.gamma,  # the released code stores gamma * mask
    )
    chain = zip(golden["x_T"], golden["z"], strict=True)
    levels = zip(golden["t"], golden["loss_noise"], strict=True)
    sample, loss = agent.actor_target.sample, agent.actor.loss

    def recorded_sample(observation: Tensor, *, explore: bool, generator: object) -> Tensor:
        x_init, noise = next(chain)
        return sample(observation, explore=explore, x_init=x_init, noise=noise)

    def recorded_loss(observation: Tensor, action: Tensor, *, generator: object) -> Tensor:
        t, noise = next(levels)
        return loss(observation, action, t=t, noise=noise)

    monkeypatch.setattr(agent.actor_target, "sample", recorded_sample)
    monkeypatch.setattr(agent.actor, "loss", recorded_loss)
    for _ in range(int(golden["n_updates"])):
        agent.update(replay)
    return agent, replay


def largest_errors(agent: DIPO, golden: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each network's parameters; of large tensors 8 rows were recorded."""
    networks = {
        "actor": agent.actor,
        "actor_target": agent.actor_target,
        "critic": agent.critic,
        "critic_target": agent.critic_target,
    }
    return {
        name: max(
            float((ours.detach()[: len(recorded)] - recorded).abs().max())
            for ours, recorded in zip(
                network.parameters(), recorded_parameters(golden, f"{name}N"), strict=True
            )
        )
        for name, network in networks.items()
    }


# How far five updates moved the networks is 1.5e-3, and the targets 2e-5.
TOLERANCE = {"actor": 2e-6, "actor_target": 3e-7, "critic": 2e-6, "critic_target": 3e-7}


def test_official_mode_repeats_the_released_codes_updates(
    golden: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, replay = replay_recorded_updates(golden, monkeypatch)
    errors = largest_errors(agent, golden)
    assert all(errors[name] <= TOLERANCE[name] for name in errors), errors
    assert torch.equal(replay.columns["best_action"], golden["diffusion_actions_after"])


def in_large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer in one block, for which no GPU has registers, but the interpreter needs few steps."""
    from diffcore.ops.denoising_loss import triton as denoising_loss
    from diffcore.ops.mlp import triton as mlp

    settings = {"ROWS": 32, "COLUMNS": 256, "DEPTH": 256}
    for module in (mlp, denoising_loss):
        monkeypatch.setattr(module, "row_settings", lambda *_: settings)
    monkeypatch.setattr(mlp, "BLOCK", 256)
    monkeypatch.setattr(mlp, "depth_of_blocks", lambda _: 32)


def prefer(backend: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Has a backend run whatever it can; returns the ops that it ran, as they come."""
    ran = set()
    choose = _dispatch.choose

    def preferred_first(op: str, support: _dispatch.Support, forced: str | None) -> str:
        if backend not in support.backends or support.why_not(backend) is not None:
            return choose(op, support, forced)
        ran.add(op)
        return choose(op, support, backend)

    monkeypatch.setattr(_dispatch, "choose", preferred_first)
    monkeypatch.setattr(_backends, "may_go_straight", lambda *_: False)  # every call asks
    return ran


def test_updates_on_triton_repeat_the_released_codes(
    golden: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, device: str, large_tiles: None
) -> None:
    if device != "cpu":
        pytest.skip("the recorded updates run on the CPU, where only the interpreter takes them")
    ran = prefer("triton", monkeypatch)
    in_large_blocks(monkeypatch)
    agent, replay = replay_recorded_updates(golden, monkeypatch)
    errors = largest_errors(agent, golden)
    assert all(errors[name] <= TOLERANCE[name] for name in errors), errors
    after = golden["diffusion_actions_after"]
    torch.testing.assert_close(replay.columns["best_action"], after, rtol=0, atol=1e-5)
    assert ran >= {"mlp_ensemble", "denoising_loss", "reverse_diffusion", "action_gradient"}


def test_updates_on_cuda_repeat_the_released_codes(
    golden: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chain and ascent on the CUDA sources as ordinary C++; the rest runs as always."""
    if torch.cuda.is_available():
        pytest.skip("the recorded updates run on the CPU")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "gpu"))
    import cuda_builds

    module = cuda_builds.load(cuda_builds.build_for_tests())
    monkeypatch.setattr(_native, "_cuda", module)
    monkeypatch.setattr(_native, "cuda_unavailable", None)
    monkeypatch.setenv("CUDA_ON_CPU_DEVICE", "16,232448,9")
    ran = prefer("cuda", monkeypatch)
    agent, replay = replay_recorded_updates(golden, monkeypatch)
    errors = largest_errors(agent, golden)
    assert all(errors[name] <= TOLERANCE[name] for name in errors), errors
    after = golden["diffusion_actions_after"]
    torch.testing.assert_close(replay.columns["best_action"], after, rtol=0, atol=1e-5)
    assert ran >= {"reverse_diffusion", "action_gradient"}


@pytest.mark.parametrize(
    ("changes", "network"),
    [
        ({"mode": "fixed"}, "actor"),  # batches overlap: stored actions are improved twice
        ({"update_actor_target_every": 2}, "actor_target"),
        ({"noise_ratio": 0.5}, "critic"),
        ({"action_gradient_steps": 19}, "actor"),
        ({"adam_eps": 1e-8}, "critic"),
        ({"tau": 0.004}, "critic_target"),
    ],
)
def test_the_recorded_updates_tell_other_settings_apart(
    golden: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    network: str,
) -> None:
    agent, _ = replay_recorded_updates(golden, monkeypatch, **changes)
    assert largest_errors(agent, golden)[network] > 4 * TOLERANCE[network]


# ---------------------------------------------------------------- modes, switch by switch


@pytest.mark.parametrize(
    ("mode", "store", "overwrite", "optimizer", "resample", "bootstrap", "rescale"),
    [
        ("fixed", True, False, "adam", False, True, True),
        ("official", False, False, "adam", False, False, False),
        ("paper", True, True, "ascent", True, True, True),
    ],
)
def test_mode_table(
    mode: str,
    store: bool,
    overwrite: bool,
    optimizer: str,
    resample: bool,
    bootstrap: bool,
    rescale: bool,
) -> None:
    agent = make_agent(mode=mode)
    values = (store, overwrite, optimizer, resample, bootstrap, rescale)
    assert dataclasses.asdict(agent.switches) == dict(zip(SWITCHES, values, strict=True))
    assert agent.bootstrap_truncated is bootstrap


def make_agent_with(switches: dict[str, Any], **changes: Any) -> DIPO:
    agent = make_agent(**changes)
    agent.switches = dataclasses.replace(MODES["fixed"], **switches)
    return agent


def replay_with_own_best_actions() -> TensorReplay:
    replay = TensorReplay.random()
    replay.columns["best_action"] = -replay.columns["action"]
    return replay


@pytest.mark.parametrize("store", [True, False])
def test_switch_store_improved_actions(store: bool) -> None:
    replay = replay_with_own_best_actions()
    before = copy.deepcopy(replay.columns)
    make_agent_with({"store_improved_actions": store}).update(replay)
    assert len(replay.written) == store
    changed = {name for name in before if not torch.equal(before[name], replay.columns[name])}
    assert changed == ({"best_action"} if store else set())
    if store:
        column, index, _ = replay.written[0]
        assert column == "best_action"
        assert torch.equal(index, replay.drawn[1].index)


@pytest.mark.parametrize("overwrite", [True, False])
def test_switch_overwrite_replay(overwrite: bool) -> None:
    replay = replay_with_own_best_actions()
    agent = make_agent_with({"overwrite_replay": overwrite}, action_lr=0.001)
    metrics = agent.update(replay)
    [(column, _, improved)] = replay.written
    assert column == ("action" if overwrite else "best_action")
    # Three steps of at most lr: the improved actions show where the improvement started.
    start = getattr(replay.drawn[1], column)
    assert 0 < float((improved - start).abs().max()) <= 0.0031
    torch.testing.assert_close(metrics["action_change"], (improved - start).abs().mean())


def test_switch_action_optimizer_ascent_is_equation_15() -> None:
    agent = make_agent_with(
        {"action_optimizer": "ascent"},
        action_gradient_steps=1,
        action_lr=10.0,
        action_grad_norm_ratio=1e-6,  # plain ascent ignores it
    )
    batch = TensorReplay.random().sample(16, agent.generator)
    action = batch.best_action.clone().requires_grad_()
    q = torch.minimum(*agent.critic(batch.state, action)).sum()
    [gradient] = torch.autograd.grad(q, action)
    expected = (batch.best_action + 10.0 * gradient).clamp(-1, 1)
    torch.testing.assert_close(agent.improve_actions(batch), expected, atol=1e-6, rtol=0)
    assert float(gradient.abs().max()) > 1e-4


def test_switch_action_optimizer_adam_cuts_the_norm_of_the_whole_batch() -> None:
    eps, lr, ratio = 1e-4, 0.01, 1e-4
    config = {"action_gradient_steps": 1, "action_lr": lr, "adam_eps": eps}
    agent = make_agent(action_grad_norm_ratio=ratio, **config)
    batch = TensorReplay.random().sample(16, agent.generator)
    action = batch.best_action.clone().requires_grad_()
    q = torch.minimum(*agent.critic(batch.state, action)).sum()
    [gradient] = torch.autograd.grad(q, action)
    assert float(gradient.norm()) > 4 * ratio * ACTION_DIM

    def after_first_adam_step(gradient: Tensor) -> Tensor:
        """From zero moments: lr * g / (|g| + eps)."""
        return (batch.best_action + lr * gradient / (gradient.abs() + eps)).clamp(-1, 1)

    expected = after_first_adam_step(gradient * (ratio * ACTION_DIM / gradient.norm()))
    torch.testing.assert_close(agent.improve_actions(batch), expected, atol=1e-6, rtol=0)

    uncut = make_agent(action_grad_norm_ratio=0.0, **config)
    expected = after_first_adam_step(gradient)
    torch.testing.assert_close(uncut.improve_actions(batch), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["fixed", "paper"])
def test_the_action_gradients_norm_is_logged_now_and_then(mode: str) -> None:
    agent, replay = make_agent(mode=mode), replay_with_own_best_actions()
    logged = ["action_grad_norm" in agent.update(replay) for _ in range(ACTION_NORM_EVERY + 1)]
    assert [i for i, is_there in enumerate(logged) if is_there] == [0, ACTION_NORM_EVERY]

    batch = replay.sample(16, agent.generator)
    norm = agent.action_gradient_norm(batch)
    critic, state = copy.deepcopy(agent.critic).double(), batch.state.double()
    start = (batch.action if mode == "paper" else batch.best_action).double()
    # A step of Eq. 15, of length 1 and without bounds, is the gradient.
    step = {"steps": 1, "lr": 1.0, "optimizer": "ascent", "low": -99.0, "high": 99.0}
    moved = ops.action_gradient(critic, state, start, **step)
    torch.testing.assert_close(norm.double(), (moved - start).norm(), rtol=1e-5, atol=0)
    assert all(p.requires_grad and p.grad is None for p in agent.critic.parameters())


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("resample", [True, False])
def test_switch_resample_actor_batch(
    resample: bool, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make_agent_with({"resample_actor_batch": resample, "overwrite_replay": overwrite})
    replay = TensorReplay.random()
    fitted: list[tuple[Tensor, Tensor]] = []
    loss = agent.actor.loss

    def remember(observation: Tensor, action: Tensor, **keywords: Any) -> Tensor:
        fitted.append((observation, action))
        return loss(observation, action, **keywords)

    monkeypatch.setattr(agent.actor, "loss", remember)
    agent.update(replay)
    [(column, _, improved)] = replay.written
    [(observation, action)] = fitted
    assert len(replay.drawn) == (3 if resample else 2)
    assert torch.equal(observation, replay.drawn[-1].state)
    # The third batch is drawn after the write, so it can hold improved actions as well.
    expected = replay.columns[column][replay.drawn[-1].index] if resample else improved
    assert torch.equal(action, expected)


@pytest.mark.parametrize("K", [1, 20, 100, 1000])
def test_rescaled_linear_levels_are_those_of_ddpms_1000_steps(K: int) -> None:
    schedule = make_agent(schedule="linear", diffusion_steps=K).actor.schedule
    ddpm = DiffusionSchedule.linear(1000).alphas_cumprod[1000 // K - 1 :: 1000 // K]
    # With betas of up to 0.02, the sum of ln(1 - beta) is off from the integral by a hundredth.
    torch.testing.assert_close(schedule.alphas_cumprod, ddpm, rtol=0, atol=0.005)
    assert schedule.ends_in_noise


def test_official_linear_betas_are_the_released_codes() -> None:
    with pytest.warns(UserWarning, match=r"abar_K is 0\.82 after 20 steps"):
        agent = make_agent(mode="official", schedule="linear", diffusion_steps=20)
    assert agent.actor.schedule == DiffusionSchedule.linear(20)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:schedule. abar_K is")
@pytest.mark.parametrize(
    ("mode", "least", "most"), [("fixed", 0.88, 0.92), ("official", 0.55, 0.65)]
)
def test_what_a_chain_with_linear_betas_draws(mode: str, least: float, most: float) -> None:
    """With the exact denoiser of actions at -0.8 (a share of 0.1) and 0.8 (0.9)."""
    schedule = make_agent(mode=mode, schedule="linear", diffusion_steps=20).actor.schedule
    places, shares = torch.tensor([-0.8, 0.8]), torch.tensor([0.1, 0.9])

    def eps(x: Tensor, state: Tensor, t: Tensor) -> Tensor:
        abar = schedule.alphas_cumprod[t].float()[:, None]
        variance = abar * 0.05**2 + 1 - abar
        residual = x - abar.sqrt() * places
        weights = (shares.log() - 0.5 * residual**2 / variance).softmax(1)
        return (weights * residual).sum(1, keepdim=True) * (1 - abar).sqrt() / variance

    start = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    drawn = ops.reverse_diffusion(
        eps, schedule, torch.zeros(20_000, 1), x_init=start, solver="dpmpp_2m"
    )
    assert least < float((drawn > 0).float().mean()) < most


@pytest.mark.filterwarnings("ignore:schedule. abar_K is")
def test_a_policy_of_other_linear_levels_is_refused() -> None:
    official = make_agent(mode="official", schedule="linear").state_dict()
    make_agent(mode="official", schedule="linear").load_state_dict(official)
    make_agent(mode="fixed").load_state_dict(make_agent(mode="official").state_dict())
    for mode in ("fixed", "paper"):
        with pytest.raises(ValueError, match="state has mode='official', whose schedule 'linear'"):
            make_agent(mode=mode, schedule="linear").load_state_dict(official)
        agent = make_agent(mode=mode, schedule="linear")
        agent.load_state_dict(make_agent(mode="fixed", schedule="linear").state_dict())
        older = agent.state_dict()
        del older["betas"]
        with pytest.raises(ValueError, match="state lacks the entry 'betas'"):
            agent.load_state_dict(older)


def test_overwriting_without_storing_is_refused() -> None:
    with pytest.raises(ValueError, match="store_improved_actions"):
        dataclasses.replace(MODES["paper"], store_improved_actions=False)


# ---------------------------------------------------------------- updates


@pytest.mark.parametrize(
    ("name", "policy_type"),
    [("diffusion", DiffusionPolicy), ("mlp", MLPPolicy), ("vae", VAEPolicy)],
)
def test_policy_by_name(name: str, policy_type: type[Policy]) -> None:
    agent = make_agent(policy=name)
    assert type(agent.actor) is type(agent.actor_target) is policy_type
    if isinstance(agent.actor, VAEPolicy):
        assert agent.actor.latent_dim == agent.config.hidden_dim


def test_one_critic_step_follows_its_equation() -> None:
    agent = make_agent(gamma=0.9)
    agent.critic_target.load_state_dict(make_agent(seed=5).critic.state_dict())
    batch = TensorReplay.random().sample(16, agent.generator)
    next_action = batch.action.flip(0)
    twin = copy.deepcopy(agent.critic)

    q_next = torch.minimum(*agent.critic_target(batch.next_state, next_action))
    target = (batch.reward + 0.9 * batch.mask * q_next).detach()
    loss = sum(((q - target) ** 2).mean() for q in twin(batch.state, batch.action))
    optimizer = torch.optim.Adam(twin.parameters(), lr=3e-4, eps=1e-5)
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(twin.parameters(), 2.0)
    optimizer.step()

    metrics = agent.update_critic(batch, next_action)
    torch.testing.assert_close(metrics["critic_loss"], loss.detach())
    torch.testing.assert_close(metrics["critic_grad_norm"], grad_norm)
    torch.testing.assert_close(metrics["q_target_mean"], target.mean())
    for ours, theirs in zip(agent.critic.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("max_norm", [0.0, 1e-2])
def test_one_actor_step_follows_its_equation(max_norm: float) -> None:
    eps = 1e-3  # at a smaller one Adam's first step doesn't show how long a gradient is
    agent = make_agent(lr=1e-2, adam_eps=eps, ac_grad_norm=max_norm)
    batch = TensorReplay.random().sample(16, agent.generator)
    twin = copy.deepcopy(agent.actor)

    def loss(policy: Policy) -> Tensor:
        draws = torch.Generator().manual_seed(0)
        return policy.loss(batch.state, batch.best_action, generator=draws)

    loss(twin).backward()
    grad_norm = nn.utils.clip_grad_norm_(twin.parameters(), max_norm or float("inf"))
    assert float(grad_norm) > 10 * max_norm
    torch.optim.Adam(twin.parameters(), lr=1e-2, eps=eps).step()

    metrics = agent.update_actor(loss(agent.actor))
    torch.testing.assert_close(metrics["actor_grad_norm"], grad_norm)
    for ours, theirs in zip(agent.actor.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_target_actor_moves_in_every_nth_update() -> None:
    agent = make_agent(update_actor_target_every=3)
    replay = TensorReplay.random()
    moved = []
    for _ in range(7):
        before = copy.deepcopy(agent.actor_target)
        agent.update(replay)
        pairs = zip(before.parameters(), agent.actor_target.parameters(), strict=True)
        moved.append(any(not torch.equal(old, new) for old, new in pairs))
    assert moved == [True, False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("policy", "mode", "largest_error"),
    [
        ("diffusion", "fixed", 0.2),
        ("mlp", "fixed", 0.2),
        ("vae", "fixed", 0.2),
        ("diffusion", "official", 0.4),
        # Algorithm 3 moves actions away from the rewards they earned: its critic is worse.
        ("diffusion", "paper", 0.4),
    ],
)
def test_learns_a_bandit_whose_best_action_depends_on_the_state(
    policy: str, mode: str, largest_error: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    state = torch.randn(512, OBSERVATION_DIM, generator=generator)
    action = 2 * torch.rand(512, ACTION_DIM, generator=generator) - 1
    best = 0.6 * (1.5 * state[:, :ACTION_DIM]).tanh()
    replay = TensorReplay(
        state=state,
        action=action,
        reward=-4 * (action - best).square().sum(dim=-1, keepdim=True),
        next_state=state,
        mask=torch.zeros(512, 1),
    )
    agent = make_agent(
        policy=policy, mode=mode, batch_size=64, lr=2e-3, ac_grad_norm=0.0, hidden_dim=64
    )

    def error() -> float:
        chosen = agent.act(state, explore=False, generator=torch.Generator().manual_seed(0))
        return float((chosen - best).abs().mean())

    before = error()
    for _ in range(250):
        agent.update(replay)
    assert error() < min(largest_error, 0.5 * before)


# ---------------------------------------------------------------- acting


def test_without_exploration_only_the_start_of_the_chain_is_random() -> None:
    agent = make_agent()
    assert isinstance(agent.actor, DiffusionPolicy)
    observation = torch.randn(6, OBSERVATION_DIM)
    seeded = [
        agent.act(observation, explore=False, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 2)
    ]
    assert not torch.equal(*seeded)
    x_init = torch.randn(6, ACTION_DIM)
    from_x_init = [
        agent.actor.sample(
            observation,
            explore=False,
            x_init=x_init,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 2)
    ]
    assert torch.equal(*from_x_init)


def test_the_deterministic_start_is_the_seeds_own() -> None:
    policies = [make_agent(seed=seed).actor for seed in (0, 0, 1)]
    first, same, other = (policy.state_dict()["deterministic_x_init"] for policy in policies)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("compute_dtype", "expected"), [("float32", None), ("bfloat16", torch.bfloat16)]
)
def test_compute_dtype_reaches_every_product(
    compute_dtype: str, expected: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, torch.dtype | None] = {}

    def spy(name: str) -> None:
        op = getattr(ops, name)

        def remember(*arguments: Any, compute_dtype: torch.dtype | None, **keywords: Any) -> Tensor:
            asked[name] = compute_dtype
            return op(*arguments, compute_dtype=compute_dtype, **keywords)

        monkeypatch.setattr(ops, name, remember)

    spy("reverse_diffusion")
    spy("action_gradient")
    spy("denoising_loss")
    agent = make_agent(compute_dtype=compute_dtype)
    agent.update(TensorReplay.random())
    names = ("reverse_diffusion", "action_gradient", "denoising_loss")
    assert asked == dict.fromkeys(names, expected)
    for critic in (agent.critic, agent.critic_target):
        assert {critic.q1.compute_dtype, critic.q2.compute_dtype} == {expected}
    for policy in ("mlp", "vae"):
        agent = make_agent(compute_dtype=compute_dtype, policy=policy)
        networks = [m for m in agent.actor.modules() if isinstance(m, MLP)]
        assert {network.compute_dtype for network in networks} == {expected}


def test_bfloat16_keeps_float32_at_the_boundary() -> None:
    agent = make_agent(compute_dtype="bfloat16")
    replay = TensorReplay.random()
    agent.update(replay)
    action = agent.act(replay.columns["state"], explore=True)
    assert action.dtype == replay.written[0][2].dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in agent.actor.parameters())


# ---------------------------------------------------------------- configuration and bad input


@pytest.mark.parametrize(
    ("env_id", "ac_norm", "ratio", "steps", "every"),
    [
        ("Hopper-v5", 1.0, 0.3, 20, 1),
        ("Walker2d-v4", 2.0, 0.08, 20, 1),
        ("Ant-v5", 0.8, 0.1, 20, 1),
        ("HalfCheetah-v5", 2.0, 0.08, 40, 2),
        ("HalfCheetah-v3", 2.0, 0.08, 40, 2),
        ("Humanoid-v5", 2.0, 0.1, 20, 1),
        ("Swimmer-v5", 2.0, 0.1, 20, 1),
        ("HumanoidStandup-v5", 2.0, 0.1, 20, 1),
        ("Hopper", 1.0, 0.3, 20, 1),
    ],
)
def test_table_3(env_id: str, ac_norm: float, ratio: float, steps: int, every: int) -> None:
    config = DIPOConfig.for_env(env_id)
    assert config == DIPOConfig(
        ac_grad_norm=ac_norm,
        action_grad_norm_ratio=ratio,
        action_gradient_steps=steps,
        update_actor_target_every=every,
    )


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "diffcore/MultiGoal-v0"])
def test_small_tasks_start_sooner(env_id: str) -> None:
    assert DIPOConfig.for_env(env_id) == DIPOConfig(start_steps=1_000)
    assert DIPOConfig.for_env(f"some.module:{env_id}") == DIPOConfig(start_steps=1_000)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("mode", "papers", ValueError),
        ("policy", "gan", ValueError),
        ("schedule", "sine", ValueError),
        ("solver", "euler", ValueError),
        ("compute_dtype", "float16", ValueError),
        ("diffusion_steps", 0, ValueError),
        ("hidden_dim", -1, ValueError),
        ("batch_size", 0, ValueError),
        ("batch_size", 16.0, TypeError),
        ("batch_size", True, TypeError),
        ("action_gradient_steps", 0, ValueError),
        ("update_actor_target_every", 0, ValueError),
        ("buffer_size", 0, ValueError),
        ("start_steps", -1, ValueError),
        ("lr", float("nan"), ValueError),
        ("lr", 0.0, ValueError),
        ("lr", "3e-4", TypeError),
        ("adam_eps", float("inf"), ValueError),
        ("action_lr", -0.1, ValueError),
        ("noise_ratio", float("nan"), ValueError),
        ("ac_grad_norm", -1.0, ValueError),
        ("action_grad_norm_ratio", float("nan"), ValueError),
        ("gamma", 1.01, ValueError),
        ("gamma", float("nan"), ValueError),
        ("tau", 0.0, ValueError),
        ("tau", True, TypeError),
    ],
)
def test_bad_hyper_parameters_are_refused(field: str, value: object, error: type) -> None:
    with pytest.raises(error, match=field):
        small_dipo_config(**{field: value})
