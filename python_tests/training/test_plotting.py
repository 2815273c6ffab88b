"""Pictures: the numbers drawn, and that something is drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import TinyAgent, TinyConfig

from diffcore.agents import DIPOConfig
from diffcore.agents.baselines import SACConfig
from diffcore.training import RunError, TrainConfig, WriteError, train
from diffcore.training.plotting import (
    common_steps,
    multigoal_q,
    plot_runs,
    sample_grid_actions,
)
from diffcore.training.run_directory import RunDirectory

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def fake_run(tiny_run: MakeConfig) -> Callable[..., Path]:
    """A run directory with a learning curve, without having trained."""

    def make(name: str, curve: dict[int, float], agent_config: Any, **changes: Any) -> Path:
        run = RunDirectory.create(tiny_run(name, **changes), agent_config)
        rows = "".join(f"{step},{value}\n" for step, value in curve.items())
        run.evaluations.write_text("step,mean_return\n" + rows)
        return run.path

    return make


def draw(runs: list[Path], output: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plot, and return matplotlib's figure."""
    from diffcore.training import plotting

    figures: list[Any] = []
    save = plotting._save
    monkeypatch.setattr(
        plotting, "_save", lambda figure, path: (figures.append(figure), save(figure, path))
    )
    plot_runs(runs, output)
    assert matplotlib.image.imread(output).std() > 0
    return figures[-1]


