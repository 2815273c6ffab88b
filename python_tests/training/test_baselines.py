"""The baselines of stable-baselines3: same environments, same logs, same promises."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import torch_defaults
from rich.console import Console
from tiny import CountingEnv, TinyConfig

from diffcore.agents.baselines import (
    SB3PPO,
    SB3SAC,
    SB3TD3,
    BaselineConfig,
    PPOConfig,
    SACConfig,
    TD3Config,
)
from diffcore.cli import main
from diffcore.training import ConfigError, EnvError, TrainConfig, TrainingError, load_agent, train
from diffcore.training import loop as training
from diffcore.training.baselines import BaselineTrainer
from diffcore.training.checkpoint import load_checkpoint
from diffcore.training.logging import read_csv
from diffcore.training.plotting import plot_runs
from diffcore.training.seeding import process_random_state

MakeConfig = Callable[..., TrainConfig]

OFF_POLICY: dict[str, Any] = {"hidden_dims": (8,), "batch_size": 4, "learning_starts": 10}
SMALL: dict[str, BaselineConfig] = {
    "sb3-sac": SACConfig(**OFF_POLICY),
    "sb3-td3": TD3Config(**OFF_POLICY),
    "sb3-ppo": PPOConfig(hidden_dims=(8,), n_steps=10, batch_size=5, n_epochs=2),
}
every_baseline = pytest.mark.parametrize("name", list(SMALL))


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``signal_at(step)``: send the process SIGINT when a baseline's run reaches ``step``."""

    def arrange(step: int) -> None:
        advance = BaselineTrainer.advance

        def advance_and_signal(trainer: BaselineTrainer) -> list[float]:
            returns = advance(trainer)
            if trainer.step == step:
                os.kill(os.getpid(), signal.SIGINT)
            return returns

        monkeypatch.setattr(BaselineTrainer, "advance", advance_and_signal)

    return arrange


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts and lists, by their paths."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    else:
        return {prefix: tree}
    return {k: v for key, value in items for k, v in flat(value, f"{prefix}/{key}").items()}


@every_baseline
def test_a_run_has_the_same_files_in_the_same_format(
    name: str, tiny_run: MakeConfig, console: Console
) -> None:
    own = train(tiny_run("own", tensorboard=True), TinyConfig(), console=console).run
    run = train(tiny_run(name, tensorboard=True), SMALL[name], console=console).run
    assert {path.name for path in run.iterdir()} == {path.name for path in own.iterdir()}
    for log in ("evaluations.csv", "timing.csv"):
        assert read_csv(run / log)[0] == read_csv(own / log)[0]
    columns, rows = read_csv(run / "progress.csv")
    shared = {"step", "updates", "episodes", "episode_return", "episode_length"}
    assert shared <= set(columns)
    assert {"loss" if name == "sb3-ppo" else "critic_loss"} <= set(columns) - shared
    steps = [int(row["step"]) for row in rows]
    wanted = [10, 20, 30, 40, 50, 60] if name == "sb3-ppo" else [7, 14, 21, 28, 35, 42, 49, 56, 60]
    assert steps == wanted
    evaluations = read_csv(run / "evaluations.csv")[1]
    assert [row["step"] for row in evaluations] == ["20", "40", "60"]
    assert {row["mean_length"] for row in evaluations} == {"25.0"}
    # The episodes are those of 25 steps that the environment was told to have.
    assert rows[-1]["episodes"] == "2"
    assert [row["episode_length"] for row in rows if row["episode_length"]] == ["25.0", "25.0"]
    assert load_checkpoint(run / "checkpoint.pt").keys() <= {
        *load_checkpoint(own / "checkpoint.pt").keys()
    }


