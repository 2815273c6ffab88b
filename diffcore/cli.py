"""The command line: ``diffcore train``, ``evaluate``, ``plot`` and ``compare``."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from diffcore._config import __version__
from diffcore.training import (
    AGENTS,
    ConfigError,
    TrainConfig,
    TrainingError,
    TrainResult,
    resume,
    train,
)
from diffcore.training.compare import Job, compare
from diffcore.training.config import RESUMABLE
from diffcore.training.evaluation import Evaluator, VideoFile
from diffcore.training.loop import load_agent
from diffcore.training.plotting import plot_runs
from diffcore.training.progress import say
from diffcore.training.registry import AgentConfig, agent_type
from diffcore.training.run_directory import RunDirectory, directory_name

INTERRUPTED = 130
"""Exit code after Ctrl-C, SIGTERM or SIGHUP, by the shells' convention for SIGINT."""

USAGE = f"""\
usage: diffcore COMMAND ...

  diffcore train AGENT --env ID [options]   train an agent from scratch
  diffcore train --resume RUN [options]     continue a run exactly where it was saved
  diffcore evaluate RUN [options]           returns of a trained agent, and a video
  diffcore plot RUN... [options]            learning curves
  diffcore compare --agents [NAME=]AGENT... --env ID [options]
                                            train several agents on several seeds; curves, table
  diffcore --version                        the version of diffcore

AGENT is one of: {", ".join(sorted(AGENTS))};
sb3-... are those of stable-baselines3, to compare with. ID is a Gymnasium environment such as
HalfCheetah-v5, diffcore's own, such as diffcore/Hopper-ET-v0 or diffcore/Hopper-masked-v0
(velocities hidden), or "module:Id" for one of yours. RUN is a directory that train made,
runs/ENV/... by default. Every command and every agent has its own help:
diffcore train dipo --env HalfCheetah-v5 --help shows all settings with their defaults for that
environment.
"""


@dataclass(frozen=True)
class ResumeArguments:
    """Continue a run exactly where its checkpoint was written.

    Options that aren't given stay as they were. No other setting of a run can be changed.
    """

    resume: Path
    """The run directory."""
    total_steps: int | None = None
    """Train up to this step."""
    device: str | None = None
    """Train on this torch device."""
    threads: int | None = None
    """Torch's CPU threads."""
    eval_interval: int | None = None
    """Environment steps between evaluations."""
    log_interval: int | None = None
    """Environment steps between rows of progress.csv."""
    checkpoint_minutes: float | None = None
    """Minutes between checkpoints."""
    tensorboard: bool | None = None
    """Write TensorBoard logs too."""


