"""Training runs: what they write, and that stopping and going on changes nothing."""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
import json
import os
import signal
import types
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import torch_defaults
from rich.console import Console
from tiny import CountingEnv, TinyAgent, TinyConfig

from diffcore.agents import DiffSRConfig, DIPOConfig
from diffcore.training import (
    CheckpointError,
    ConfigError,
    EnvError,
    Evaluator,
    RunError,
    TrainConfig,
    Trainer,
    TrainingError,
    WriteError,
    load_agent,
    loop,
    resume,
    train,
)
from diffcore.training.checkpoint import copy_tensors, load_checkpoint, save_checkpoint
from diffcore.training.config import to_dict
from diffcore.training.logging import read_csv, read_series
from diffcore.training.run_directory import RunDirectory

DIPO = DIPOConfig(
    diffusion_steps=3,
    hidden_dim=16,
    batch_size=8,
    action_gradient_steps=2,
    start_steps=20,
    buffer_size=500,
)
DIFFSR = DiffSRConfig(
    feature_dim=8,
    psi_hidden_dim=8,
    zeta_hidden_dim=8,
    hidden_dim=16,
    noise_steps=5,
    extra_feature_steps=1,
    batch_size=8,
    start_steps=20,
    buffer_size=500,
)
both_agents = pytest.mark.parametrize("agent_config", [DIPO, DIFFSR], ids=["dipo", "diffsr"])
MakeConfig = Callable[..., TrainConfig]
SignalAt = Callable[..., None]


