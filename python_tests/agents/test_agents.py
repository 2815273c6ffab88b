"""What every agent promises, whatever its algorithm."""

from __future__ import annotations

import copy
import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch
from doubles import ACTION_DIM, KINDS, OBSERVATION_DIM, TensorReplay, make_kind
from helpers import OTHER_DEFAULTS, torch_defaults
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffcore.ops import _backends, _dispatch, _native

every_kind = pytest.mark.parametrize("kind", KINDS)
one_of_each = pytest.mark.parametrize("kind", ["dipo", "diffsr"])


HOST_READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")


class HostReads(TorchDispatchMode):
    """Collects the operators that hand a tensor's value to Python, which wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in HOST_READS:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@every_kind
def test_update_reads_no_value_on_the_host(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "unavailable", "the ops run as on a GPU, on their references")
    agent, replay = make_kind(kind), TensorReplay.random()
    agent.update(replay)  # what is built once may be read
    with HostReads() as reads:
        float(torch.ones(()))
        metrics = agent.update(replay)
    assert reads.seen == ["aten._local_scalar_dense.default"]  # the one above: the probe works
    assert all(isinstance(value, Tensor) and value.ndim == 0 for value in metrics.values())
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.skipif(_native._core is None, reason="needs the compiled module")
@every_kind
def test_an_action_and_an_update_run_on_the_kernels(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: dict[str, set[str]] = {}
    choose = _dispatch.choose

    def remember(op: str, *others: Any) -> str:
        backend = choose(op, *others)
        chosen.setdefault(op, set()).add(backend)
        return backend

    monkeypatch.setattr(_dispatch, "choose", remember)
    # Calls that don't ask go to the kernels; here all do.
    monkeypatch.setattr(_backends, "may_go_straight", lambda *_: False)
    agent = make_kind(kind)
    agent.act(torch.randn(3, OBSERVATION_DIM), explore=True)
    agent.update(TensorReplay.random())
    # Networks that no one kernel has whole: the op runs in parts, and these on theirs.
    in_parts = {"diffsr-paper": "representation_step", "diffsr-orthogonal": "soft_value"}
    if kind in in_parts:
        assert chosen.pop(in_parts[kind]) == {"reference"}
    assert len(chosen) >= 4
    assert all(backends == {"cpu"} for backends in chosen.values())


# ---------------------------------------------------------------- acting


@every_kind
def test_explore_draws_from_the_given_generator_alone(kind: str) -> None:
    agent = make_kind(kind)
    observation = torch.randn(8, OBSERVATION_DIM)
    own = agent.generator.get_state()
    first, again, other = (
        agent.act(observation, explore=True, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(agent.generator.get_state(), own)
    assert float(first.abs().max()) <= 1
    assert first.shape == (8, ACTION_DIM)

    agent.act(observation, explore=True)
    assert not torch.equal(agent.generator.get_state(), own)


@every_kind
def test_deterministic_action_depends_on_its_observation_alone(kind: str) -> None:
    agent = make_kind(kind)
    observation = torch.randn(9, OBSERVATION_DIM)
    state = agent.generator.get_state()
    together = agent.act(observation, explore=False, deterministic=True)
    for row in (0, 4, 8):
        alone = agent.act(observation[row : row + 1], explore=False, deterministic=True)
        torch.testing.assert_close(alone[0], together[row], atol=1e-6, rtol=0)
    assert torch.equal(agent.act(observation, explore=False, deterministic=True), together)
    assert torch.equal(agent.generator.get_state(), state)
    assert together.unique(dim=0).shape[0] > 1


def some_life(kind: str, replay: TensorReplay) -> list[Tensor]:
    """Actions, metrics and weights of an agent."""
    agent = make_kind(kind)
    observation = torch.ones(3, OBSERVATION_DIM, dtype=torch.float32, device="cpu")
    action = agent.act(observation, explore=True)
    metrics = agent.update(replay)
    return [action, *metrics.values(), *agent.weights().values()]


@pytest.mark.parametrize("defaults", OTHER_DEFAULTS, ids=str)
@every_kind
def test_torchs_defaults_for_dtype_and_device_change_nothing(
    kind: str, defaults: tuple[torch.dtype, str | None]
) -> None:
    expected, replay = some_life(kind, TensorReplay.random()), TensorReplay.random()
    with torch_defaults(*defaults):
        results = some_life(kind, replay)
    for result, usual in zip(results, expected, strict=True):
        assert result.dtype == usual.dtype
        assert torch.equal(result, usual)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every_kind
def test_torchs_modes_without_gradients_change_nothing(kind: str, mode: Any) -> None:
    """Neither an agent's life in one, nor how one that was made or loaded there goes on outside."""
    expected, replay = some_life(kind, TensorReplay.random()), TensorReplay.random()
    with mode():
        results = some_life(kind, replay)
        assert not torch.is_grad_enabled()
        agent, loaded = make_kind(kind), make_kind(kind, seed=1)
        agent.update(replay)
        loaded.load_state_dict(saved_and_loaded(agent.state_dict()))
    for result, usual in zip(results, expected, strict=True):
        assert torch.equal(result, usual)
    for other in (agent, loaded):
        other.update(TensorReplay.random(seed=2))
    assert_equal_states(agent.state_dict(), loaded.state_dict())