def test_seeds_share_a_curve_and_everything_else_does_not(
    fake_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed, official = DIPOConfig(), DIPOConfig(mode="official")
    runs = [
        fake_run("a", {10: 1.0, 20: 2.0, 30: 9.0}, fixed, seed=0),
        fake_run("b", {10: 3.0, 20: 6.0}, fixed, seed=1),
        fake_run("c", {10: 0.0, 20: 1.0}, official),
        fake_run("d", {10: 5.0}, TinyConfig()),
        fake_run("e", {10: 7.0}, fixed, env="Hopper-v5"),
    ]
    hopper, pendulum = draw(runs, tmp_path / "plot.png", monkeypatch).axes
    assert (hopper.get_title(), pendulum.get_title()) == ("Hopper-v5", "Pendulum-v1")
    lines = {line.get_label(): line for line in pendulum.get_lines()}
    assert list(lines) == ["dipo (fixed) (2 seeds)", "dipo (official)", "tiny"]
    np.testing.assert_array_equal(lines["dipo (fixed) (2 seeds)"].get_xdata(), [10, 20])
    np.testing.assert_array_equal(lines["dipo (fixed) (2 seeds)"].get_ydata(), [2.0, 4.0])
    (band,) = pendulum.collections  # only where there are several seeds
    vertices = band.get_paths()[0].vertices
    assert {(10, 1.0), (10, 3.0), (20, 2.0), (20, 6.0)} <= set(map(tuple, vertices.tolist()))


def test_runs_with_other_settings_are_no_seeds_of_one_curve(
    fake_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [
        fake_run("a", {10: 1.0, 20: 2.0}, DIPOConfig(), seed=0),
        fake_run("b", {10: 3.0, 20: 6.0}, DIPOConfig(), seed=1, total_steps=90, threads=2),
        fake_run("c", {10: 5.0}, DIPOConfig(diffusion_steps=20)),
        fake_run("d", {10: 7.0}, DIPOConfig(), num_envs=2),
        fake_run("e", {10: 9.0}, SACConfig()),
    ]
    (axes,) = draw(runs, tmp_path / "plot.png", monkeypatch).axes
    assert [line.get_label() for line in axes.get_lines()] == [
        "dipo (fixed) diffusion_steps=100 num_envs=1 (2\nseeds)",
        "dipo (fixed) diffusion_steps=100 num_envs=2",
        "dipo (fixed) diffusion_steps=20 num_envs=1",
        "sb3-sac",
    ]


def test_a_run_named_twice_counts_once(
    fake_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fake_run("a", {10: 1.0, 20: 2.0}, DIPOConfig())
    again = run.parent / "b" / ".." / "a"
    (run.parent / "b").mkdir()
    (axes,) = draw([run, run, again], tmp_path / "plot.png", monkeypatch).axes
    (line,) = axes.get_lines()
    assert line.get_label() == "dipo (fixed)"
    assert not axes.collections
    assert axes.get_ylabel() == "evaluation return"


def test_two_runs_of_one_seed_are_no_two_seeds(
    fake_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [fake_run(name, {10: 1.0, 20: 2.0}, DIPOConfig()) for name in ("a", "b")]
    (axes,) = draw(runs, tmp_path / "plot.png", monkeypatch).axes
    assert [line.get_label() for line in axes.get_lines()] == ["dipo (fixed) (2 runs of 1 seed)"]
    assert not axes.collections
    runs.append(fake_run("c", {10: 4.0, 20: 5.0}, DIPOConfig(), seed=1))
    (axes,) = draw(runs, tmp_path / "plot.png", monkeypatch).axes
    assert [line.get_label() for line in axes.get_lines()] == ["dipo (fixed) (3 runs of 2 seeds)"]
    assert len(axes.collections) == 1


def test_a_run_from_before_a_setting_has_its_default(
    fake_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [
        fake_run("a", {10: 1.0}, DIPOConfig()),
        fake_run("b", {10: 3.0}, DIPOConfig(), env_kwargs={"g": 9.0}),
        fake_run("old", {10: 5.0}, DIPOConfig(), seed=1),
    ]
    config = runs[-1] / "config.json"
    contents = json.loads(config.read_text())
    del contents["train"]["env_kwargs"]
    config.write_text(json.dumps(contents))
    (axes,) = draw(runs, tmp_path / "plot.png", monkeypatch).axes
    assert [line.get_label().replace("\n", " ") for line in axes.get_lines()] == [
        "dipo (fixed) env_kwargs={'g': 9.0}",
        "dipo (fixed) env_kwargs={} (2 seeds)",
    ]


def test_common_steps() -> None:
    steps, values = common_steps([([1, 2, 3], [1.0, 2.0, 3.0]), ([3, 1], [30.0, 10.0])])
    assert steps == [1, 3]
    np.testing.assert_array_equal(values, [[1.0, 3.0], [10.0, 30.0]])
    with pytest.raises(RunError, match="no evaluated step in common"):
        common_steps([([1], [1.0]), ([2], [2.0])])


def test_what_cannot_be_plotted_is_named(
    fake_run: Callable[..., Path], tiny_run: MakeConfig, tmp_path: Path
) -> None:
    run = fake_run("a", {10: 1.0}, TinyConfig())
    with pytest.raises(RunError, match="there is no run directory"):
        plot_runs([tmp_path / "gone"], tmp_path / "plot.png")
    new = RunDirectory.create(tiny_run("new"), TinyConfig())
    with pytest.raises(RunError, match="has no evaluations yet"):
        plot_runs([new.path], tmp_path / "plot.png")
    with pytest.raises(WriteError, match=r"plot\.xyz: its ending must be one of .*png"):
        plot_runs([run], tmp_path / "plot.xyz")
    with pytest.raises(WriteError, match="No such file or directory"):
        plot_runs([run], tmp_path / "gone" / "plot.png")
    (run / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"can't read .*config\.json"):
        plot_runs([run], tmp_path / "plot.png")


def test_multigoal_pictures(tiny_run: MakeConfig, console: Console, tmp_path: Path) -> None:
    config = tiny_run(env="diffcore/MultiGoal-v0", total_steps=30)
    agent_config = DIPOConfig(diffusion_steps=3, hidden_dim=16, batch_size=8, start_steps=20)
    run = train(config, agent_config, console=console).run
    written = plot_runs([run], tmp_path / "picture.png")
    names = ["picture.png", "picture-actions.png", "picture-q.png"]
    assert written == [tmp_path / name for name in names]
    for path in written:
        assert matplotlib.image.imread(path).std() > 0


def test_arrows_start_at_the_grid() -> None:
    agent = TinyAgent(2, 2, TinyConfig(), seed=0)
    states, actions = sample_grid_actions(agent, 5, seed=0, device="cpu")
    assert states.shape == actions.shape == (49 * 5, 2)
    assert set(states.flatten()) == {-3, -2, -1, 0, 1, 2, 3}
    assert len({tuple(state) for state in states}) == 49
    assert len({tuple(action) for action in actions[:5]}) == 5  # of one state


def test_q_surface() -> None:
    class WithCritic(TinyAgent):
        def critic(self, state: torch.Tensor, action: torch.Tensor) -> Any:
            return state.sum(dim=1, keepdim=True), torch.full((len(state), 1), 1.0)

    agent = WithCritic(2, 2, TinyConfig(), seed=0)
    x, y, q = multigoal_q(agent, 100, seed=0, device="cpu")
    assert x.shape == y.shape == q.shape == (100, 100)
    assert (x.min(), x.max(), y.min(), y.max()) == (-7, 7, -7, 7)
    np.testing.assert_allclose(q, np.minimum(x + y, 1.0), rtol=1e-6)
    with pytest.raises(RunError, match="TinyAgent has no critic"):
        multigoal_q(TinyAgent(2, 2, TinyConfig(), seed=0), 10, seed=0, device="cpu")