def assert_equal_trees(a: Any, b: Any, where: str = "checkpoint") -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert a.numpy().tobytes() == b.numpy().tobytes(), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal_trees(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal_trees(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_equal_runs(a: Path, b: Path) -> None:
    """Bit for bit, but for the clock and for what the directories are called."""
    for name in ("progress.csv", "evaluations.csv"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    weights = [safetensors.torch.load_file(run / "weights.safetensors") for run in (a, b)]
    assert_equal_trees(*weights, where="weights")
    states = [load_checkpoint(run / "checkpoint.pt") for run in (a, b)]
    for state in states:
        del state["seconds"]
        for setting in ("run_dir", "checkpoint_minutes"):
            del state["train_config"][setting]
    assert_equal_trees(*states)


# What a run writes


def test_a_run_leaves_everything_in_its_directory(
    tiny_run: MakeConfig, console: Console, output: io.StringIO
) -> None:
    config = tiny_run(tensorboard=True)
    result = train(config, TinyConfig(), console=console)
    run = RunDirectory(result.run)
    assert result.run == config.run_dir
    assert (result.step, result.interrupted) == (60, False)
    assert result.steps_per_second > 0

    written = json.loads(run.config.read_text())
    assert written["agent"] == "tiny"
    assert written["train"] == to_dict(config)
    assert written["agent_config"] == to_dict(TinyConfig())

    steps, returns = read_series(run.evaluations, "mean_return")
    assert steps == [20, 40, 60]
    assert result.evaluation is not None
    assert returns[-1] == result.evaluation.mean_return
    steps, _ = read_series(run.progress, "updates")
    assert steps == [*range(7, 60, 7), 60]
    assert read_series(run.progress, "episode_length") == ([28, 56], [25.0, 25.0])
    assert read_series(run.progress, "loss")[0] == [14, *range(21, 60, 7), 60]
    assert read_csv(run.timing)[0] == ["step", "seconds", "steps_per_second"]
    steps, seconds = read_series(run.timing, "seconds")
    speeds = read_series(run.timing, "steps_per_second")[1][1:]  # each since the row before
    assert speeds == pytest.approx((np.diff(steps) / np.diff(seconds)).tolist())

    weights = safetensors.torch.load_file(run.weights)
    loaded = load_agent(str(result.run))
    assert loaded.step == 60
    assert_equal_trees(weights, loaded.agent.weights())
    assert list(run.tensorboard.iterdir())
    for expected in ("step 20: evaluation return", "step 35/60", "steps/s", "left"):
        assert expected in output.getvalue()


def test_directories_are_named_and_never_overwritten(
    tmp_path: Path, tiny_run: MakeConfig, console: Console
) -> None:
    config = tiny_run(run_dir=None, runs_dir=tmp_path, total_steps=21, seed=5)
    result = train(config, DIPO, console=console)
    assert result.run.parent == tmp_path / "Pendulum-v1"
    assert result.run.name.startswith("dipo-fixed-s5-20")

    again = tiny_run(run_dir=result.run)
    with pytest.raises(RunError, match=r"exists already .*diffcore train --resume"):
        train(again, TinyConfig(), console=console)


def test_runs_that_start_in_one_second_have_a_directory_each(
    tmp_path: Path, tiny_run: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noon(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Noon:
            return cls(2026, 1, 2, 12)

    monkeypatch.setattr("diffcore.training.run_directory.datetime", Noon)
    config = tiny_run(run_dir=None, runs_dir=tmp_path)
    runs = [RunDirectory.create(config, TinyConfig(lr=lr)) for lr in (0.1, 0.2, 0.3)]
    name = "tiny-s0-20260102-120000"
    assert [run.path.name for run in runs] == [name, f"{name}-2", f"{name}-3"]
    assert [run.read_config()["agent_config"]["lr"] for run in runs] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("run_dir", [None, "named"])
def test_a_run_directory_behind_a_broken_link(
    tmp_path: Path, tiny_run: MakeConfig, run_dir: str | None
) -> None:
    (tmp_path / "runs").symlink_to(tmp_path / "unmounted" / "disk")
    runs = tmp_path / "runs" / "mine"
    config = tiny_run(run_dir=run_dir and runs / run_dir, runs_dir=runs)
    with pytest.raises(RunError, match="^can't make the run directory "):
        RunDirectory.create(config, TinyConfig())


def test_who_has_no_checkpoint_is_not_sent_to_resume_it(tiny_run: MakeConfig) -> None:
    config = tiny_run()
    RunDirectory.create(config, TinyConfig())
    with pytest.raises(RunError, match="it holds no checkpoint .* remove it") as caught:
        RunDirectory.create(config, TinyConfig())
    assert "--resume" not in str(caught.value)


def test_a_run_that_finds_the_disk_full_at_its_start_leaves_no_directory(
    tiny_run: MakeConfig, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, fill: Any) -> None:
        raise WriteError(f"can't write {path}: {os.strerror(errno.ENOSPC)}")

    config = tiny_run()
    with monkeypatch.context() as patch:
        patch.setattr("diffcore.training.run_directory.write_atomically", full)
        with pytest.raises(WriteError, match=r"config\.json: No space left on device"):
            train(config, TinyConfig(), console=console)
    assert train(config, TinyConfig(), console=console).step == 60


def test_namespaced_ids_make_one_directory(tmp_path: Path, tiny_run: MakeConfig) -> None:
    config = tiny_run(env="diffcore/MultiGoal-v0", run_dir=None, runs_dir=tmp_path)
    run = RunDirectory.create(config, TinyConfig())
    assert run.path.parent == tmp_path / "diffcore-MultiGoal-v0"


@both_agents
def test_equal_seeds_give_equal_runs_and_others_do_not(
    tiny_run: MakeConfig, console: Console, agent_config: Any
) -> None:
    runs = [
        train(tiny_run(str(i), seed=seed), agent_config, console=console).run
        for i, seed in enumerate([1, 1, 2])
    ]
    assert_equal_runs(runs[0], runs[1])
    assert (runs[0] / "progress.csv").read_bytes() != (runs[2] / "progress.csv").read_bytes()


@both_agents
def test_torchs_default_dtype_changes_nothing(
    tiny_run: MakeConfig, console: Console, signal_at: SignalAt, agent_config: Any
) -> None:
    usual = train(tiny_run("usual"), agent_config, console=console).run
    signal_at(33)
    with torch_defaults(torch.float64, None):
        run = train(tiny_run("float64"), agent_config, console=console).run
        load_agent(run)
        resume(run, console=console)
    assert_equal_runs(usual, run)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@both_agents
def test_torchs_modes_without_gradients_change_nothing(
    tiny_run: MakeConfig, console: Console, signal_at: SignalAt, agent_config: Any, mode: Any
) -> None:
    usual = train(tiny_run("usual"), agent_config, console=console).run
    signal_at(33)
    with mode():
        run = train(tiny_run("without"), agent_config, console=console).run
        load_agent(run)
        resume(run, console=console)
        assert not torch.is_grad_enabled()
    assert_equal_runs(usual, run)


@both_agents
def test_a_default_device_is_not_the_runs(
    tiny_run: MakeConfig, console: Console, agent_config: Any
) -> None:
    with torch_defaults(torch.float32, "meta"):
        run = train(tiny_run(), agent_config, console=console).run
    assert {value.device.type for value in load_agent(run).agent.weights().values()} == {"cpu"}


@pytest.mark.parametrize(
    ("updates_per_step", "updates"), [(1.0, 50), (0.5, 25), (3.0, 150), (0, 0)]
)
def test_updates_per_step(
    tiny_run: MakeConfig, console: Console, updates_per_step: float, updates: int
) -> None:
    run = train(
        tiny_run(updates_per_step=updates_per_step, num_envs=2), TinyConfig(), console=console
    ).run
    assert read_series(run / "progress.csv", "updates")[1][-1] == updates


def test_a_run_that_never_learns_says_so(
    tiny_run: MakeConfig, console: Console, output: io.StringIO
) -> None:
    train(tiny_run(), TinyConfig(start_steps=60), console=console)
    assert "nothing will be learned" in output.getvalue()


def test_an_environment_without_a_time_limit_is_pointed_out(
    tiny_run: MakeConfig, console: Console, output: io.StringIO, register_env: Any
) -> None:
    env_id = register_env(CountingEnv)
    train(tiny_run(env=env_id, max_episode_steps=None), TinyConfig(), console=console)
    assert "has no time limit" in output.getvalue()


@pytest.mark.parametrize("fails", [False, True])
def test_the_thread_count_is_the_runs_alone(
    tiny_run: MakeConfig, console: Console, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    seen = set()
    act = TinyAgent.act

    def act_and_look(agent: TinyAgent, observation: Any, **how: Any) -> Any:
        seen.add(torch.get_num_threads())
        if fails:
            raise MemoryError
        return act(agent, observation, **how)

    monkeypatch.setattr(TinyAgent, "act", act_and_look)
    before = torch.get_num_threads()
    asked = before + 1
    if fails:
        with pytest.raises(MemoryError):
            train(tiny_run(threads=asked), TinyConfig(), console=console)
    else:
        run = train(tiny_run(threads=asked), TinyConfig(), console=console).run
        assert torch.get_num_threads() == before
        resume(run, total_steps=70, console=console)
    assert seen == {asked}
    assert torch.get_num_threads() == before


def test_arguments_for_the_environment_are_part_of_the_run(
    tiny_run: MakeConfig, console: Console, signal_at: SignalAt, register_env: Any
) -> None:
    env_id = register_env(CountingEnv, max_episode_steps=100)
    signal_at(33)
    config = tiny_run(env=env_id, env_kwargs={"length": 4}, max_episode_steps=None)
    run = train(config, TinyConfig(), console=console).run
    assert json.loads((run / "config.json").read_text())["train"]["env_kwargs"] == {"length": 4}
    assert load_agent(run).config == config
    resume(run, console=console)
    for name, column in (("evaluations", "mean_length"), ("progress", "episode_length")):
        assert set(read_series(run / f"{name}.csv", column)[1]) == {4.0}
    with pytest.raises(EnvError, match="unexpected keyword argument 'width'"):
        train(tiny_run("bad", env=env_id, env_kwargs={"width": 4}), TinyConfig(), console=console)


def test_environment_arguments_are_as_config_json_has_them(tiny_run: MakeConfig) -> None:
    given = {"shape": (2, 3)}
    config = tiny_run(env_kwargs=given)
    given["more"] = (1,)
    assert config.env_kwargs == {"shape": [2, 3]}
    assert hash(config) == hash(tiny_run(env_kwargs={"shape": [2, 3]}))


# What is learned from


def replay_of(run: Path) -> dict[str, torch.Tensor]:
    replay = load_checkpoint(run / "checkpoint.pt")["replay"]
    return {name: column.squeeze(-1) for name, column in replay["columns"].items()}


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("terminates", [True, False])
def test_only_real_transitions_are_stored(
    tiny_run: MakeConfig, console: Console, register_env: Any, num_envs: int, terminates: bool
) -> None:
    env_id = register_env(
        lambda **kwargs: CountingEnv(length=3, terminates=terminates), max_episode_steps=100
    )
    config = tiny_run(env=env_id, num_envs=num_envs, total_steps=30, max_episode_steps=None)
    rows = replay_of(train(config, TinyConfig(), console=console).run)
    assert len(rows["reward"]) == 30
    torch.testing.assert_close(rows["next_state"] - rows["state"], torch.tensor([[0.0, 1.0]] * 30))
    torch.testing.assert_close(rows["reward"], rows["next_state"][:, 1])
    ends = (rows["next_state"][:, 1] == 3).float()
    assert ends.sum() == num_envs * (30 // num_envs // 3)
    nothing = torch.zeros(30)
    torch.testing.assert_close(rows["terminated"], ends if terminates else nothing)
    torch.testing.assert_close(rows["truncated"], nothing if terminates else ends)


def test_the_time_limit_follows_the_agent(tiny_run: MakeConfig, console: Console) -> None:
    masks = {}
    for bootstrap in (True, False):
        config = tiny_run(str(bootstrap), max_episode_steps=2)
        agent_config = TinyConfig(bootstrap_truncated=bootstrap)
        run = train(config, agent_config, console=console).run
        masks[bootstrap] = read_series(run / "progress.csv", "mask")[1]
    assert set(masks[True]) == {1.0}
    assert 0.3 < np.mean(masks[False]) < 0.7


def test_stored_actions_are_the_agents_and_within_bounds(
    tiny_run: MakeConfig, console: Console
) -> None:
    rows = replay_of(train(tiny_run(), TinyConfig(), console=console).run)
    assert rows["action"].abs().max() <= 1.0
    assert rows["action"][:10].std() > 0.3  # the random start
    assert not torch.equal(rows["action"], rows["best_action"])


def test_the_random_start_has_start_steps(
    tiny_run: MakeConfig, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, explored = TinyAgent.act, []

    def watched(agent: TinyAgent, observation: torch.Tensor, **how: Any) -> torch.Tensor:
        explored.append(how["explore"])
        return act(agent, observation, **how)

    monkeypatch.setattr(TinyAgent, "act", watched)
    train(tiny_run(), TinyConfig(start_steps=13), console=console)
    assert explored.count(True) == 60 - 13


def test_diverged_actions_stop_the_run(
    tiny_run: MakeConfig, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        TinyAgent, "act", lambda self, observation, **how: torch.full((len(observation), 1), np.nan)
    )
    with pytest.raises(TrainingError, match="diverged: at step 10"):
        train(tiny_run(), TinyConfig(), console=console)


# Evaluations and checkpoints on the side


@pytest.mark.parametrize("deterministic", [False, True])
def test_evaluations_are_as_configured(
    tiny_run: MakeConfig, console: Console, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    made = []

    class Watched(Evaluator):
        def __init__(self, env_id: str, **settings: Any) -> None:
            made.append((env_id, settings))
            super().__init__(env_id, **settings)

    monkeypatch.setattr("diffcore.training.loop.Evaluator", Watched)
    settings = {"max_episode_steps": 9, "env_kwargs": {"g": 9.0}, "seed": 5}
    config = tiny_run(eval_episodes=3, eval_deterministic=deterministic, **settings)
    train(config, TinyConfig(), console=console)
    own = {"episodes": 3, "deterministic": deterministic, "device": torch.device("cpu")}
    assert made == [("Pendulum-v1", {**settings, **own})]


@both_agents
def test_evaluations_and_checkpoints_do_not_touch_training(
    tiny_run: MakeConfig, console: Console, agent_config: Any
) -> None:
    quiet = train(tiny_run("quiet", eval_interval=60), agent_config, console=console).run
    busy = train(
        tiny_run("busy", eval_interval=3, eval_episodes=1, checkpoint_minutes=0.0),
        agent_config,
        console=console,
    ).run
    assert (quiet / "progress.csv").read_bytes() == (busy / "progress.csv").read_bytes()
    states = [load_checkpoint(run / "checkpoint.pt") for run in (quiet, busy)]
    for part in ("agent_state", "replay", "environments", "random_actions"):
        assert_equal_trees(states[0][part], states[1][part], part)


# Interruption and resumption


@both_agents
@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize(
    "env_id",
    [
        "Pendulum-v1",
        "diffcore/MultiGoal-v0",
        "HalfCheetah-v5",
        "diffcore/Hopper-ET-v0",
        "diffcore/Pendulum-masked-v0",
        "diffcore/Hopper-ET-masked-v0",
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    tiny_run: MakeConfig,
    console: Console,
    output: io.StringIO,
    signal_at: SignalAt,
    env_id: str,
    num_envs: int,
    agent_config: Any,
) -> None:
    whole = train(tiny_run("whole", env=env_id, num_envs=num_envs), agent_config, console=console).run

    # In the random start, in mid-episode after it, and right at an evaluation.
    for step, number in ((14, signal.SIGINT), (38, signal.SIGTERM), (40, signal.SIGINT)):
        signal_at(step, number)
        if step == 14:
            config = tiny_run("parts", env=env_id, num_envs=num_envs)
            result = train(config, agent_config, console=console)
        else:
            result = resume(result.run, console=console)
        assert (result.step, result.interrupted) == (step, True)
        assert not (result.run / "weights.safetensors").exists()
    result = resume(result.run, console=console)
    assert (result.step, result.interrupted) == (60, False)
    assert_equal_runs(whole, result.run)
    assert "warning" not in output.getvalue()


@pytest.mark.parametrize(
    ("agent_config", "changes"),
    [
        *((DIPO, {"policy": p, "mode": m}) for p in ("mlp", "vae") for m in ("official", "paper")),
        (DIFFSR, {"mode": "official", "gram_weight": 0.1}),
        (DIFFSR, {"mode": "paper", "conditioning": "time_embedding"}),
        (DIFFSR, {"bonus": "elliptical"}),
        (DIFFSR, {"bonus": "kernel", "bonus_samples": 4}),
        (DIFFSR, {"compute_dtype": "bfloat16", "update_target_every": 3}),
        (DIFFSR, {"freeze_representation": True}),
    ],
)
def test_every_kind_of_agent_resumes(
    tiny_run: MakeConfig,
    console: Console,
    signal_at: SignalAt,
    agent_config: Any,
    changes: dict[str, Any],
) -> None:
    agent_config = dataclasses.replace(agent_config, **changes)
    whole = train(tiny_run("whole"), agent_config, console=console).run
    signal_at(33)
    parts = train(tiny_run("parts"), agent_config, console=console).run
    resume(parts, console=console)
    assert_equal_runs(whole, parts)


def test_a_full_ring_resumes(tiny_run: MakeConfig, console: Console, signal_at: SignalAt) -> None:
    agent_config = TinyConfig(buffer_size=17)
    whole = train(tiny_run("whole"), agent_config, console=console).run
    signal_at(43)
    parts = train(tiny_run("parts"), agent_config, console=console).run
    resume(parts, console=console)
    assert_equal_runs(whole, parts)


def test_checkpoints_keep_their_distance(
    tiny_run: MakeConfig, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, seconds, steps = loop.save_checkpoint, itertools.count(), []

    def watched(path: Path, contents: dict[str, Any]) -> None:
        steps.append(contents["step"])
        save(path, contents)

    monkeypatch.setattr(loop, "save_checkpoint", watched)
    clock = types.SimpleNamespace(monotonic=lambda: next(seconds))  # a look takes a second
    monkeypatch.setattr(loop, "time", clock)
    train(tiny_run(checkpoint_minutes=10 / 60), TinyConfig(), console=console)
    assert steps == [9, 19, 29, 39, 49, 59, 60]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="tells which files are open")
def test_what_a_checkpoint_counts_on_is_on_the_disk_before_it(
    tiny_run: MakeConfig, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, synced = os.fsync, []

    def watched(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    run = train(tiny_run(), TinyConfig(), console=console).run
    logs = ["progress.csv", "evaluations.csv", "timing.csv"]
    # A file that is moved to its name, and the directory that then has the name.
    checkpoint, weights = (
        [f"{name}.tmp", run.name] for name in ("checkpoint.pt", "weights.safetensors")
    )
    assert synced[-7:] == logs + checkpoint + weights


@pytest.mark.parametrize("crash_after", [29, 41])
def test_a_crash_between_checkpoints_leaves_no_duplicates(
    tiny_run: MakeConfig,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
    crash_after: int,
) -> None:
    whole = train(tiny_run("whole"), DIPO, console=console).run

    saved_at: list[int] = []
    from diffcore.training import loop

    def save_some(session: Any) -> None:
        if session.trainer.step in (10, 26):  # then comes a crash that no one could save for
            saved_at.append(session.trainer.step)
            session.save()

    advance = Trainer.advance

    def advance_and_crash(trainer: Trainer) -> list[float]:
        if trainer.step == crash_after:
            raise MemoryError
        return advance(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Session, "save_or_warn", save_some)
        patch.setattr(Trainer, "advance", advance_and_crash)
        config = tiny_run("parts", checkpoint_minutes=0.0)
        with pytest.raises(MemoryError):
            train(config, DIPO, console=console)
    assert saved_at == [10, 26]
    assert config.run_dir is not None
    assert read_series(config.run_dir / "progress.csv", "updates")[0][-1] >= 28
    result = resume(config.run_dir, console=console)
    assert_equal_runs(whole, result.run)


@pytest.mark.parametrize("cut_at", [40, 60])  # 60: with every training step done
def test_an_evaluation_cut_short_is_made_up_for(
    tiny_run: MakeConfig, console: Console, monkeypatch: pytest.MonkeyPatch, cut_at: int
) -> None:
    whole = train(tiny_run("whole"), TinyConfig(), console=console).run
    act, acts = TinyAgent.act, 0

    def act_and_interrupt(agent: TinyAgent, observation: Any, **how: Any) -> Any:
        nonlocal acts
        if not how["explore"]:
            acts += 1
            # The fifth step of the evaluation at cut_at; those before it took 25 steps each.
            if acts == 25 * (cut_at // 20 - 1) + 5:
                os.kill(os.getpid(), signal.SIGINT)
        return act(agent, observation, **how)

    monkeypatch.setattr(TinyAgent, "act", act_and_interrupt)
    result = train(tiny_run("parts"), TinyConfig(), console=console)
    assert (result.step, result.interrupted) == (cut_at, True)
    assert read_series(result.run / "evaluations.csv", "mean_return")[0][-1] == cut_at - 20
    resume(result.run, console=console)
    assert_equal_runs(whole, result.run)


def test_a_second_ctrl_c_does_not_wait(
    tiny_run: MakeConfig, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(trainer: Trainer) -> list[float]:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal was waited with")

    monkeypatch.setattr(Trainer, "advance", stuck)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_run(), TinyConfig(), console=console)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_hangup_ends_a_run_unless_it_is_ignored(
    tiny_run: MakeConfig, console: Console, signal_at: SignalAt
) -> None:
    signal_at(33, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert not train(tiny_run("ignored"), TinyConfig(), console=console).interrupted
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        result = train(tiny_run(), TinyConfig(), console=console)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (result.step, result.interrupted) == (33, True)
    assert load_checkpoint(result.run / "checkpoint.pt")["step"] == 33


def test_a_complete_run_can_be_extended(tiny_run: MakeConfig, console: Console) -> None:
    run = train(tiny_run(total_steps=40), TinyConfig(), console=console).run
    with pytest.raises(ConfigError, match="has done 40 of 40 steps"):
        resume(run, console=console)
    result = resume(run, total_steps=60, console=console)
    assert (result.step, result.interrupted) == (60, False)
    assert json.loads((run / "config.json").read_text())["train"]["total_steps"] == 60
    whole = train(tiny_run("whole"), TinyConfig(), console=console).run
    weights = [safetensors.torch.load_file(r / "weights.safetensors") for r in (run, whole)]
    assert_equal_trees(*weights)


def test_the_time_spent_adds_up(tiny_run: MakeConfig, console: Console) -> None:
    run = train(tiny_run(total_steps=40), TinyConfig(), console=console).run
    checkpoint = copy_tensors(load_checkpoint(run / "checkpoint.pt"))
    save_checkpoint(run / "checkpoint.pt", {**checkpoint, "seconds": 5000.0})
    resume(run, total_steps=60, console=console)
    steps, seconds = read_series(run / "timing.csv", "seconds")
    assert all((second > 5000) == (step > 40) for step, second in zip(steps, seconds, strict=True))
    assert load_checkpoint(run / "checkpoint.pt")["seconds"] > 5000


@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_weights_that_a_complete_run_lacks_are_written_by_resuming_it(
    tiny_run: MakeConfig, console: Console, damage: str
) -> None:
    run = RunDirectory(train(tiny_run(), TinyConfig(), console=console).run)
    weights = run.weights.read_bytes()
    assert run.weights_step() == 60
    run.weights.unlink() if damage == "missing" else run.weights.write_bytes(weights[:50])
    assert run.weights_step() is None
    assert resume(run.path, console=console).step == 60
    assert run.weights.read_bytes() == weights


def edit_config(run: Path, section: str, **changes: Any) -> None:
    path = run / "config.json"
    contents = json.loads(path.read_text())
    if section:
        contents[section] |= changes
    else:
        contents |= changes
    path.write_text(json.dumps(contents))


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("train", {"seed": 5}, r"config.json differs .*: seed 5 \(checkpoint: 0\)\. A run goes on"),
        ("train", {"num_envs": 2, "env": "Hopper-v5"}, r"env 'Hopper-v5' .*, num_envs 2 \(check"),
        ("train", {"treads": 2}, r"treads 2 \(checkpoint: None\)"),
        ("agent_config", {"lr": 0.5}, r"lr 0.5 \(checkpoint: 0.01\).* all but total_steps, device, "),
        ("", {"agent": "dipo"}, r"agent 'dipo' \(checkpoint: 'tiny'\)"),
        ("train", {"total_steps": 0}, "config.json: total_steps must be at least 1, got 0"),
        ("train", {"tensorboard": "no"}, "config.json: tensorboard must be true or false, got 'no'"),
        ("", {"train": None}, "config.json: train must be settings by name, got None"),
    ],
)
def test_an_edited_setting_is_not_ignored(
    tiny_run: MakeConfig,
    console: Console,
    signal_at: SignalAt,
    section: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    signal_at(20)
    run = train(tiny_run(), TinyConfig(), console=console).run
    edit_config(run, section, **changes)
    edited = (run / "config.json").read_bytes()
    with pytest.raises(RunError, match=message):
        resume(run, console=console)
    assert (run / "config.json").read_bytes() == edited


NEW_SETTINGS = {
    "total_steps": 50,
    "threads": 1,
    "eval_interval": 8,
    "log_interval": 4,
    "checkpoint_minutes": 3.0,
    "tensorboard": True,
}


@pytest.mark.parametrize("how", ["arguments", "edit"])
def test_some_settings_can_change_on_the_way(
    tiny_run: MakeConfig, console: Console, signal_at: SignalAt, how: str
) -> None:
    signal_at(21)
    run = train(tiny_run(), TinyConfig(), console=console).run
    if how == "edit":
        edit_config(run, "train", **NEW_SETTINGS)
    changes: dict[str, Any] = NEW_SETTINGS if how == "arguments" else {}
    assert resume(run, console=console, **changes).step == 50
    assert read_series(run / "evaluations.csv", "mean_return")[0] == [20, 24, 32, 40, 48, 50]
    steps = read_series(run / "progress.csv", "updates")[0]
    assert steps == [7, 14, 21, *range(24, 50, 4), 50]
    assert list((run / "tensorboard").iterdir())
    train_config = json.loads((run / "config.json").read_text())["train"]
    for name, value in NEW_SETTINGS.items():
        assert train_config[name] == value
    assert load_checkpoint(run / "checkpoint.pt")["train_config"] == train_config


def test_a_change_outlives_a_crash_before_the_next_checkpoint(
    tiny_run: MakeConfig, console: Console, signal_at: SignalAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_at(21)
    run = train(tiny_run(), TinyConfig(), console=console).run

    def crash(trainer: Trainer) -> list[float]:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", crash)
        with pytest.raises(MemoryError):
            resume(run, total_steps=40, console=console)
    assert resume(run, console=console).step == 40


@pytest.mark.parametrize(("interval", "steps"), [(30, [20, 40, 60]), (7, [20, 40, 42, 49, 56, 60])])
def test_an_evaluation_that_is_due_stays_due(
    tiny_run: MakeConfig, console: Console, signal_at: SignalAt, interval: int, steps: list[int]
) -> None:
    signal_at(40)
    run = train(tiny_run(), TinyConfig(), console=console).run
    assert read_series(run / "evaluations.csv", "mean_return")[0] == [20]
    resume(run, eval_interval=interval, console=console)
    assert read_series(run / "evaluations.csv", "mean_return")[0] == steps


class Opaque:
    """Something that a checkpoint can't hold."""


class OpaqueEnv(CountingEnv):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(length=7)
        self.engine = Opaque()


def test_an_environment_that_cannot_be_saved_restarts_with_a_warning(
    tiny_run: MakeConfig,
    console: Console,
    output: io.StringIO,
    signal_at: SignalAt,
    register_env: Any,
) -> None:
    env_id = register_env(OpaqueEnv, max_episode_steps=100)
    signal_at(17)
    result = train(tiny_run(env=env_id), TinyConfig(), console=console)
    assert "checkpoints can't hold the environment" in output.getvalue()
    assert "OpaqueEnv.engine" in output.getvalue()
    assert "starts a new episode" not in output.getvalue()
    saved = load_checkpoint(result.run / "checkpoint.pt")["environments"][0]
    assert "OpaqueEnv.engine" in saved["not_restorable"]

    resume(result.run, console=console)
    assert "environment 0 couldn't be put back in mid-episode" in output.getvalue()
    rows = replay_of(result.run)
    torch.testing.assert_close(rows["state"][17, 1], torch.tensor(0.0))  # a first observation
    assert ((rows["next_state"] - rows["state"])[:, 1] == 1).all()
    lengths = read_series(result.run / "progress.csv", "episode_length")[1]
    assert set(lengths) == {7.0}


def test_no_two_episodes_begin_with_the_same_seed(
    tiny_run: MakeConfig, console: Console, signal_at: SignalAt, register_env: Any
) -> None:
    seeds = []

    class Watched(OpaqueEnv):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            seeds.append(seed)
            return super().reset(seed=seed, options=options)

    env_id = register_env(Watched, max_episode_steps=100)
    signal_at(18)
    run = train(tiny_run(env=env_id, num_envs=2), TinyConfig(), console=console).run
    signal_at(38)
    resume(run, console=console)
    resume(run, console=console)
    given = [seed for seed in seeds if seed is not None]
    starts, evaluations = 3, 3  # each of two environments
    assert len(given) == 2 * starts + 2 * evaluations
    assert len({*given}) == len(given)


def test_running_in_one_directory_twice_is_refused(
    tiny_run: MakeConfig, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = 0
    advance = Trainer.advance

    def advance_and_resume(trainer: Trainer) -> list[float]:
        nonlocal refused
        if trainer.step == 30:  # its checkpoint is written
            path = trainer.config.run_dir
            assert path is not None
            before = (path / "config.json").read_bytes()
            with pytest.raises(RunError, match="another process is training in"):
                resume(path, total_steps=777, console=console)
            assert (path / "config.json").read_bytes() == before
            refused += 1
        return advance(trainer)

    monkeypatch.setattr(Trainer, "advance", advance_and_resume)
    run = train(tiny_run(total_steps=40, checkpoint_minutes=0.0), TinyConfig(), console=console).run
    assert refused == 1
    assert resume(run, total_steps=60, console=console).step == 60


# Full disks


def test_training_survives_a_checkpoint_that_cannot_be_written(
    tiny_run: MakeConfig,
    console: Console,
    output: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffcore.training import checkpoint as module

    write, tries = module.write_atomically, 0

    def full_for_a_while(path: Path, fill: Any) -> None:
        nonlocal tries
        tries += 1
        if 2 <= tries <= 3:
            raise module.WriteError(f"can't write {path}: {os.strerror(errno.ENOSPC)}")
        write(path, fill)

    monkeypatch.setattr(module, "write_atomically", full_for_a_while)
    result = train(tiny_run(checkpoint_minutes=0.0), TinyConfig(), console=console)
    assert output.getvalue().count("CHECKPOINT NOT WRITTEN") == 2
    assert "checkpoint.pt: No space left on device" in output.getvalue()
    assert load_checkpoint(result.run / "checkpoint.pt")["step"] == 60


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_last_checkpoint_that_cannot_be_written_is_an_error_but_the_weights_are_there(
    tiny_run: MakeConfig,
    console: Console,
    signal_at: SignalAt,
    monkeypatch: pytest.MonkeyPatch,
    interrupted: bool,
) -> None:
    from diffcore.training import checkpoint as module

    def full(path: Path, fill: Any) -> None:
        raise module.WriteError(f"can't write {path}: {os.strerror(errno.ENOSPC)}")

    if interrupted:
        signal_at(33)
    whole = train(tiny_run("whole"), TinyConfig(), console=console).run
    monkeypatch.setattr(module, "write_atomically", full)
    step = 33 if interrupted else 60
    message = rf"checkpoint\.pt: No space left on device; the policy of step {step} is in .*weights\."
    with pytest.raises(CheckpointError, match=message):
        train(tiny_run(), TinyConfig(), console=console)
    weights = tiny_run().run_dir / "weights.safetensors"  # type: ignore[operator]
    assert_equal_trees(safetensors.torch.load_file(weights), load_agent(whole).agent.weights())


def test_the_error_is_the_checkpoints_if_the_weights_find_no_place_either(
    tiny_run: MakeConfig, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffcore.training import checkpoint, loop

    def full(path: Path, fill: Any) -> None:
        raise checkpoint.WriteError(f"can't write {path}: {os.strerror(errno.ENOSPC)}")

    for module in (checkpoint, loop):
        monkeypatch.setattr(module, "write_atomically", full)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: No space left on device$"):
        train(tiny_run(), TinyConfig(), console=console)


# TensorBoard's writing thread dies of the full disk.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_training_on_a_disk_that_fills_up(
    tiny_disk: Path, tiny_run: MakeConfig, console: Console, output: io.StringIO
) -> None:
    """Logs and checkpoints fail one after the other; only the last checkpoint is worth an error."""
    config = tiny_run(
        run_dir=tiny_disk / "run", checkpoint_minutes=0.0, tensorboard=True, total_steps=2000
    )
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: .*No space left on device"):
        train(config, TinyConfig(buffer_size=5000), console=console)
    assert "CHECKPOINT NOT WRITTEN" in output.getvalue()
    step = load_checkpoint(tiny_disk / "run" / "checkpoint.pt")["step"]
    assert 0 < step < 2000
    assert not list((tiny_disk / "run").glob("*.tmp"))


# Errors


def test_bad_settings_are_named(tiny_run: MakeConfig) -> None:
    for field, value, message in (
        ("env", "", "env must be"),
        ("env", CountingEnv, r"env must be the id .*CountingEnv.*gymnasium\.register\("),
        ("env_kwargs", [1], r"env_kwargs must be a dict with names for keys, got \[1\]"),
        ("env_kwargs", {1: 2}, "env_kwargs must be a dict with names for keys"),
        ("env_kwargs", {"a": [{1: 2}]}, "env_kwargs must be a dict with names for keys"),
        ("tensorboard", "false", "tensorboard must be true or false, got 'false'"),
        ("env_kwargs", {"a": np.zeros(2)}, "env_kwargs must hold what JSON can hold"),
        ("seed", -1, "seed must be at least 0, got -1"),
        ("total_steps", 0, "total_steps must be at least 1, got 0"),
        ("num_envs", 1.5, "num_envs must be an integer, got float 1.5"),
        ("updates_per_step", float("nan"), "updates_per_step must be finite"),
        ("updates_per_step", "1", "updates_per_step must be a number, got str '1'"),
        ("checkpoint_minutes", -1.0, "checkpoint_minutes must be finite and at least 0"),
        ("threads", 0, "threads must be at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny_run(**{field: value})


def test_a_bad_start_leaves_no_directory(tiny_run: MakeConfig, console: Console) -> None:
    for changes, error, message in (
        ({"env": "CartPole-v1"}, EnvError, "Discrete"),
        ({"env": "Nonsense-v0"}, EnvError, "can't make"),
        ({"device": "nonsense"}, ConfigError, "device must be one that torch has"),
        ({"num_envs": 2000}, ConfigError, "buffer_size must hold at least one step of the 2000"),
    ):
        config = tiny_run(**changes)
        with pytest.raises(error, match=message):
            train(config, TinyConfig(), console=console)
        assert config.run_dir is not None
        assert not config.run_dir.exists()
    with pytest.raises(ConfigError, match="agent_config must be the configuration of one of"):
        train(tiny_run(), object(), console=console)  # type: ignore[arg-type]


def test_resuming_what_is_no_run(
    tmp_path: Path, tiny_run: MakeConfig, console: Console, register_env: Any
) -> None:
    with pytest.raises(RunError, match="there is no run directory"):
        resume(tmp_path / "gone", console=console)
    with pytest.raises(RunError, match=r"isn't a run directory: it has no config\.json"):
        resume(tmp_path, console=console)
    run = RunDirectory.create(tiny_run(), TinyConfig())
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        resume(run.path, console=console)


def changed_checkpoint(run: Path, **changes: Any) -> None:
    contents = torch.load(run / "checkpoint.pt", weights_only=True)
    for name, value in changes.items():
        if value is None:
            del contents[name]
        else:
            contents[name] = value
    torch.save(contents, run / "checkpoint.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agent": "unheard-of"}, "unknown agent 'unheard-of'"),
        ({"agent": None}, "lacks the entry 'agent'"),
        ({"replay": None}, "lacks the entry 'replay'"),
        ({"agent_config": {"nonsense": 1}}, r"TinyConfig has no fields \['nonsense'\]"),
        ({"agent_state": {}}, "no state that this agent can take"),
        ({"observation_dim": 5}, r"sizes \(5, 1\); Pendulum-v1 now has \(3, 1\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    tiny_run: MakeConfig,
    console: Console,
    signal_at: SignalAt,
    changes: dict[str, Any],
    message: str,
) -> None:
    signal_at(20)
    run = train(tiny_run(), TinyConfig(), console=console).run
    changed_checkpoint(run, **changes)
    with pytest.raises(CheckpointError, match=message):
        resume(run, console=console)


def test_environments_are_closed_in_the_end(
    tiny_run: MakeConfig, console: Console, register_env: Any
) -> None:
    closed: list[gym.Env[Any, Any]] = []

    class Closing(CountingEnv):
        def close(self) -> None:
            closed.append(self)

    env_id = register_env(lambda **kwargs: Closing(), max_episode_steps=100)
    train(tiny_run(env=env_id, num_envs=2, eval_episodes=3), TinyConfig(), console=console)
    assert len(set(map(id, closed))) == 5
