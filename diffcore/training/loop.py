"""The training loop: act, store, update; log, evaluate and save in between.

An interrupted and resumed run equals an uninterrupted one bit for bit. That rests on two rules.
All that shapes the future lies in the checkpoint: networks, optimisers, replay, every random
state, the environments in mid-episode, and metrics gathered but not yet logged. And what happens
at times that differ between runs (checkpoints) or on the side (evaluations) draws no random number
that training would have drawn.
"""

from __future__ import annotations

import dataclasses
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import gymnasium as gym
import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from rich.console import Console

from diffcore.agents.baselines import BaselineConfig, stable_baselines3
from diffcore.agents.optimization import learning
from diffcore.training.checkpoint import copy_tensors, load_checkpoint, save_checkpoint
from diffcore.training.config import TrainConfig, from_dict, to_dict
from diffcore.training.environment_state import (
    NotRestorableError,
    restore_environment,
    save_environment,
)
from diffcore.training.environments import (
    BoxEnvironment,
    EnvironmentBatch,
    FloatArray,
    make_environment,
)
from diffcore.training.errors import CheckpointError, ConfigError, TrainingError, WriteError
from diffcore.training.evaluation import Evaluation, Evaluator
from diffcore.training.files import write_atomically
from diffcore.training.interruption import Interruption
from diffcore.training.logging import CSVLog, MetricAverages, Row, TensorBoardLog
from diffcore.training.progress import ProgressDisplay
from diffcore.training.registry import (
    Actor,
    Agent,
    AgentConfig,
    ReplayAgentConfig,
    agent_name,
    agent_type,
)
from diffcore.training.replay import ReplayBuffer
from diffcore.training.run_directory import RunDirectory
from diffcore.training.seeding import (
    Stream,
    derive_seed,
    process_random_state,
    restore_process_random_state,
    seed_process,
)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    run: Path
    """The run directory."""
    step: int
    """Environment steps done, over all processes that trained in this run."""
    interrupted: bool
    """Whether a signal ended it before the last step."""
    evaluation: Evaluation | None
    """The last evaluation of this process, if there was one."""
    steps_per_second: float
    """Mean speed of this process."""


def train(
    config: TrainConfig, agent_config: AgentConfig, *, console: Console | None = None
) -> TrainResult:
    """Train an agent from scratch in a new run directory.

    Torch's thread count, if ``config.threads`` sets it, is put back in the end. Its process-wide
    random state isn't: like Python's and NumPy's, it is seeded by the run.

    Args:
        config: the run.
        agent_config: the agent's hyper-parameters; their type says which agent.
        console: where to show progress; None is standard output.

    Raises:
        TrainingError: if a setting, the environment or the run directory doesn't do, or the last
            checkpoint can't be written.
    """
    with _open_trainer(config, agent_config) as trainer:
        trainer.start()
        run = RunDirectory.create(config, agent_config)
        with run.lock():
            return trainer.run(run, console or Console())