@dataclass(frozen=True)
class EvaluateArguments:
    """Mean and standard deviation of a trained agent's return."""

    run: tyro.conf.Positional[Path]
    """The run directory."""
    episodes: int = 10
    """Episodes to run."""
    deterministic: bool = False
    """Act deterministically, instead of in the agent's usual evaluation form."""
    seed: int = 0
    """Seed of start states, dynamics and actions."""
    video: Path | None = None
    """Write a video of the first episode to this .mp4 or .gif file."""
    device: str = "cpu"
    """Torch device."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {self.episodes}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.video is not None and self.video.suffix not in (".mp4", ".gif"):
            raise ValueError(f"video must be an .mp4 or .gif file, got {self.video}")


@dataclass(frozen=True)
class PlotArguments:
    """Learning curves; one curve with a band for runs that differ only in their seed.

    For runs on diffcore/MultiGoal-v0 also the policy's actions as arrows, and Q as a surface.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    output: Path | None = None
    """The picture. Default: learning_curve.png, in the run directory if there is only one."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs must name at least one run directory")


@dataclass(frozen=True)
class CompareArguments:
    """Train several agents on several seeds of one task, then draw and tabulate their returns.

    Any option of diffcore train that all of the agents have can be given too, for all of them, such
    as --total-steps or --eval-interval; --set is for one agent's own. Under names one agent can take
    part with several settings: --agents dipo short=dipo --set short.diffusion-steps=20.

    Asked for again, the same comparison goes on where it was: complete runs are kept, interrupted
    ones resumed, and what is missing is added, more seeds, more agents or more steps.
    """

    agents: tuple[str, ...]
    """The agents, each as AGENT or NAME=AGENT."""
    env: str
    """Gymnasium id, or "module:Id"."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; one run of each agent for each."""
    jobs: int = 1
    """Runs at a time, each in its own process. They share the cores unless --threads is given."""
    last_evaluations: int = 1
    """How many of a run's evaluations, from the end, its final return is the mean of."""
    output: Path | None = None
    """Directory for the runs, the picture and the tables. Default: runs/compare/ENV."""
    set: tuple[str, ...] = ()
    """Options of single agents, as NAME.OPTION=VALUE: --set dipo.diffusion-steps=20"""

    def __post_init__(self) -> None:
        for field, given, different in (
            ("agents", self.agents, [*self.by_name]),
            ("seeds", self.seeds, {*self.seeds}),
        ):
            if not given or len(different) < len(given):
                raise ValueError(f"{field} must be one or more different ones, got {[*given]}")
        for name, agent in self.by_name.items():
            agent_type(agent)
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"a name must be of letters, digits, - and _, got {name!r}")
        for field, number in (("jobs", self.jobs), ("last_evaluations", self.last_evaluations)):
            if number < 1:
                raise ValueError(f"{field} must be at least 1, got {number}")
        for text in self.set:
            self._split(text)

    @property
    def by_name(self) -> dict[str, str]:
        """The agents, by their names."""
        split = [text.rpartition("=") for text in self.agents]
        return {name if equals else agent: agent for name, equals, agent in split}

    def options_of(self, name: str) -> list[str]:
        """What --set says of the agent of that name, as arguments of ``diffcore train``."""
        split = [self._split(text) for text in self.set]
        return [word for whose, words in split if whose == name for word in words]

    def _split(self, text: str) -> tuple[str, list[str]]:
        name, dot, option = text.partition(".")
        option, _, value = option.partition("=")
        if not dot or not option or name not in self.by_name:
            raise ValueError(
                f"set must be NAME.OPTION=VALUE with one of {[*self.by_name]}, got {text!r}"
            )
        return name, [f"--{option}", *shlex.split(value)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: what follows the program's name; None takes them from the command line.

    Returns:
        The exit code: 0, 1 after an error, 130 after Ctrl-C. Wrong arguments exit with 2.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {
        "train": train_command,
        "evaluate": evaluate_command,
        "plot": plot_command,
        "compare": compare_command,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments == ["--version"]:
        print(f"diffcore {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in commands:
        return _usage_error(f"unknown command {command!r}")
    try:
        return commands[command](rest)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was saved since the last checkpoint", file=sys.stderr)
        return INTERRUPTED


def train_command(arguments: list[str]) -> int:
    """``diffcore train AGENT ...`` and ``diffcore train --resume RUN ...``."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    console = Console()
    if any(argument.split("=")[0] == "--resume" for argument in arguments):
        continued = tyro.cli(ResumeArguments, prog="diffcore train", args=arguments)
        changes: dict[str, Any] = {name: getattr(continued, name) for name in RESUMABLE}
        result = resume(continued.resume, **changes, console=console)
        return _report(result, console)
    name, rest = arguments[0], arguments[1:]
    if name not in AGENTS:
        return _usage_error(f"unknown agent {name!r}; there are: {', '.join(sorted(AGENTS))}")
    config, agent_config = parse_training(name, rest)
    return _report(train(config, agent_config, console=console), console)


def parse_training(agent: str, arguments: list[str]) -> tuple[TrainConfig, AgentConfig]:
    """The configs that ``diffcore train AGENT ARGUMENTS`` asks for.

    The environment is looked up first, since the agent's defaults depend on it; what the command
    line says overrides them.

    Raises:
        SystemExit: after printing the help, or an error in the arguments.
    """
    config_type = agent_type(agent).config_type
    defaults = config_type.for_env(_value_of("--env", arguments) or "")
    fields: list[Any] = [
        ("train", TrainConfig),
        ("agent", config_type, dataclasses.field(default=defaults)),
    ]
    parsed: Any = tyro.cli(
        dataclasses.make_dataclass("Arguments", fields, frozen=True),
        prog=f"diffcore train {agent}",
        description=(
            f"Train {agent}. The agent's defaults are those for the environment given by --env."
        ),
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return parsed.train, parsed.agent


def evaluate_command(arguments: list[str]) -> int:
    """``diffcore evaluate RUN ...``."""
    parsed = tyro.cli(EvaluateArguments, prog="diffcore evaluate", args=arguments)
    loaded = load_agent(parsed.run, parsed.device)
    if parsed.video is not None and not os.environ.get("DISPLAY"):
        # MuJoCo would try to open a window. It reads this when it is first imported.
        os.environ.setdefault("MUJOCO_GL", "egl")
    evaluator = Evaluator(
        loaded.config.env,
        episodes=parsed.episodes,
        env_kwargs=loaded.config.env_kwargs,
        max_episode_steps=loaded.config.max_episode_steps,
        deterministic=parsed.deterministic,
        seed=parsed.seed,
        device=parsed.device,
        render=parsed.video is not None,
    )
    try:
        if parsed.video is None:
            evaluation = evaluator.evaluate(loaded.agent)
        else:
            with VideoFile(parsed.video, evaluator.frames_per_second) as video:
                evaluation = evaluator.evaluate(loaded.agent, frames=video.append)
    finally:
        evaluator.close()
    assert evaluation is not None  # nothing asked it to stop
    print(
        f"return {evaluation.mean_return:.2f} ± {evaluation.std_return:.2f} "
        f"over {parsed.episodes} episodes of {loaded.config.env} "
        f"(min {min(evaluation.returns):.2f}, max {max(evaluation.returns):.2f}), "
        f"trained for {loaded.step:,} steps"
    )
    if evaluation.goals:
        counts = evaluation.goal_counts.items()
        print("episodes by the goal reached: " + ", ".join(f"{goal} {n}" for goal, n in counts))
    if parsed.video is not None:
        print(f"video: {parsed.video}")
    return 0


def plot_command(arguments: list[str]) -> int:
    """``diffcore plot RUN... ...``."""
    parsed = tyro.cli(PlotArguments, prog="diffcore plot", args=arguments)
    directory = parsed.runs[0] if len(parsed.runs) == 1 else Path()
    for path in plot_runs(list(parsed.runs), parsed.output or directory / "learning_curve.png"):
        print(path)
    return 0


def compare_command(arguments: list[str]) -> int:
    """``diffcore compare --agents AGENT... --env ID ...``."""
    parsed, output, jobs = parse_comparison(arguments)
    console = Console()
    comparison = compare(
        jobs,
        output,
        parallel=parsed.jobs,
        last_evaluations=parsed.last_evaluations,
        console=console,
    )
    if not comparison.complete:
        say(console, "interrupted, saved; the same command goes on with it")
        return INTERRUPTED
    for path in (comparison.curves, comparison.summary, comparison.final_returns):
        say(console, str(path))
    return 0


def parse_comparison(arguments: list[str]) -> tuple[CompareArguments, Path, list[Job]]:
    """The comparison that ``diffcore compare ARGUMENTS`` asks for: its directory and its runs.

    Raises:
        SystemExit: after printing the help, or an error in the arguments.
    """
    parsed, common = tyro.cli(
        CompareArguments, prog="diffcore compare", args=arguments, return_unknown_args=True
    )
    output = parsed.output or Path("runs") / "compare" / directory_name(parsed.env)
    jobs = []
    for seed in parsed.seeds:  # so that all agents have results early
        for name, agent in parsed.by_name.items():
            run_dir = output / name / f"s{seed}"
            own = ["--env", parsed.env, "--seed", str(seed), "--run-dir", str(run_dir)]
            train = parse_training(agent, [*own, *common, *parsed.options_of(name)])
            _check_what_compare_sets(train[0], TrainConfig(parsed.env, seed, run_dir=run_dir))
            jobs.append(Job(name, *train))
    return parsed, output, jobs


def _check_what_compare_sets(config: TrainConfig, ours: TrainConfig) -> None:
    """Refuse options, however they are spelled, that say otherwise than compare.

    Raises:
        ConfigError: if there are any.
    """
    for name in ("env", "seed", "run_dir", "runs_dir"):
        if getattr(config, name) != getattr(ours, name):
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} can't be given: compare sets it for every run")


def _report(result: TrainResult, console: Console) -> int:
    run = RunDirectory(result.run)
    if result.interrupted:
        say(console, f"interrupted at step {result.step:,}, saved; to go on:")
        say(console, f"  diffcore train --resume {result.run}")
        return INTERRUPTED
    if result.evaluation is not None:
        mean, std = result.evaluation.mean_return, result.evaluation.std_return
        say(console, f"return {mean:.2f} ± {std:.2f} over {len(result.evaluation.returns)} episodes")
    say(console, f"{result.step:,} steps, {result.steps_per_second:,.1f} steps/s")
    say(console, f"run:        {run.path}")
    say(console, f"logs:       {run.progress}, {run.evaluations}")
    say(console, f"checkpoint: {run.checkpoint}")
    say(console, f"weights:    {run.weights}")
    return 0


def _value_of(option: str, arguments: list[str]) -> str | None:
    """The last value given to ``option``, as ``--option VALUE`` or ``--option=VALUE``."""
    value = None
    for i, argument in enumerate(arguments):
        if argument == option:
            value = arguments[i + 1] if i + 1 < len(arguments) else None
        elif argument.startswith(f"{option}="):
            value = argument.removeprefix(f"{option}=")
    return value


def _usage_error(message: str) -> int:
    print(f"error: {message}\n\n{USAGE}", end="", file=sys.stderr)
    return 2