@every_baseline
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    name: str,
    tiny_run: MakeConfig,
    console: Console,
    signal_at: Callable[[int], None],
) -> None:
    changes = {"num_envs": 2}
    whole = train(tiny_run("whole", **changes), SMALL[name], console=console).run
    signal_at(20 if name == "sb3-ppo" else 34)
    cut = train(tiny_run("cut", **changes), SMALL[name], console=console)
    assert cut.interrupted
    assert cut.step < 60
    torch.manual_seed(99)
    np.random.seed(99)
    assert not training.resume(cut.run, console=console).interrupted
    for log in ("progress.csv", "evaluations.csv"):
        assert (cut.run / log).read_text() == (whole / log).read_text()
    weights = [(run / "weights.safetensors").read_bytes() for run in (cut.run, whole)]
    assert weights[0] == weights[1]
    ends = [flat(load_checkpoint(run / "checkpoint.pt")) for run in (cut.run, whole)]
    assert ends[0].keys() == ends[1].keys()
    for key, value in ends[0].items():
        if not key.startswith(("/seconds", "/train_config/run_dir")):
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(value, ends[1][key]), key


@every_baseline
def test_torchs_default_dtype_changes_nothing(
    name: str, tiny_run: MakeConfig, console: Console
) -> None:
    usual = train(tiny_run("usual"), SMALL[name], console=console).run
    with torch_defaults(torch.float64, None):
        run = train(tiny_run("float64"), SMALL[name], console=console).run
    weights = [(each / "weights.safetensors").read_bytes() for each in (usual, run)]
    assert weights[0] == weights[1]


def test_the_replay_of_a_checkpoint_holds_the_rows_in_use_also_when_it_has_wrapped_round(
    tiny_run: MakeConfig, console: Console
) -> None:
    config = dataclasses.replace(SACConfig(**OFF_POLICY), buffer_size=1000)
    run = train(tiny_run("a", total_steps=30), config, console=console).run
    replay = load_checkpoint(run / "checkpoint.pt")["replay"]
    assert len(replay["rewards"]) == replay["position"] == 30
    training.resume(run, total_steps=40, console=console)
    config = dataclasses.replace(config, buffer_size=16)
    run = train(tiny_run("b", total_steps=30), config, console=console).run
    replay = load_checkpoint(run / "checkpoint.pt")["replay"]
    assert (len(replay["rewards"]), replay["position"], replay["full"]) == (16, 14, True)
    for steps, position in ((31, 15), (34, 2)):  # before the ring's end, and past it
        training.resume(run, total_steps=steps, console=console)
        replay = load_checkpoint(run / "checkpoint.pt")["replay"]
        rows = len(replay["rewards"])
        assert (rows, replay["position"], replay["full"]) == (16, position, True)


@pytest.mark.parametrize("terminates", [True, False])
def test_sb3_sees_where_episodes_end_and_why(
    terminates: bool, register_env: Any, tiny_run: MakeConfig, console: Console
) -> None:
    made: list[CountingEnv] = []

    def make(**kwargs: Any) -> CountingEnv:
        made.append(CountingEnv(length=3, terminates=terminates))
        return made[-1]

    env_id = register_env(make, max_episode_steps=100)
    config = tiny_run(env=env_id, max_episode_steps=None, total_steps=9, eval_interval=9)
    run = train(config, SMALL["sb3-sac"], console=console).run
    replay = load_checkpoint(run / "checkpoint.pt")["replay"]
    # [episode, step] of state and next state: none straddles a reset.
    states = [[float(e), float(s)] for e in range(3) for s in range(3)]
    assert replay["observations"].reshape(9, 2).tolist() == states
    following = [[e, s + 1] for e, s in states]
    assert replay["next_observations"].reshape(9, 2).tolist() == following
    assert replay["rewards"].flatten().tolist() == [1, 2, 3] * 3
    assert replay["dones"].flatten().tolist() == [0, 0, 1] * 3
    timeouts = [0, 0, 0] if terminates else [0, 0, 1]  # where SB3 bootstraps all the same
    assert replay["timeouts"].flatten().tolist() == timeouts * 3
    # Actions in [-1, 1] for the agent are the environment's bounds, [-2, 6].
    actions = replay["actions"].flatten().numpy()
    np.testing.assert_allclose(made[0].actions, -2.0 + 4.0 * (actions + 1.0), atol=1e-5)