@one_of_each
def test_a_step_by_itself_without_gradients_is_refused_by_name(kind: str) -> None:
    agent, replay = make_kind(kind), TensorReplay.random()
    batch = agent.sample(replay)
    arguments = (batch, batch.action) if kind == "dipo" else (batch,)
    with torch.no_grad(), pytest.raises(ValueError, match=r"^loss: expected.*torch\.no_grad"):
        agent.update_critic(*arguments)


@every_kind
def test_acting_on_no_observations_gives_no_actions(kind: str) -> None:
    nothing = torch.empty(0, OBSERVATION_DIM)
    assert make_kind(kind).act(nothing, explore=True).shape == (0, ACTION_DIM)


# ---------------------------------------------------------------- settings

# Of every setting a value that isn't the small agents', and what else it takes to be asked for.
OTHER_SETTINGS: dict[str, dict[str, tuple[Any, dict[str, Any]]]] = {
    "dipo": {
        "mode": ("paper", {}),
        "policy": ("mlp", {}),
        "diffusion_steps": (6, {}),
        "schedule": ("vp", {}),
        "solver": ("ddim", {}),
        "noise_ratio": (0.5, {}),
        "hidden_dim": (16, {}),
        "batch_size": (8, {}),
        "gamma": (0.5, {}),
        "tau": (0.5, {}),
        "lr": (1e-2, {}),
        "adam_eps": (1e-2, {}),
        "ac_grad_norm": (1e-3, {}),
        "action_lr": (0.1, {}),
        "action_gradient_steps": (2, {}),
        "action_grad_norm_ratio": (1e-6, {}),
        "update_actor_target_every": (2, {"tau": 0.5}),
        "compute_dtype": ("bfloat16", {}),
    },
    "diffsr": {
        "mode": ("paper", {}),
        "feature_dim": (8, {}),
        "psi_hidden_dim": (16, {}),
        "zeta_hidden_dim": (16, {}),
        "hidden_dim": (16, {}),
        "fourier_frequencies": ("gaussian", {}),
        "fourier_kind": ("cos", {}),
        "fourier_lengthscale": (1.0, {"fourier_frequencies": "gaussian"}),
        "noise_levels": ("cosine", {}),
        "noise_steps": (11, {}),
        "conditioning": ("time_embedding", {}),
        "extra_feature_steps": (2, {}),
        "freeze_representation": (True, {}),
        "representation_lr": (1e-2, {}),
        "lr": (1e-2, {}),
        "adam_eps": (1e-2, {}),
        "batch_size": (8, {}),
        "gamma": (0.5, {}),
        "tau": (0.5, {}),
        "update_target_every": (1, {}),
        "gram_weight": (0.5, {}),
        "initial_temperature": (0.3, {}),
        "random_action_rate": (1.0, {}),
        "bonus": ("kernel", {}),
        "bonus_weight": (0.5, {"bonus": "kernel"}),
        "bonus_ridge": (0.5, {"bonus": "kernel"}),
        "bonus_samples": (8, {"bonus": "kernel"}),
        "compute_dtype": ("bfloat16", {}),
    },
}


@one_of_each
def test_every_setting_is_listed(kind: str) -> None:
    settings = {field.name for field in dataclasses.fields(make_kind(kind).config)}
    assert settings == OTHER_SETTINGS[kind].keys() | {"start_steps", "buffer_size"}  # the loop's


