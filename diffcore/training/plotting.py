"""Pictures of runs: learning curves, and the paper's views of a policy on the multi-goal toy."""

from __future__ import annotations

import dataclasses
import io
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diffcore.envs.multigoal import BOUND, GOALS
from diffcore.training.config import TrainConfig, to_dict
from diffcore.training.errors import RunError, WriteError
from diffcore.training.files import write_atomically
from diffcore.training.logging import read_series
from diffcore.training.loop import load_agent
from diffcore.training.registry import Actor
from diffcore.training.run_directory import RunDirectory

Array = np.ndarray[Any, Any]


def plot_runs(runs: list[Path], output: Path) -> list[Path]:
    """Draw all there is to draw of some runs.

    Args:
        runs: run directories; at least one. One that is named twice counts once.
        output: the picture of learning curves. For runs on the multi-goal toy those of actions and,
            if the agent has a critic, of Q are written beside it.

    Returns:
        The pictures written.

    Raises:
        TrainingError: if a run can't be read or a picture can't be written.
    """
    runs = list({path.resolve(): path for path in runs}.values())
    plot_learning_curves(runs, output)
    written = [output]
    multigoal = [path for path in runs if _is_multigoal(RunDirectory.open(path))]
    for path in multigoal:
        agent = load_agent(path).agent
        which = f"-{path.resolve().name}" if len(multigoal) > 1 else ""
        actions = output.with_stem(f"{output.stem}{which}-actions")
        q = output.with_stem(f"{output.stem}{which}-q")
        plot_multigoal_actions(agent, actions)
        written.append(actions)
        if hasattr(agent, "critic"):  # PPO has none
            plot_multigoal_q(agent, q)
            written.append(q)
    return written


def _is_multigoal(run: RunDirectory) -> bool:
    env_id = str(run.read_config()["train"]["env"])
    return env_id.rsplit(":", 1)[-1].startswith("diffcore/MultiGoal-")


@dataclass(frozen=True)
class Band:
    """What a curve shows of several seeds at each step."""

    name: str
    of: Callable[[Array], tuple[Array, Array, Array]]
    """Middle, lower and upper edge, ``[T]`` each, of values ``[seeds, T]``."""


def _mean_and_deviation(values: Array) -> tuple[Array, Array, Array]:
    mean, deviation = values.mean(axis=0), values.std(axis=0)
    return mean, mean - deviation, mean + deviation


STANDARD_DEVIATION = Band("mean, one standard deviation", _mean_and_deviation)


LABEL_WIDTH = 48
"""Characters in a line of the legend; a longer one would push the curves out of the picture."""


def plot_learning_curves(
    runs: list[Path],
    output: Path,
    *,
    band: Band = STANDARD_DEVIATION,
    names: list[str] | None = None,
) -> None:
    """Evaluation return over environment steps, one panel per environment.

    Runs that differ only in their seed make one curve, over the steps that all of them have
    evaluated; where there are several seeds, a band shows how far they lie apart.

    Args:
        runs: run directories; at least one.
        output: a picture file whose kind matplotlib knows, such as .png or .pdf.
        band: what curve and band are.
        names: what each run's curve is called; None calls it by its agent and mode.

    Raises:
        RunError: if a directory isn't a run, or has no evaluations yet.
        WriteError: if the picture can't be written.
    """
    panels: dict[str, dict[str, list[_Curve]]] = defaultdict(dict)
    labels: Iterable[str | None] = repeat(None, len(runs)) if names is None else names
    curves = [_read_curve(path, label) for path, label in zip(runs, labels, strict=True)]
    for curve in _labelled(curves):
        panels[curve.environment].setdefault(curve.label, []).append(curve)

    figure = Figure(figsize=(6.0 * len(panels), 4.0), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (environment, groups) in zip(all_axes, sorted(panels.items()), strict=True):
        for label, group in sorted(groups.items()):
            steps, returns = common_steps([curve.series for curve in group])
            middle, low, high = band.of(returns)
            name = "\n".join(textwrap.wrap(label + _count(group), LABEL_WIDTH))
            (line,) = axes.plot(steps, middle, label=name, marker="." if len(steps) == 1 else None)
            if _seeds(group) > 1:
                axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.25, lw=0)
        several = any(_seeds(group) > 1 for group in groups.values())
        ylabel = f"evaluation return\n({band.name})" if several else "evaluation return"
        axes.set(title=environment, xlabel="environment steps", ylabel=ylabel)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    _save(figure, output)


