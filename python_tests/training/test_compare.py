"""Comparisons from command to table: complete, interrupted, asked for again, asked for more."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from rich.console import Console

from diffcore.cli import main, parse_comparison
from diffcore.training import TrainConfig, Trainer, WriteError, checkpoint, loop, plotting, resume
from diffcore.training import compare as comparison
from diffcore.training.checkpoint import load_checkpoint
from diffcore.training.compare import _table, summarize
from diffcore.training.logging import read_csv
from diffcore.training.run_directory import RunDirectory

COMMON = [
    "--env", "Pendulum-v1", "--total-steps", "40", "--max-episode-steps", "10",
    "--eval-interval", "20", "--eval-episodes", "2", "--log-interval", "20", "--no-tensorboard",
]  # fmt: skip
OWN = [
    "--set", "dipo.diffusion-steps=3", "dipo.hidden-dim=16", "dipo.batch-size=8",
    "dipo.action-gradient-steps=2", "dipo.start-steps=20",
    "sb3-ppo.n-steps=10", "sb3-ppo.batch-size=10", "sb3-ppo.hidden-dims=8 8",
]  # fmt: skip
AGENTS = ["--agents", "dipo", "sb3-ppo"]


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    """``run(*more)``: compare two agents in ``tmp_path / "out"``."""

    def compare(*more: str, own: list[str] = OWN) -> int:
        output = ["--output", str(tmp_path / "out")]
        return main(["compare", *AGENTS, *COMMON, *output, *own, *more])

    return compare


def modified(output: Path) -> dict[Path, int]:
    """When each run's evaluations were last written."""
    return {path: path.stat().st_mtime_ns for path in output.glob("*/s*/evaluations.csv")}


def test_end_to_end_and_again_and_with_more(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert run("--seeds", "0", "1") == 0
    text = capsys.readouterr().out
    assert "[1/4] dipo, seed 0" in text
    assert "Final return on Pendulum-v1" in text
    assert str(output / "summary.csv") in text
    assert matplotlib.image.imread(output / "learning_curves.png").std() > 0

    finals = table(output / "final_returns.csv")
    order = [("dipo", "0"), ("sb3-ppo", "0"), ("dipo", "1"), ("sb3-ppo", "1")]
    assert [(row["agent"], row["seed"]) for row in finals] == order
    for row in finals:
        log = output / row["agent"] / f"s{row['seed']}" / "evaluations.csv"
        assert (row["step"], row["return"]) == ("40", read_csv(log)[1][-1]["mean_return"])
        assert row["updates"] == ("20" if row["agent"] == "dipo" else "40")  # PPO: 4 rollouts x 10
    rows = [
        {**row, "updates": int(row["updates"]), "return": float(row["return"])} for row in finals
    ]
    expected = [{name: str(value) for name, value in row.items()} for row in summarize(rows)]
    assert table(output / "summary.csv") == expected

    # Complete runs are left alone.
    before = modified(output)
    assert run("--seeds", "0", "1") == 0
    assert "4 of 4 runs are complete already" in capsys.readouterr().out
    assert modified(output) == before

    # Means of more evaluations than the last.
    assert run("--seeds", "0", "1", "--last-evaluations", "2") == 0
    title = " ".join(capsys.readouterr().out.split())
    assert "mean of the last 2 evaluations of each run" in title
    for row in table(output / "final_returns.csv"):
        log = output / row["agent"] / f"s{row['seed']}" / "evaluations.csv"
        returns = [float(evaluation["mean_return"]) for evaluation in read_csv(log)[1]]
        assert float(row["return"]) == pytest.approx(sum(returns) / 2)
    assert run("--seeds", "0", "1", "--last-evaluations", "3") == 1
    assert "has 2 evaluations, asked for is the mean of the last 3" in capsys.readouterr().err

    # More steps and more seeds; those in processes of their own.
    assert run("--seeds", "1", "--total-steps", "60") == 0
    finals = table(output / "final_returns.csv")
    assert [(row["seed"], row["step"]) for row in finals] == [("1", "60"), ("1", "60")]
    assert run("--seeds", "0", "2", "--jobs", "2") == 0
    text = capsys.readouterr().out
    assert f"dipo, seed 2: started, log in {output / 'dipo-s2.log'}" in text
    assert "sb3-ppo, seed 2: complete" in text
    assert "step 40/40" in (output / "sb3-ppo-s2.log").read_text()
    assert [row["seed"] for row in table(output / "final_returns.csv")] == ["0", "0", "2", "2"]
    unchanged = [output / agent / "s0" / "evaluations.csv" for agent in ("dipo", "sb3-ppo")]
    after = modified(output)
    assert [after[path] for path in unchanged] == [before[path] for path in unchanged]


def test_one_agent_takes_part_with_several_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plotting, "_save", lambda figure, path: figures.append(figure))
    output = tmp_path / "out"
    own = [option for option in OWN if "ppo" not in option]
    also = [option.replace("dipo.", "short-chain.") for option in own[1:]]
    arguments = ["--agents", "dipo", "short-chain=dipo", "--seeds", "0", "1", *COMMON, *own, *also]
    arguments += ["short-chain.diffusion-steps=2", "--output", str(output)]
    assert main(["compare", *arguments]) == 0
    assert "short-chain, seed 1" in capsys.readouterr().out
    assert [row["agent"] for row in table(output / "summary.csv")] == ["dipo", "short-chain"]
    steps = [
        RunDirectory(output / name / "s1").read_config()["agent_config"]["diffusion_steps"]
        for name in ("dipo", "short-chain")
    ]
    assert steps == [3, 2]
    (axes,) = figures[0].axes
    labels = [line.get_label() for line in axes.get_lines()]
    assert labels == ["dipo (2 seeds)", "short-chain (2 seeds)"]