def resume(
    path: Path | str,
    *,
    total_steps: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    eval_interval: int | None = None,
    log_interval: int | None = None,
    checkpoint_minutes: float | None = None,
    tensorboard: bool | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Continue the run in ``path`` from its checkpoint.

    What isn't None replaces the setting of that name (see :class:`TrainConfig`), in config.json too.
    Editing these settings there does the same. All others are the checkpoint's: a config.json that
    says otherwise is refused.

    Args:
        path: the run directory.
        total_steps, device, threads, eval_interval, log_interval, checkpoint_minutes, tensorboard:
            new settings.
        console: where to show progress; None is standard output.

    Raises:
        TrainingError: if another process is training in it; if there is no whole checkpoint, or it
            doesn't fit, or config.json doesn't fit it; if the run is complete already, its weights
            included; and as :func:`train` does.
    """
    given = {
        "total_steps": total_steps,
        "device": device,
        "threads": threads,
        "eval_interval": eval_interval,
        "log_interval": log_interval,
        "checkpoint_minutes": checkpoint_minutes,
        "tensorboard": tensorboard,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    run = RunDirectory.open(path)
    with run.lock():  # before anything is read, which a process that trains in it may be writing
        return _resume_locked(run, changes, console or Console())


def _resume_locked(run: RunDirectory, changes: dict[str, Any], console: Console) -> TrainResult:
    """What :func:`resume` does in a run that is this process's."""
    checkpoint = load_checkpoint(run.checkpoint)
    config, agent_config = configs_of(checkpoint, run.checkpoint)
    config = dataclasses.replace(run.resumed_config(config, agent_config), **changes)
    with _open_trainer(config, agent_config) as trainer:
        trainer.load_state_dict(checkpoint)
        if trainer.complete and run.weights_step() == trainer.step:
            raise ConfigError(
                f"{run.path} has done {trainer.step:,} of {config.total_steps:,} steps; "
                "to train it longer set total_steps (--total-steps) above that"
            )
        rows = checkpoint["rows"]
        del checkpoint  # gives back the old file's place on the disk once it is replaced
        if changes:
            run.write_config(config, agent_config)
        return trainer.run(run, console, rows=rows)


@contextmanager
def _open_trainer(config: TrainConfig, agent_config: AgentConfig) -> Iterator[BaseTrainer]:
    """A trainer, on the threads asked for until the block ends; its environments are closed then.

    Gradients are on in the block, whatever mode of torch's the caller is in.
    """
    threads = torch.get_num_threads()
    try:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        with learning():
            trainer = make_trainer(config, agent_config)
            try:
                yield trainer
            finally:
                trainer.close()
    finally:
        if config.threads is not None:
            torch.set_num_threads(threads)


def configs_of(checkpoint: dict[str, Any], path: Path) -> tuple[TrainConfig, AgentConfig]:
    """The configs a checkpoint was written with.

    Args:
        checkpoint: what :func:`diffcore.training.checkpoint.load_checkpoint` returned.
        path: where it was read from, for messages.

    Raises:
        CheckpointError: if they don't fit this version of diffcore.
    """
    try:
        agent = agent_type(checkpoint["agent"])
        agent_config: AgentConfig = from_dict(agent.config_type, checkpoint["agent_config"])
        return from_dict(TrainConfig, checkpoint["train_config"]), agent_config
    except KeyError as error:
        raise CheckpointError(f"{path} lacks the entry {error}") from error
    except ConfigError as error:
        raise CheckpointError(f"{path} doesn't fit this diffcore: {error}") from error


@dataclass(frozen=True)
class LoadedAgent:
    """An agent out of a checkpoint."""

    agent: Actor
    step: int
    """The environment step it was saved at."""
    config: TrainConfig
    agent_config: AgentConfig


def load_agent(path: Path | str, device: str = "cpu") -> LoadedAgent:
    """The agent of a run as its checkpoint has it, to act with.

    Args:
        path: the run directory.
        device: where to put it.

    Raises:
        TrainingError: if there is no whole checkpoint, or it doesn't fit.
    """
    run = RunDirectory.open(path)
    checkpoint = load_checkpoint(run.checkpoint)
    config, agent_config = configs_of(checkpoint, run.checkpoint)
    agent = _make_agent(
        agent_config,
        checkpoint["observation_dim"],
        checkpoint["action_dim"],
        config.seed,
        check_device(device),
    )
    _load_agent_state(agent, checkpoint, run.checkpoint)
    return LoadedAgent(agent, checkpoint["step"], config, agent_config)


def check_device(name: str) -> torch.device:
    """The torch device called ``name``.

    Raises:
        ConfigError: if there is no such device here.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device must be one that torch has here, got {name!r}: {reason}") from (
            error
        )
    return device


def check_buffer_size(buffer_size: int, num_envs: int) -> None:
    """Refuse a replay that can't hold one step of all environments.

    Raises:
        ConfigError: if it can't.
    """
    if num_envs > buffer_size:
        raise ConfigError(
            f"buffer_size must hold at least one step of the {num_envs} environments, "
            f"got {buffer_size}"
        )


def make_trainer(config: TrainConfig, agent_config: AgentConfig) -> BaseTrainer:
    """The trainer for an agent, by the type of its configuration.

    Raises:
        TrainingError: as :class:`BaseTrainer` does.
    """
    agent_name(agent_config)  # raises if it configures no agent
    if isinstance(agent_config, BaselineConfig):
        with _missing_package_named():
            stable_baselines3()
            from diffcore.training.baselines import BaselineTrainer  # which builds on this module
        return BaselineTrainer(config, agent_config)
    return Trainer(config, cast(ReplayAgentConfig, agent_config))


class Stateful(Protocol):
    """What can be put into a checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class BaseTrainer(ABC):
    """One run in memory: everything a checkpoint holds.

    Made with its parts at their beginnings; then either :meth:`start` or :meth:`load_state_dict`,
    then :meth:`run`. A subclass makes ``agent`` and ``replay``, and says what one step is.

    Raises:
        TrainingError: if the environment or the device doesn't do.
    """

    agent: Actor
    replay: Stateful
    """What the agent learns from."""

    def __init__(self, config: TrainConfig, agent_config: AgentConfig) -> None:
        self.config = config
        self.agent_config = agent_config
        self.agent_name = agent_name(agent_config)
        self.device = check_device(config.device)
        seed_process(config.seed)
        self.environments = EnvironmentBatch(
            [self._make_environment() for _ in range(config.num_envs)]
        )
        self.evaluator: Evaluator | None = None

        self.step = 0
        """Environment steps done, over all environments."""
        self.updates = 0
        """Agent updates done."""
        self.next_log = config.log_interval
        self.next_evaluation = min(config.eval_interval, config.total_steps)
        self.seconds = 0.0
        """Wall-clock time spent on the run by the processes before this one."""
        self.metrics = MetricAverages()
        self.episodes = _Episodes(config.num_envs)
        self.warnings: list[str] = []
        """To be shown once there is a display."""

    @property
    def complete(self) -> bool:
        """Whether all steps are done and the last of them is evaluated."""
        return self.step >= self.config.total_steps and self.step < self.next_evaluation

    def start(self) -> None:
        """Begin from scratch: start the first episodes."""
        self.environments.reset(
            [
                derive_seed(self.config.seed, Stream.TRAINING_ENVIRONMENT, i)
                for i in range(self.config.num_envs)
            ]
        )
        if not self.environments.has_time_limit:
            self.warnings.append(
                f"{self.config.env} has no time limit: an evaluation lasts until its episodes end "
                "by themselves; max_episode_steps sets a limit"
            )

    def warn_of_random_start(self, name: str, steps: int) -> None:
        """Warn if the setting ``name`` makes all steps of the run random ones."""
        if steps >= self.config.total_steps:
            self.warnings.append(
                f"nothing will be learned: the random start ({name}) lasts for {steps:,} steps, "
                f"the whole run for {self.config.total_steps:,}"
            )

    def close(self) -> None:
        """Close the environments."""
        self.environments.close()
        if self.evaluator is not None:
            self.evaluator.close()

    def run(
        self, directory: RunDirectory, console: Console, *, rows: dict[str, int] | None = None
    ) -> TrainResult:
        """Train from the present step to the last, or until a signal.

        Args:
            directory: where the run writes; locked by the caller.
            console: where it shows progress.
            rows: lengths of the CSV files at the present step, as :meth:`state_dict` had them;
                later rows are cut off.
        """
        with (
            ProgressDisplay(console, self.step, self.config.total_steps) as display,
            Interruption() as interruption,
        ):
            session = _Session(self, directory, display, interruption)
            session.truncate_logs(rows or {})
            display.message(f"run: {directory.path}")
            for warning in self.warnings:
                display.warn(warning)
            try:
                return session.run()
            finally:
                session.close()

    @abstractmethod
    def advance(self) -> list[float]:
        """One step of every environment and the updates it is worth, or several such steps.

        Returns:
            The returns of the episodes that ended.
        """

    def evaluate(self, interruption: Interruption) -> Evaluation | None:
        """Evaluate the agent at the present step; None if interrupted."""
        if self.evaluator is None:
            self.evaluator = Evaluator(
                self.config.env,
                episodes=self.config.eval_episodes,
                env_kwargs=self.config.env_kwargs,
                max_episode_steps=self.config.max_episode_steps,
                deterministic=self.config.eval_deterministic,
                seed=self.config.seed,
                device=self.device,
            )
        return self.evaluator.evaluate(
            self.agent, number=self.step, stop=lambda: interruption.requested
        )

    def state_dict(self) -> dict[str, Any]:
        """All that shapes the run's future. Tensors may be live ones: save before the next step.

        A session adds ``rows``, the lengths of its CSV files, and ``seconds``, the time spent.
        """
        return {
            "agent": self.agent_name,
            "train_config": to_dict(self.config),
            "agent_config": to_dict(self.agent_config),
            "observation_dim": self.environments.observation_dim,
            "action_dim": self.environments.action_dim,
            "step": self.step,
            "updates": self.updates,
            "next_log": self.next_log,
            "next_evaluation": self.next_evaluation,
            "metrics": self.metrics.state_dict(),
            "episodes": self.episodes.state_dict(),
            "agent_state": self.agent.state_dict(),
            "replay": self.replay.state_dict(),
            "observation": torch.from_numpy(self.environments.observation),
            "environments": [_save_environment(env) for env in self.environments.environments],
            "process_random_state": process_random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`.

        An environment whose state couldn't be saved, or can't be put back, starts a new episode
        instead; :attr:`warnings` says so.

        Raises:
            CheckpointError: if the state doesn't fit.
        """
        sizes = (self.environments.observation_dim, self.environments.action_dim)
        try:
            saved_sizes = (state["observation_dim"], state["action_dim"])
            if saved_sizes != sizes:
                raise CheckpointError(
                    f"the run was trained with observations and actions of sizes {saved_sizes}; "
                    f"{self.config.env} now has {sizes}"
                )
            self.step = state["step"]
            self.updates = state["updates"]
            self.next_log = state["next_log"]
            self.seconds = state["seconds"]
            self.next_evaluation = state["next_evaluation"]
            # The settings of these may have changed since. An evaluation that is due stays due.
            if self.config.log_interval != state["train_config"]["log_interval"]:
                self.next_log = _next_multiple(self.step, self.config.log_interval)
            eval_interval = self.config.eval_interval
            changed = eval_interval != state["train_config"]["eval_interval"]
            if changed and self.step < self.next_evaluation:
                self.next_evaluation = _next_multiple(self.step, eval_interval)
            if self.step < self.config.total_steps:
                self.next_evaluation = min(self.next_evaluation, self.config.total_steps)
            self.metrics.load_state_dict(state["metrics"])
            self.episodes.load_state_dict(state["episodes"])
            self.replay.load_state_dict(state["replay"])
            _load_agent_state(self.agent, state, "the checkpoint")
            self.environments.observation = state["observation"].numpy().copy()
            for i, saved in enumerate(state["environments"]):
                self._restore_environment(i, saved)
            restore_process_random_state(state["process_random_state"])
        except KeyError as error:
            raise CheckpointError(f"the checkpoint lacks the entry {error}") from error

    def _make_environment(self) -> BoxEnvironment:
        return make_environment(
            self.config.env,
            env_kwargs=self.config.env_kwargs,
            max_episode_steps=self.config.max_episode_steps,
        )

    def _restore_environment(self, i: int, saved: dict[str, Any]) -> None:
        seed = derive_seed(self.config.seed, Stream.RESUMED_ENVIRONMENT, self.step, i)
        environment = self.environments.environments[i]
        reason = saved["not_restorable"]
        if reason is None:
            try:
                environment.reset(seed=seed)
                restore_environment(environment, saved["state"])
                return
            except NotRestorableError as error:
                reason = str(error)
        environment.close()  # it may be in half of the saved state
        environment = self._make_environment()
        self.environments.environments[i] = environment
        self.environments.observation[i] = environment.reset(seed=seed)[0]
        self.episodes.drop(i)
        self.warnings.append(
            f"environment {i} couldn't be put back in mid-episode and starts a new episode, so "
            f"this run will differ from an uninterrupted one: {reason}"
        )


class Trainer(BaseTrainer):
    """Acts, stores and updates by turns: the loop of this project's own agents.

    Raises:
        TrainingError: if the environment, the device or a setting doesn't do.
    """

    agent: Agent
    agent_config: ReplayAgentConfig

    def __init__(self, config: TrainConfig, agent_config: ReplayAgentConfig) -> None:
        check_buffer_size(agent_config.buffer_size, config.num_envs)
        super().__init__(config, agent_config)
        agent = _make_agent(
            agent_config,
            self.environments.observation_dim,
            self.environments.action_dim,
            derive_seed(config.seed, Stream.AGENT),
            self.device,
        )
        self.agent = cast(Agent, agent)
        self.replay: ReplayBuffer = ReplayBuffer(
            agent_config.buffer_size,
            self.environments.observation_dim,
            self.environments.action_dim,
            bootstrap_truncated=self.agent.bootstrap_truncated,
            device=self.device,
        )
        self.random_actions = np.random.default_rng(derive_seed(config.seed, Stream.RANDOM_ACTIONS))

    def start(self) -> None:
        """Begin from scratch: start the first episodes."""
        super().start()
        self.warn_of_random_start("start_steps", self.agent_config.start_steps)

    def act(self) -> FloatArray:
        """Actions ``[N, A]`` for the present observations: random ones at first."""
        shape = (self.config.num_envs, self.environments.action_dim)
        if self.step < self.agent_config.start_steps:
            return self.random_actions.uniform(-1.0, 1.0, shape).astype(np.float32)
        observation = torch.from_numpy(self.environments.observation).to(self.device)
        actions: FloatArray = self.agent.act(observation, explore=True).cpu().numpy()
        if not np.isfinite(actions).all():
            raise TrainingError(
                f"training has diverged: at step {self.step:,} the agent's actions are not finite"
            )
        return actions

    def advance(self) -> list[float]:
        """One step of every environment and the updates it is worth.

        Returns:
            The returns of the episodes that ended.
        """
        observation = self.environments.observation
        actions = self.act()
        steps = self.environments.step(actions)
        self.replay.add(
            *(
                torch.from_numpy(array).to(self.device)
                for array in (
                    observation,
                    actions,
                    steps.reward.astype(np.float32),
                    steps.next_observation,
                    steps.terminated,
                    steps.truncated,
                )
            )
        )
        self.step += self.config.num_envs
        while self.updates < self._updates_due():
            self.metrics.add(self.agent.update(self.replay))
            self.updates += 1
        return self.episodes.add(steps.reward, steps.terminated | steps.truncated)

    def _updates_due(self) -> int:
        learning_steps = max(0, self.step - self.agent_config.start_steps)
        return int(self.config.updates_per_step * learning_steps)

    def state_dict(self) -> dict[str, Any]:
        """As :class:`BaseTrainer` has it, with the stream of random actions."""
        return {
            **super().state_dict(),
            "random_actions": self.random_actions.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, as :class:`BaseTrainer` does."""
        super().load_state_dict(state)
        try:
            self.random_actions.bit_generator.state = state["random_actions"]
        except KeyError as error:
            raise CheckpointError(f"the checkpoint lacks the entry {error}") from error


class _Session:
    """One process's part of a run: a trainer with logs, display, clock and signals around it."""

    def __init__(
        self,
        trainer: BaseTrainer,
        directory: RunDirectory,
        display: ProgressDisplay,
        interruption: Interruption,
    ) -> None:
        self.trainer = trainer
        self.directory = directory
        self.display = display
        self.interruption = interruption
        self.logs = {
            "progress": CSVLog(directory.progress, display.warn),
            "evaluations": CSVLog(directory.evaluations, display.warn),
            "timing": CSVLog(directory.timing, display.warn),
        }
        self.tensorboard: TensorBoardLog | None = None
        if trainer.config.tensorboard:
            self.tensorboard = TensorBoardLog(
                directory.tensorboard, trainer.step + 1 if trainer.step else 0, display.warn
            )
        self.evaluation: Evaluation | None = None
        self.told_not_restorable = False
        # At the last row of timing.csv that this process wrote, else at its start.
        self.timed_steps, self.timed_seconds = trainer.step, display.seconds()

    def truncate_logs(self, rows: dict[str, int]) -> None:
        """Cut the CSV files back to where the checkpoint was written."""
        for name, log in self.logs.items():
            log.truncate(rows.get(name, 0))

    def run(self) -> TrainResult:
        trainer, config = self.trainer, self.trainer.config
        checkpoint_seconds = 60 * config.checkpoint_minutes
        last_checkpoint = time.monotonic()
        # Logging and evaluation come before the step, not after: when a signal ends one of them,
        # the resumed run begins with it again.
        while True:
            if trainer.step >= trainer.next_evaluation:
                self.evaluate()
            if self.interruption.requested or trainer.step >= config.total_steps:
                break
            if time.monotonic() - last_checkpoint >= checkpoint_seconds:
                self.save_or_warn()
                last_checkpoint = time.monotonic()
            for episode_return in trainer.advance():
                self.display.episode(episode_return)
            self.display.step(trainer.step)
            if trainer.step >= min(trainer.next_log, config.total_steps):
                self.log()
        self.end()
        return TrainResult(
            run=self.directory.path,
            step=trainer.step,
            interrupted=not trainer.complete,
            evaluation=self.evaluation,
            steps_per_second=self.display.steps_per_second(trainer.step),
        )

    def log(self) -> None:
        """One row of progress.csv, and one of timing.csv."""
        trainer = self.trainer
        row: Row = {"step": trainer.step, "updates": trainer.updates}
        row |= trainer.episodes.pop() | trainer.metrics.pop()
        steps, seconds = trainer.step, self.display.seconds()
        timing: Row = {
            "step": steps,
            "seconds": trainer.seconds + seconds,
            "steps_per_second": (steps - self.timed_steps) / max(seconds - self.timed_seconds, 1e-9),
        }
        self.timed_steps, self.timed_seconds = steps, seconds
        self.write("progress", row)
        self.write("timing", timing)
        self.display.line(trainer.step)
        trainer.next_log = _next_multiple(trainer.step, trainer.config.log_interval)

    def evaluate(self) -> None:
        """One row of evaluations.csv; nothing if interrupted."""
        trainer, config = self.trainer, self.trainer.config
        evaluation = trainer.evaluate(self.interruption)
        if evaluation is None:
            return
        self.evaluation = evaluation
        row: Row = {
            "step": trainer.step,
            "mean_return": evaluation.mean_return,
            "std_return": evaluation.std_return,
            "min_return": min(evaluation.returns),
            "max_return": max(evaluation.returns),
            "mean_length": sum(evaluation.lengths) / len(evaluation.lengths),
            "episodes": len(evaluation.returns),
        }
        self.write("evaluations", row)
        self.display.evaluated(trainer.step, evaluation.mean_return, evaluation.std_return)
        following = _next_multiple(trainer.step, config.eval_interval)
        if trainer.step < config.total_steps:
            following = min(following, config.total_steps)
        trainer.next_evaluation = following

    def write(self, name: str, row: Row) -> None:
        self.logs[name].write(row)
        if self.tensorboard is not None:
            self.tensorboard.write(name, row)

    def end(self) -> None:
        """Write the last checkpoint, then the weights if the run is complete.

        Weights are small and may find place where the checkpoint doesn't: then too they are written.

        Raises:
            CheckpointError, WriteError: if one of the two can't be written.
        """
        try:
            self.save()
        except CheckpointError as error:
            try:
                self.export_weights()
            except WriteError:
                raise error from None
            raise CheckpointError(
                f"{error}; the policy of step {self.trainer.step:,} is in {self.directory.weights}"
            ) from error
        if self.trainer.complete:
            self.export_weights()

    def save(self) -> None:
        """Write the checkpoint.

        Raises:
            CheckpointError: if it can't be written; the previous one is untouched.
        """
        state = self.trainer.state_dict()
        reasons = [env["not_restorable"] for env in state["environments"]]
        if any(reasons) and not self.told_not_restorable:
            self.told_not_restorable = True
            self.display.warn(
                "checkpoints can't hold the environment in mid-episode; resuming will start a new "
                f"episode: {next(filter(None, reasons))}"
            )
        for log in self.logs.values():
            log.sync()  # the checkpoint counts on their rows
        save_checkpoint(
            self.directory.checkpoint,
            {
                **state,
                "rows": {name: len(log) for name, log in self.logs.items()},
                "seconds": self.trainer.seconds + self.display.seconds(),
            },
        )

    def save_or_warn(self) -> None:
        """Write the checkpoint; if that fails say so and train on, to try again later."""
        try:
            self.save()
        except CheckpointError as error:
            self.display.warn(
                f"CHECKPOINT NOT WRITTEN: {error}. Training goes on; the previous checkpoint, if "
                "there is one, is intact; the next try comes with the next interval"
            )

    def export_weights(self) -> None:
        """Write the policy's weights for inference.

        Raises:
            WriteError: if they can't be written.
        """
        trainer = self.trainer
        description = {
            "agent": trainer.agent_name,
            "agent_config": to_dict(trainer.agent_config),
            "env": trainer.config.env,
            "env_kwargs": trainer.config.env_kwargs,
            "observation_dim": trainer.environments.observation_dim,
            "action_dim": trainer.environments.action_dim,
            "step": trainer.step,
        }
        # In one entry: safetensors writes several in an order that changes from run to run.
        metadata = {"diffcore": json.dumps(description)}
        data = safetensors.torch.save(trainer.agent.weights(), metadata)
        write_atomically(self.directory.weights, lambda file: file.write(data))

    def close(self) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()


class _Episodes:
    """Returns and lengths of the training episodes, finished and running."""

    def __init__(self, count: int) -> None:
        self._returns = [0.0] * count
        self._lengths = [0] * count
        self._finished: list[tuple[float, int]] = []
        self._total = 0

    def add(self, rewards: Any, done: Any) -> list[float]:
        """Count one step of every environment; returns of the episodes that end with it."""
        ended = []
        for i, (reward, is_done) in enumerate(zip(rewards.tolist(), done.tolist(), strict=True)):
            self._returns[i] += reward
            self._lengths[i] += 1
            if is_done:
                ended.append(self._returns[i])
                self._finished.append((self._returns[i], self._lengths[i]))
                self.drop(i)
        self._total += len(ended)
        return ended

    def at_start(self) -> NDArray[np.bool_]:
        """``[N]``: which environments haven't made a step of their present episode."""
        return np.array(self._lengths) == 0

    def drop(self, i: int) -> None:
        """Start environment ``i``'s count anew."""
        self._returns[i], self._lengths[i] = 0.0, 0

    def pop(self) -> Row:
        """Episodes so far, and means over those that ended since the last call, if any did."""
        row: Row = {"episodes": self._total}
        if self._finished:
            returns, lengths = zip(*self._finished, strict=True)
            row["episode_return"] = sum(returns) / len(returns)
            row["episode_length"] = sum(lengths) / len(lengths)
        self._finished = []
        return row

    def state_dict(self) -> dict[str, Any]:
        return {
            "returns": self._returns,
            "lengths": self._lengths,
            "finished": self._finished,
            "total": self._total,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._returns = list(state["returns"])
        self._lengths = list(state["lengths"])
        self._finished = [(float(r), int(n)) for r, n in state["finished"]]
        self._total = state["total"]


def _next_multiple(step: int, interval: int) -> int:
    """The first multiple of ``interval`` after ``step``."""
    return (step // interval + 1) * interval


def _make_agent(
    config: AgentConfig, observation_dim: int, action_dim: int, seed: int, device: torch.device
) -> Actor:
    agent = agent_type(agent_name(config))
    with _missing_package_named():
        return agent(observation_dim, action_dim, config, seed=seed, device=device)


@contextmanager
def _missing_package_named() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigError(str(error)) from error


def _load_agent_state(agent: Actor, checkpoint: dict[str, Any], where: object) -> None:
    try:
        agent.load_state_dict(copy_tensors(checkpoint["agent_state"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{where} holds no state that this agent can take: {error}") from (
            error
        )


def _save_environment(environment: gym.Env[Any, Any]) -> dict[str, Any]:
    try:
        return {"state": save_environment(environment), "not_restorable": None}
    except NotRestorableError as error:
        return {"state": None, "not_restorable": str(error)}