def common_steps(
    series: list[tuple[list[int], list[float]]],
) -> tuple[list[int], Array]:
    """Bring curves onto the steps they share.

    Args:
        series: steps and values of each curve.

    Returns:
        The ``T`` shared steps, and values ``[len(series), T]``.

    Raises:
        RunError: if they share none.
    """
    curves = [dict(zip(steps, values, strict=True)) for steps, values in series]
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not shared:
        raise RunError("runs of one group have no evaluated step in common")
    return shared, np.array([[curve[step] for step in shared] for curve in curves])


@dataclass(frozen=True)
class _Curve:
    """A run's learning curve."""

    environment: str
    seed: int
    label: str
    settings: dict[str, Any]
    """What makes two runs more than two seeds of one thing."""
    series: tuple[list[int], list[float]]


_SHAPING = ("env_kwargs", "max_episode_steps", "num_envs", "updates_per_step", "eval_deterministic")
"""The settings of a run that its learning curve depends on, beside the agent's own."""


def _read_curve(path: Path, label: str | None) -> _Curve:
    run = RunDirectory.open(path)
    config = run.read_config()
    if not run.evaluations.is_file():
        raise RunError(f"{path} has no evaluations yet")
    # A run from before there was a setting was made as the setting's default has it.
    train = {**to_dict(TrainConfig(config["train"]["env"])), **config["train"]}
    settings = dict(config["agent_config"])
    mode = settings.pop("mode", None)
    settings |= {name: train[name] for name in _SHAPING}
    if label is None:
        label = f"{config['agent']} ({mode})" if mode else str(config["agent"])
    series = read_series(run.evaluations, "mean_return")
    return _Curve(str(train["env"]), train["seed"], label, settings, series)


def _seeds(curves: list[_Curve]) -> int:
    return len({curve.seed for curve in curves})


def _count(curves: list[_Curve]) -> str:
    """What a label says of how many runs it stands for. Two runs of one seed are no two seeds."""
    seeds = _seeds(curves)
    if seeds < len(curves):
        return f" ({len(curves)} runs of {seeds} seed{'s' if seeds > 1 else ''})"
    return f" ({seeds} seeds)" if seeds > 1 else ""


def _labelled(curves: list[_Curve]) -> list[_Curve]:
    """Add to labels the settings in which curves of one panel and one label differ.

    A setting that some of them don't have, since they were made before there was such a one, doesn't
    count.
    """
    alike: dict[tuple[str, str], list[_Curve]] = defaultdict(list)
    for curve in curves:
        alike[curve.environment, curve.label].append(curve)
    labelled = []
    for curve in curves:
        group = alike[curve.environment, curve.label]
        names = sorted(set.intersection(*(set(other.settings) for other in group)))
        differing = [
            f"{name}={curve.settings[name]}"
            for name in names
            if any(other.settings[name] != curve.settings[name] for other in group)
        ]
        label = " ".join([curve.label, *differing])
        labelled.append(dataclasses.replace(curve, label=label))
    return labelled


def sample_grid_actions(
    agent: Actor, samples: int, *, seed: int, device: str
) -> tuple[Array, Array]:
    """Draw actions of the policy at the 7 x 7 states {-3, ..., 3}^2 of the multi-goal toy.

    Args:
        agent: trained on the multi-goal toy.
        samples: actions per state.
        seed: of the samples.
        device: the agent's.

    Returns:
        States and actions, each ``[49 * samples, 2]``.
    """
    ticks = np.arange(-3.0, 4.0, dtype=np.float32)
    grid = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    states = np.repeat(grid, samples, axis=0)
    generator = torch.Generator(device).manual_seed(seed)
    actions = agent.act(torch.from_numpy(states).to(device), explore=True, generator=generator)
    return states, actions.cpu().numpy()