@pytest.mark.parametrize(
    ("kind", "setting"), [(kind, name) for kind in OTHER_SETTINGS for name in OTHER_SETTINGS[kind]]
)
def test_every_setting_changes_something(kind: str, setting: str) -> None:
    value, besides = OTHER_SETTINGS[kind][setting]

    def life(**changes: Any) -> list[Tensor]:
        """Of three updates, as many as what moves in every second one takes to be noticed."""
        agent, replay = make_kind(kind, **besides, **changes), TensorReplay.random()
        metrics = [agent.update(replay) for _ in range(3)]
        action = agent.act(replay.columns["state"], explore=True)
        # The last metrics alone: differences of the first ones show in what they led to.
        return [action, *metrics[-1].values(), *agent.weights().values()]

    changed, usual = life(**{setting: value}), life()
    assert [t.shape for t in changed] != [t.shape for t in usual] or not all(
        map(torch.equal, changed, usual)
    )


# ---------------------------------------------------------------- seeds, saving, resuming


def assert_equal_states(first: Any, second: Any) -> None:
    """Nested dicts and lists with the same keys, equal values and bitwise-equal tensors."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal_states(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        for one, other in zip(first, second, strict=True):
            assert_equal_states(one, other)
    elif isinstance(first, Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


@every_kind
def test_a_seed_fixes_everything_and_leaves_torchs_own_alone(kind: str) -> None:
    torch_state = torch.get_rng_state()
    agents = [make_kind(kind, seed=seed) for seed in (7, 7, 8)]
    for agent in agents:
        agent.update(TensorReplay.random())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert_equal_states(agents[0].state_dict(), agents[1].state_dict())
    weights = [next(agent.actor.parameters()) for agent in agents]
    assert not torch.equal(weights[0], weights[2])


def saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_kind
def test_resuming_from_a_state_is_bitwise_the_same_run(kind: str) -> None:
    agent, replay = make_kind(kind), TensorReplay.random()
    for _ in range(3):
        agent.update(replay)
    state, replay_copy = saved_and_loaded(agent.state_dict()), TensorReplay.random()
    replay_copy.columns = copy.deepcopy(replay.columns)
    resumed = make_kind(kind, seed=99)
    resumed.load_state_dict(state)

    observation = torch.randn(3, OBSERVATION_DIM)
    for _ in range(3):
        for each, its_replay in ((agent, replay), (resumed, replay_copy)):
            each.act(observation, explore=True)
            each.update(its_replay)
    assert agent.updates == resumed.updates == 6
    assert_equal_states(agent.state_dict(), resumed.state_dict())
    assert_equal_states(replay.columns, replay_copy.columns)
    assert torch.equal(
        agent.act(observation, explore=False, deterministic=True),
        resumed.act(observation, explore=False, deterministic=True),
    )


def storages(value: Any) -> set[int]:
    """Where the tensors in nested dicts and lists lie."""
    if isinstance(value, Tensor):
        return {value.untyped_storage().data_ptr()}
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set().union(*map(storages, inner))


@every_kind
def test_an_agent_loaded_from_another_shares_nothing_with_it(kind: str) -> None:
    agent, clone = make_kind(kind), make_kind(kind, seed=99)
    agent.update(TensorReplay.random())
    clone.load_state_dict(agent.state_dict())
    assert not storages(agent.state_dict()) & storages(clone.state_dict())

    frozen = copy.deepcopy(clone.state_dict())
    agent.update(TensorReplay.random())
    assert_equal_states(clone.state_dict(), frozen)
    clone.update(TensorReplay.random())
    assert_equal_states(clone.state_dict(), agent.state_dict())


@one_of_each
def test_loading_keeps_the_configs_own_learning_rate(kind: str) -> None:
    agent = make_kind(kind, lr=1e-2)
    agent.load_state_dict(make_kind(kind, lr=1e-3).state_dict())
    assert agent.actor_optimizer.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("dipo", {"action_dim": 3}, "action_dim=3"),
        ("diffsr", {"action_dim": 3}, "action_dim=3"),
        ("dipo", {"observation_dim": 9}, "observation_dim=9"),
        ("diffsr", {"observation_dim": 9}, "observation_dim=9"),
        ("dipo", {"agent": "diffsr"}, "agent='diffsr'"),
        ("diffsr", {"agent": "dipo"}, "agent='dipo'"),
        ("dipo", {"config": {"policy": "vae"}}, "policy='vae'"),
        ("diffsr", {"config": {"feature_dim": 7}}, "feature_dim=7"),
    ],
)
def test_a_state_of_another_agent_is_refused(
    kind: str, change: dict[str, Any], message: str
) -> None:
    agent = make_kind(kind)
    with pytest.raises(ValueError, match=message):
        agent.load_state_dict({**agent.state_dict(), **change})


@one_of_each
def test_a_state_with_a_missing_entry_is_refused(kind: str) -> None:
    agent = make_kind(kind)
    state = agent.state_dict()
    del state["critic_optimizer"]
    with pytest.raises(ValueError, match="critic_optimizer"):
        agent.load_state_dict(state)


@one_of_each
def test_a_state_from_another_kind_of_device_warns_and_keeps_the_random_state(kind: str) -> None:
    agent, other = make_kind(kind), make_kind(kind, seed=1)
    random_state = agent.generator.get_state()
    with pytest.warns(UserWarning, match="'cuda'"):
        agent.load_state_dict({**other.state_dict(), "generator_device": "cuda"})
    assert torch.equal(agent.generator.get_state(), random_state)
    assert_equal_states(agent.weights(), other.weights())


@every_kind
def test_weights_are_copies_of_all_that_acting_needs(kind: str) -> None:
    agent = make_kind(kind)
    weights = agent.weights()
    observation = torch.randn(5, OBSERVATION_DIM)
    action = agent.act(observation, explore=False, deterministic=True)
    other = make_kind(kind, seed=4)
    assert not torch.equal(other.act(observation, explore=False, deterministic=True), action)
    other.actor.load_state_dict(weights)
    assert torch.equal(other.act(observation, explore=False, deterministic=True), action)
    agent.update(TensorReplay.random())
    assert_equal_states(weights, other.weights())


# ---------------------------------------------------------------- bad input


@one_of_each
@pytest.mark.parametrize(
    ("sizes", "error", "name"),
    [
        ((0, 2, 0), ValueError, "observation_dim"),
        ((4, -2, 0), ValueError, "action_dim"),
        ((4.0, 2, 0), TypeError, "observation_dim"),
        ((4, 2, -1), ValueError, "seed"),
        ((4, 2, 0.5), TypeError, "seed"),
    ],
)
def test_bad_sizes_are_refused(kind: str, sizes: Any, error: type, name: str) -> None:
    observation_dim, action_dim, seed = sizes
    agent = make_kind(kind)
    with pytest.raises(error, match=name):
        type(agent)(observation_dim, action_dim, agent.config, seed=seed)


@one_of_each
@pytest.mark.parametrize(
    ("observation", "error", "message"),
    [
        (torch.zeros(OBSERVATION_DIM), ValueError, r"\[B, 4\], got \[4\]"),
        (torch.zeros(2, 5), ValueError, r"\[B, 4\], got \[2, 5\]"),
        (torch.zeros(2, OBSERVATION_DIM, dtype=torch.float64), TypeError, r"got torch\.float64"),
        (np.zeros((2, OBSERVATION_DIM)), TypeError, "got float64"),
        ([[0.0] * OBSERVATION_DIM], TypeError, "got list"),
        (torch.zeros(2, OBSERVATION_DIM, device="meta"), ValueError, "'cpu', got 'meta'"),
    ],
)
def test_bad_observations_are_refused(
    kind: str, observation: Any, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        make_kind(kind).act(observation, explore=True)


@every_kind
def test_exploring_deterministically_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="explore"):
        make_kind(kind).act(
            torch.zeros(1, OBSERVATION_DIM), explore=True, deterministic=True
        )


@one_of_each
@pytest.mark.parametrize("column", ["reward", "mask"])
def test_a_batch_that_would_broadcast_is_refused(kind: str, column: str) -> None:
    replay = TensorReplay.random()
    replay.columns[column] = replay.columns[column].squeeze(-1)
    with pytest.raises(ValueError, match=rf"{column} must have shape \[(\d+), 1\], got \[\1\]"):
        make_kind(kind).update(replay)