def test_an_end_at_the_time_limit_is_an_end(
    register_env: Any, tiny_run: MakeConfig, console: Console
) -> None:
    env_id = register_env(lambda **kwargs: CountingEnv(length=3), max_episode_steps=3)
    config = tiny_run(env=env_id, max_episode_steps=None, total_steps=9, eval_interval=9)
    run = train(config, SMALL["sb3-sac"], console=console).run
    replay = load_checkpoint(run / "checkpoint.pt")["replay"]
    assert replay["dones"].flatten().tolist() == [0, 0, 1] * 3
    assert not replay["timeouts"].any()


def test_ppo_learns_from_the_starts_of_episodes(
    register_env: Any, tiny_run: MakeConfig, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[float]] = []
    iterate = SB3PPO.iterate

    def iterate_and_look(agent: SB3PPO, *arguments: Any) -> dict[str, float]:
        metrics = iterate(agent, *arguments)
        seen.append(agent.model.rollout_buffer.episode_starts.flatten().tolist())
        return metrics

    monkeypatch.setattr(SB3PPO, "iterate", iterate_and_look)
    env_id = register_env(lambda **kwargs: CountingEnv(length=3), max_episode_steps=100)
    config = tiny_run(env=env_id, max_episode_steps=None, total_steps=20)
    train(config, SMALL["sb3-ppo"], console=console)
    starts = [1, 0, 0, 1, 0, 0, 1, 0, 0, 1]
    assert seen == [starts, [0, 0, *starts[:-2]]]