def plot_multigoal_actions(
    agent: Actor, output: Path, *, samples: int = 20, seed: int = 0, device: str = "cpu"
) -> None:
    """The paper's 2D picture: the policy's actions as arrows from the grid {-3, ..., 3}^2.

    Args:
        agent: trained on the multi-goal toy.
        output: the picture file.
        samples: arrows per state; a policy of several modes shows them all.
        seed: of the samples.
        device: the agent's.

    Raises:
        WriteError: if the picture can't be written.
    """
    states, actions = sample_grid_actions(agent, samples, seed=seed, device=device)
    figure = Figure(figsize=(6.0, 6.0), layout="constrained")
    axes = figure.subplots()
    # Half the length drawn, so that arrows of neighbouring states don't run into each other.
    axes.quiver(
        *states.T, *(0.5 * actions.T), angles="xy", scale_units="xy", scale=1.0,
        width=0.002, color="tab:blue", alpha=0.6,
    )  # fmt: skip
    axes.plot(*GOALS.T, "*", color="tab:red", markersize=16)
    axes.set(xlim=(-BOUND, BOUND), ylim=(-BOUND, BOUND), aspect="equal", xlabel="x", ylabel="y")
    axes.set_title(f"{samples} actions per state")
    _save(figure, output)


def multigoal_q(agent: Actor, points: int, *, seed: int, device: str) -> tuple[Array, Array, Array]:
    """Q along the policy over the multi-goal toy's whole arena.

    Args:
        agent: trained on the toy; its ``critic(state, action)`` returns (q1, q2), ``[B, 1]`` each.
        points: states per axis.
        seed: of the actions.
        device: the agent's.

    Returns:
        x, y and min(Q1, Q2)(s, a) with one a drawn from the policy at each s, ``[points, points]``
        each.

    Raises:
        RunError: if the agent has no critic.
    """
    critic = getattr(agent, "critic", None)
    if critic is None:
        raise RunError(f"{type(agent).__name__} has no critic whose Q could be drawn")
    ticks = np.linspace(-BOUND, BOUND, points, dtype=np.float32)
    x, y = np.meshgrid(ticks, ticks)
    states = torch.from_numpy(np.stack([x, y], axis=-1).reshape(-1, 2)).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        actions = agent.act(states, explore=True, generator=generator)
        q = torch.minimum(*critic(states, actions))
    return x, y, q.reshape(points, points).cpu().numpy()


def plot_multigoal_q(
    agent: Actor, output: Path, *, points: int = 100, seed: int = 0, device: str = "cpu"
) -> None:
    """The paper's 3D picture: Q as a surface over the arena. See :func:`multigoal_q`.

    Raises:
        RunError: if the agent has no critic.
        WriteError: if the picture can't be written.
    """
    x, y, q = multigoal_q(agent, points, seed=seed, device=device)
    figure = Figure(figsize=(7.0, 6.0), layout="constrained")
    axes: Any = figure.add_subplot(projection="3d")
    axes.plot_surface(x, y, q, cmap="viridis", rcount=points, ccount=points, linewidth=0)
    axes.set(xlabel="x", ylabel="y", zlabel="Q")
    _save(figure, output)


def _save(figure: Figure, output: Path) -> None:
    FigureCanvasAgg(figure)
    kind = output.suffix.lstrip(".")
    if kind not in figure.canvas.get_supported_filetypes():
        known = ", ".join(sorted(figure.canvas.get_supported_filetypes()))
        raise WriteError(f"can't write a picture {output}: its ending must be one of {known}")
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=150)
    write_atomically(output, lambda file: file.write(picture.getvalue()))