def test_a_run_equals_one_that_was_trained_by_itself(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("--seeds", "0") == 0
    path = tmp_path / "alone"
    own = ["--n-steps", "10", "--batch-size", "10", "--hidden-dims", "8", "8"]
    assert main(["train", "sb3-ppo", *COMMON, *own, "--run-dir", str(path)]) == 0
    for name in ("progress.csv", "evaluations.csv", "weights.safetensors"):
        compared = tmp_path / "out" / "sb3-ppo" / "s0" / name
        assert compared.read_bytes() == (path / name).read_bytes()


def test_ctrl_c_ends_it_and_the_same_command_goes_on(
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    advance = Trainer.advance

    def advance_and_signal(trainer: Trainer) -> list[float]:
        returns = advance(trainer)
        if trainer.step == 30 and trainer.config.seed == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return returns

    monkeypatch.setattr(Trainer, "advance", advance_and_signal)
    assert run("--seeds", "0", "1") == 130
    assert "the same command goes on with it" in capsys.readouterr().out
    output = tmp_path / "out"
    assert len(modified(output)) == 3
    assert not (output / "summary.csv").exists()
    resumed: list[Path] = []
    monkeypatch.setattr(
        comparison, "resume", lambda path, **how: (resumed.append(path), resume(path, **how))[1]
    )
    assert run("--seeds", "0", "1") == 0
    assert resumed == [output / "dipo" / "s1"]
    assert len(table(output / "final_returns.csv")) == 4


def test_a_run_killed_before_its_first_checkpoint_starts_anew(
    run: Callable[..., int], tmp_path: Path
) -> None:
    assert run("--seeds", "0") == 0
    killed = tmp_path / "out" / "dipo" / "s0"
    whole = (killed / "evaluations.csv").read_bytes()
    for name in ("checkpoint.pt", "weights.safetensors"):
        (killed / name).unlink()
    assert run("--seeds", "0") == 0
    assert (killed / "evaluations.csv").read_bytes() == whole
    assert (killed / "checkpoint.pt").is_file()


@pytest.mark.parametrize("lost", ["checkpoint", "weights"])
def test_a_run_whose_end_was_not_saved_is_not_complete(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """As a full disk leaves it or, between two files, a kill."""
    assert run("--seeds", "0") == 0

    def fail(*arguments: object) -> None:
        raise WriteError("no space left")

    module, write = (checkpoint, "write_atomically"), (loop._Session, "export_weights")
    with monkeypatch.context() as patch:
        patch.setattr(*(module if lost == "checkpoint" else write), fail)
        assert run("--seeds", "0", "--total-steps", "60") == 1
    path = tmp_path / "out" / "dipo" / "s0"
    assert read_csv(path / "evaluations.csv")[1][-1]["step"] == "60"
    saved = load_checkpoint(path / "checkpoint.pt")["step"], RunDirectory(path).weights_step()
    assert saved == ((40, 60) if lost == "checkpoint" else (60, 40))
    assert run("--seeds", "0", "--total-steps", "60") == 0
    assert load_checkpoint(path / "checkpoint.pt")["step"] == RunDirectory(path).weights_step() == 60
    assert [row["step"] for row in read_csv(path / "evaluations.csv")[1]] == ["20", "40", "60"]


def test_runs_that_were_set_differently_are_not_taken_for_these(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--seeds", "0") == 0
    for more, message in (
        (["--eval-episodes", "3"], "with eval_episodes 2, asked for is 3"),
        (["--total-steps", "20"], "is set to 40 steps, asked for are 20"),
    ):
        assert run("--seeds", "0", *more) == 1
        assert message in capsys.readouterr().err
    other = [option.replace("hidden-dim=16", "hidden-dim=8") for option in OWN]
    assert run("--seeds", "0", own=other) == 1
    assert "with hidden_dim 16, asked for is 8; choose another" in capsys.readouterr().err


def test_settings_that_change_no_return_may_differ(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--seeds", "0") == 0
    before = modified(tmp_path / "out")
    assert run("--seeds", "0", "--log-interval", "5", "--checkpoint-minutes", "1") == 0
    assert modified(tmp_path / "out") == before
    assert run("--seeds", "0", "--eval-interval", "10") == 1
    assert "with eval_interval 20, asked for is 10" in capsys.readouterr().err


def test_a_run_from_before_there_was_a_setting_has_its_default(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--seeds", "0") == 0
    for config in tmp_path.glob("out/*/s0/config.json"):
        contents = json.loads(config.read_text())
        del contents["train"]["env_kwargs"]
        config.write_text(json.dumps(contents))
    assert run("--seeds", "0") == 0
    assert run("--seeds", "0", "--env-kwargs", '{"g": 9.0}') == 1
    assert "with env_kwargs {}, asked for is {'g': 9.0}" in capsys.readouterr().err


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_run_that_fails_is_named(
    jobs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["--agents", "sb3-ppo", "--env", "CartPole-v1", "--seeds", "0"]
    assert main(["compare", *arguments, "--jobs", jobs, "--output", str(output)]) == 1
    error = capsys.readouterr().err
    assert "CartPole-v1 has the action space" in error
    assert jobs == "1" or str(output / "sb3-ppo-s0.log") in error


def test_where_it_goes_by_default_and_what_each_run_is_told() -> None:
    arguments = [*AGENTS, "--env", "diffcore/MultiGoal-v0", "--threads", "3", *OWN]
    parsed, output, jobs = parse_comparison(arguments)
    assert output == Path("runs/compare/diffcore-MultiGoal-v0")
    assert parsed.seeds == (0, 1, 2)
    assert [(job.name, job.config.seed) for job in jobs] == [
        (agent, seed) for seed in (0, 1, 2) for agent in ("dipo", "sb3-ppo")
    ]
    dipo, ppo = jobs[0], jobs[1]
    assert dipo.config == TrainConfig(
        "diffcore/MultiGoal-v0", threads=3, run_dir=output / "dipo" / "s0"
    )
    assert dipo.agent_config.diffusion_steps == 3  # type: ignore[attr-defined]
    assert ppo.agent_config.hidden_dims == (8, 8)  # type: ignore[attr-defined]


def test_summary() -> None:
    finals = [("a", 10, 1.0), ("b", 7, 5.0), ("a", 20, 2.0), ("a", 30, 6.0)]
    rows = summarize([{"agent": a, "updates": n, "return": value} for a, n, value in finals])
    assert rows[0] == {
        "agent": "a", "seeds": 3, "updates": 20, "iqm": 3.0, "ci_low": 1.0, "ci_high": 6.0,
        "mean": 3.0, "std": pytest.approx(2.1602469), "min": 1.0, "max": 6.0,
    }  # fmt: skip
    assert (rows[1]["agent"], rows[1]["iqm"], rows[1]["ci_low"], rows[1]["std"]) == ("b", 5, 5, 0)


def test_the_table_fits_a_narrow_terminal() -> None:
    returns = (11234.5, 12345.5, 10234.5)
    rows = summarize([{"agent": "sb3-sac", "updates": 9_990_000, "return": r} for r in returns])
    output = io.StringIO()
    Console(file=output, width=80).print(_table("HalfCheetah-v5", rows))
    (row,) = [line for line in output.getvalue().splitlines() if "sb3-sac" in line]
    assert row.split() == [
        "sb3-sac", "3", "9,990,000", "11271.5", "10234.5", "..", "12345.5", "11271.5", "±", "862.2",
    ]  # fmt: skip