@every_baseline
def test_evaluate_and_plot(
    name: str,
    tiny_run: MakeConfig,
    console: Console,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_run(env="diffcore/MultiGoal-v0", total_steps=20, max_episode_steps=4)
    run = train(config, SMALL[name], console=console).run
    video = tmp_path / "video.gif"
    outputs = []
    for filmed in ([], ["--video", str(video)]):
        assert main(["evaluate", str(run), "--episodes", "3", *filmed]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[1] == f"{outputs[0]}video: {video}\n"
    assert re.search(r"return -?\d+\.\d\d ± .* trained for 20 steps", outputs[0])
    assert "episodes by the goal reached: " in outputs[0]
    assert video.read_bytes().startswith(b"GIF8")
    written = plot_runs([run], tmp_path / "picture.png")
    pictures = {"picture.png", "picture-actions.png"}
    assert {path.name for path in written} == (
        pictures if name == "sb3-ppo" else pictures | {"picture-q.png"}
    )


@every_baseline
def test_acting(name: str, tiny_run: MakeConfig, console: Console) -> None:
    run = train(tiny_run(total_steps=20), SMALL[name], console=console).run
    before = repr(process_random_state())
    agent = load_agent(run).agent
    observation = torch.linspace(-1.0, 1.0, 15).reshape(5, 3)
    mean = agent.act(observation, explore=False)
    assert mean.shape == (5, 1)
    assert torch.equal(mean, agent.act(observation, explore=False, deterministic=True))

    def explore(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return agent.act(observation, explore=True, generator=generator)

    assert torch.equal(explore(1), explore(1))
    assert not torch.equal(explore(1), explore(2))
    assert not torch.equal(explore(1), mean)
    assert explore(1).abs().max() <= 1.0
    assert repr(process_random_state()) == before  # loading and acting leave it alone
    with pytest.raises(ValueError, match="exclude each other"):
        agent.act(observation, explore=True, deterministic=True)


def test_exploring_actions_keep_their_bounds() -> None:
    agent = SB3TD3(3, 1, TD3Config(exploration_noise=5.0), seed=0)
    actions = agent.act(torch.zeros(200, 3), explore=True)
    assert (actions.min(), actions.max()) == (-1.0, 1.0)


def test_the_weights_are_those_that_act(tiny_run: MakeConfig, console: Console) -> None:
    def keys(name: str) -> set[str]:
        run = train(tiny_run(name, total_steps=20), SMALL[name], console=console).run
        return {key.split(".")[0] for key in load_agent(run).agent.weights()}

    assert keys("sb3-sac") == keys("sb3-td3") == {"actor"}
    assert keys("sb3-ppo") == {"mlp_extractor", "action_net", "log_std"}


def test_hyper_parameters_reach_sb3() -> None:
    config = dataclasses.replace(
        SACConfig(), learning_rate=0.1, gamma=0.5, buffer_size=70, learning_starts=7, batch_size=6,
        tau=0.2, train_freq=3, gradient_steps=2, hidden_dims=(5, 4), ent_coef="auto_0.25",
    )  # fmt: skip
    model = SB3SAC(3, 2, config, seed=0, num_envs=2).model
    assert (model.learning_rate, model.gamma, model.tau) == (0.1, 0.5, 0.2)
    assert (model.learning_starts, model.batch_size, model.gradient_steps) == (7, 6, 2)
    assert (model.train_freq.frequency, model.replay_buffer.buffer_size) == (3, 35)
    assert model.log_ent_coef.exp().item() == pytest.approx(0.25)
    widths = [layer.out_features for layer in model.actor.latent_pi if hasattr(layer, "weight")]
    assert widths == [5, 4]
    td3 = TD3Config(exploration_noise=0.3, policy_delay=5, target_policy_noise=0.4,
                    target_noise_clip=0.6)  # fmt: skip
    model = SB3TD3(3, 2, td3, seed=0).model
    assert model.action_noise._sigma.tolist() == [0.3, 0.3]
    assert (model.policy_delay, model.target_policy_noise, model.target_noise_clip) == (5, 0.4, 0.6)
    ppo = PPOConfig(n_steps=8, batch_size=4, n_epochs=3, gae_lambda=0.8, clip_range=0.1,
                    ent_coef=0.2, vf_coef=0.3, max_grad_norm=0.7)  # fmt: skip
    model = SB3PPO(3, 2, ppo, seed=0).model
    assert (model.n_steps, model.batch_size, model.n_epochs) == (8, 4, 3)
    assert (model.gae_lambda, model.clip_range(1.0), model.ent_coef) == (0.8, 0.1, 0.2)
    assert (model.vf_coef, model.max_grad_norm) == (0.3, 0.7)


@pytest.mark.parametrize("num_envs", [1, 4])
@pytest.mark.parametrize("name", ["sb3-sac", "sb3-td3"])
def test_there_are_as_many_updates_as_steps_after_the_random_start(
    name: str, num_envs: int, tiny_run: MakeConfig, console: Console
) -> None:
    config = dataclasses.replace(SMALL[name], learning_starts=20)
    run = train(tiny_run(num_envs=num_envs), config, console=console).run
    assert read_csv(run / "progress.csv")[1][-1]["updates"] == "40"


def test_defaults_are_sb3s() -> None:
    import inspect

    import stable_baselines3 as sb3

    ours_alone = ("hidden_dims", "exploration_noise", "gradient_steps")
    for config, algorithm in ((SACConfig(), sb3.SAC), (TD3Config(), sb3.TD3), (PPOConfig(), sb3.PPO)):
        parameters = inspect.signature(algorithm.__init__).parameters
        for field in dataclasses.fields(config):
            if field.name not in ours_alone:
                assert getattr(config, field.name) == parameters[field.name].default, field.name
    for config, agent in ((SACConfig(), SB3SAC), (TD3Config(), SB3TD3), (PPOConfig(), SB3PPO)):
        own = {"sb3-sac": sb3.SAC, "sb3-td3": sb3.TD3, "sb3-ppo": sb3.PPO}
        algorithm = next(a for n, a in own.items() if n.endswith(agent.__name__[3:].lower()))
        default = algorithm("MlpPolicy", "Pendulum-v1", device="cpu")
        shapes = {name: value.shape for name, value in default.policy.state_dict().items()}
        ours = agent(3, 1, config, seed=0).model.policy.state_dict()
        assert {name: value.shape for name, value in ours.items()} == shapes


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (SACConfig, {"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        (SACConfig, {"gamma": float("nan")}, "gamma must be finite"),
        (SACConfig, {"ent_coef": "auto_0"}, "ent_coef must be 'auto', 'auto_' and a start above 0"),
        (SACConfig, {"ent_coef": "much"}, "ent_coef must be 'auto'.*got 'much'"),
        (SACConfig, {"gradient_steps": -2}, "gradient_steps must be at least -1, got -2"),
        (SACConfig, {"hidden_dims": ()}, "hidden_dims must be a tuple of at least one width"),
        (SACConfig, {"hidden_dims": (64, 0)}, "hidden_dims must be at least 1, got 0"),
        (TD3Config, {"exploration_noise": -0.1}, "exploration_noise must be at least 0, got -0.1"),
        (TD3Config, {"policy_delay": 0}, "policy_delay must be at least 1, got 0"),
        (PPOConfig, {"batch_size": 1}, "batch_size must be at least 2, got 1"),
        (PPOConfig, {"n_steps": 2.0}, "n_steps must be an int, got float 2.0"),
    ],
)
def test_wrong_hyper_parameters(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make(**changes)


def test_settings_that_do_not_fit(tiny_run: MakeConfig, console: Console) -> None:
    with pytest.raises(ConfigError, match="updates_per_step doesn't apply to stable-baselines3"):
        train(tiny_run(updates_per_step=2.0), SMALL["sb3-sac"], console=console)
    small = dataclasses.replace(SACConfig(), buffer_size=1)
    with pytest.raises(ConfigError, match="buffer_size must hold .* 2 environments, got 1"):
        train(tiny_run(num_envs=2), small, console=console)


@every_baseline
def test_discrete_actions_are_refused(
    name: str, tiny_run: MakeConfig, console: Console, tmp_path: Path
) -> None:
    with pytest.raises(EnvError, match="CartPole-v1 has the action space .*only continuous"):
        train(tiny_run(env="CartPole-v1"), SMALL[name], console=console)
    assert list(tmp_path.iterdir()) == []


@every_baseline
def test_divergence_is_an_error_that_says_so(
    name: str, tiny_run: MakeConfig, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = BaselineTrainer.start

    def start_broken(trainer: BaselineTrainer) -> None:
        start(trainer)
        with torch.no_grad():
            for parameter in trainer.agent.model.policy.parameters():
                parameter.fill_(float("nan"))

    monkeypatch.setattr(BaselineTrainer, "start", start_broken)
    with pytest.raises(TrainingError, match="diverged|stable-baselines3 failed after step"):
        train(tiny_run(), SMALL[name], console=console)


def test_a_run_that_only_acts_at_random_is_warned_of(
    tiny_run: MakeConfig, console: Console, output: Any
) -> None:
    config = dataclasses.replace(SACConfig(**OFF_POLICY), learning_starts=60)
    train(tiny_run(), config, console=console)
    assert "the random start (learning_starts) lasts for 60 steps" in output.getvalue()


def test_without_the_package_the_error_says_how_to_install_it(
    tiny_run: MakeConfig,
    console: Console,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = train(tiny_run(total_steps=20), SMALL["sb3-sac"], console=console).run
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["train", "sb3-ppo", "--env", "Pendulum-v1"],
        ["train", "--resume", str(run), "--total-steps", "30"],
        ["evaluate", str(run)],
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert 'pip install "stable-baselines3' in error
        assert 'pip install -c constraints.txt ".[baselines]"' in error
        assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@every_baseline
def test_every_setting_is_in_the_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", name, "--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(SMALL[name]):  # type: ignore[arg-type]
        assert re.search(rf"--{field.name.replace('_', '-')}\b", text), field.name
