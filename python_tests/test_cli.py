"""The command line, from arguments to exit codes."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import diffcore
import diffcore.cli
from diffcore.agents import DiffSRConfig, DIPOConfig
from diffcore.cli import main, parse_training
from diffcore.training import TrainConfig, TrainResult
from diffcore.training.checkpoint import load_checkpoint
from diffcore.training.compare import Comparison
from diffcore.training.config import RESUMABLE
from diffcore.training.logging import read_csv

SHORT = [
    "--env", "Pendulum-v1", "--total-steps", "60", "--max-episode-steps", "25",
    "--eval-interval", "20", "--eval-episodes", "2", "--log-interval", "7",
    "--hidden-dim", "16", "--batch-size", "8", "--start-steps", "20", "--no-tensorboard",
]  # fmt: skip
TINY = [*SHORT, "--diffusion-steps", "3", "--action-gradient-steps", "2"]
TINY_DIFFSR = [
    *SHORT, "--feature-dim", "8", "--psi-hidden-dim", "8", "--zeta-hidden-dim", "8",
    "--noise-steps", "5", "--extra-feature-steps", "1",
]  # fmt: skip


COMPARED = ["--agents", "dipo", "--env", "Pendulum-v1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    path = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "dipo", *TINY, "--run-dir", str(path)]) == 0
    return path


def exit_code(arguments: list[str]) -> int:
    """Of a command whose arguments may be refused by the parser."""
    try:
        return main(arguments)
    except SystemExit as exited:
        return exited.code  # type: ignore[return-value]


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in (([], 2), (["--help"], 0), (["train"], 2), (["train", "-h"], 0)):
        assert main(arguments) == code
        assert "diffcore train AGENT --env ID" in capsys.readouterr().out
    assert main(["fly"]) == 2
    assert "unknown command 'fly'" in capsys.readouterr().err
    assert main(["train", "nobody"]) == 2
    assert "unknown agent 'nobody'; there are: diffsr, dipo" in capsys.readouterr().err


def test_a_comparison_ends_well_though_nobody_reads_what_it_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Hungup(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    done = Comparison(True, *(tmp_path / name for name in ("a.png", "b.csv", "c.csv")))
    for comparison, code in ((done, 0), (dataclasses.replace(done, complete=False), 130)):
        monkeypatch.setattr("diffcore.cli.compare", lambda *_, c=comparison, **__: c)
        monkeypatch.setattr("sys.stdout", Hungup())
        assert main(["compare", *COMPARED]) == code


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"diffcore {diffcore.__version__}\n"


@pytest.mark.parametrize(("agent", "config_type"), [("dipo", DIPOConfig), ("diffsr", DiffSRConfig)])
def test_every_setting_is_in_the_help(
    agent: str, config_type: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(["train", agent, "--help"]) == 0
    text = capsys.readouterr().out
    for config in (TrainConfig, config_type):
        for field in dataclasses.fields(config):
            option = "--" + field.name.replace("_", "-")
            assert re.search(rf"{option}\b", text), option
    for command, part in (("evaluate", "un director"), ("plot", "un director"), ("compare", "--set")):
        assert exit_code([command, "--help"]) == 0
        assert part in capsys.readouterr().out


@pytest.mark.parametrize("spelling", [["--env", "HalfCheetah-v5"], ["--env=HalfCheetah-v5"]])
def test_defaults_follow_the_environment(spelling: list[str]) -> None:
    train, agent = parse_training("dipo", [*spelling, "--lr", "0.5", "--seed", "7"])
    assert train == TrainConfig(env="HalfCheetah-v5", seed=7)
    assert agent == dataclasses.replace(DIPOConfig.for_env("HalfCheetah-v5"), lr=0.5)
    assert agent != dataclasses.replace(DIPOConfig(), lr=0.5)


def test_the_command_line_overrides_the_environments_defaults() -> None:
    _, agent = parse_training("dipo", ["--action-gradient-steps", "3", "--env", "HalfCheetah-v5"])
    assert agent.action_gradient_steps == 3  # type: ignore[attr-defined]


def test_arguments_for_the_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    arguments = ["--env", "diffcore/Pendulum-masked-v0", "--env-kwargs", '{"history": 2}']
    train, _ = parse_training("dipo", arguments)
    assert train == TrainConfig("diffcore/Pendulum-masked-v0", env_kwargs={"history": 2})
    assert main(["train", "dipo", *TINY, *arguments, "--run-dir", str(path)]) == 0
    # With the environment's own history, of three, there would be other sizes.
    assert main(["evaluate", str(path), "--episodes", "1"]) == 0
    assert "over 1 episodes of diffcore/Pendulum-masked-v0" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["dipo", *TINY], ["diffsr", *TINY_DIFFSR]])
def test_a_run_reports_what_it_did(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    assert main(["train", *arguments, "--run-dir", str(path)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"return -\d+\.\d\d ± \d+\.\d\d over 2 episodes", text)
    assert re.search(r"60 steps, [\d.,]+ steps/s", text)
    for name in ("progress.csv", "evaluations.csv", "checkpoint.pt", "weights.safetensors"):
        assert str(path / name) in text
        assert (path / name).is_file()


def test_evaluate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def evaluate(*options: str) -> str:
        assert main(["evaluate", str(run), "--episodes", "3", *options]) == 0
        return capsys.readouterr().out

    first = evaluate()
    assert re.match(r"return -\d+\.\d\d ± \d+\.\d\d over 3 episodes of Pendulum-v1", first)
    assert "trained for 60 steps" in first
    assert evaluate() == first
    assert evaluate("--seed", "1") != first
    assert evaluate("--deterministic") == evaluate("--deterministic") != first


def test_evaluate_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, video = tmp_path / "run", tmp_path / "video.gif"
    environment = ["--env", "diffcore/MultiGoal-v0", "--max-episode-steps", "3"]
    assert main(["train", "dipo", *TINY, *environment, "--run-dir", str(path)]) == 0
    assert main(["evaluate", str(path), "--video", str(video)]) == 0
    text = capsys.readouterr().out
    assert f"video: {video}" in text
    assert "episodes by the goal reached: none 10\n" in text  # in 3 steps none can be
    assert video.read_bytes().startswith(b"GIF8")


def test_plot(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'learning_curve.png'}\n"
    assert main(["plot", str(run), str(run), "--output", str(tmp_path / "both.pdf")]) == 0
    assert (tmp_path / "both.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "dipo"], 2, "--env"),
        (["train", "dipo", "--env", "Pendulum-v1", "--lr", "fast"], 2, "--lr"),
        (["train", "dipo", "--env", "Pendulum-v1", "--lr", "-1"], 2, "lr must be above 0"),
        (["train", "dipo", "--env", "Pendulum-v1", "--seed", "-1"], 2, "seed must be at least 0"),
        (["train", "dipo", "--env", "Pendulum-v1", "--speed", "9"], 2, "--speed"),
        (["train", "dipo", "--env", "Pendulum-v1", "--env-kwargs", "{g"], 2, "--env-kwargs"),
        (["train", "dipo", "--env", "CartPole-v1"], 1, "error: CartPole-v1 has the action space"),
        (["train", "dipo", "--env", "Nothing-v0"], 1, "error: can't make the environment"),
        (["train", "--resume", "gone"], 1, "error: there is no run directory gone"),
        (["train", "--resume"], 2, "--resume"),
        (["evaluate"], 2, "PATH"),
        (["evaluate", "gone"], 1, "error: there is no run directory gone"),
        (["evaluate", "gone", "--episodes", "0"], 2, "episodes must be at least 1"),
        (["evaluate", "gone", "--video", "a.txt"], 2, "video must be an .mp4 or .gif file"),
        (["evaluate", "gone", "--device", "toaster"], 1, "error: there is no run directory"),
        (["compare"], 2, "--agents"),
        (["compare", "--agents", "dipo"], 2, "--env"),
        (["compare", "--agents", "dipo", "dipo", "--env", "Pendulum-v1"], 2, "agents must be one"),
        (["compare", "--agents", "a=dipo", "a=diffsr", "--env", "X"], 2, "agents must be one"),
        (["compare", "--agents", "a=me", "--env", "Pendulum-v1"], 2, "unknown agent 'me'"),
        (["compare", "--agents", "../a=dipo", "--env", "X"], 2, "a name must be of letters,"),
        (["compare", "--agents", "me", "--env", "Pendulum-v1"], 2, "unknown agent 'me'"),
        (["compare", *COMPARED, "--seeds", "1", "1"], 2, "seeds must be one or more different"),
        (["compare", *COMPARED, "--jobs", "0"], 2, "jobs must be at least 1"),
        (["compare", *COMPARED, "--last-evaluations", "0"], 2, "last_evaluations must be at least 1"),
        (["compare", *COMPARED, "--set", "dipo"], 2, "set must be NAME.OPTION=VALUE"),
        (["compare", *COMPARED, "--set", "sb3-sac.tau=1"], 2, "set must be NAME.OPTION"),
        (["compare", *COMPARED, "--set", "dipo.speed=9"], 2, "--speed"),
        (["compare", *COMPARED, "--lr", "fast"], 2, "--lr"),
        (["compare", *COMPARED, "--seed", "1"], 1, "--seed can't be given"),
        (["compare", *COMPARED, "--run-dir", "r"], 1, "--run-dir can't be given"),
        (["compare", *COMPARED, "--run_dir=r"], 1, "--run-dir can't be given"),
        (["compare", *COMPARED, "--runs_dir", "r"], 1, "--runs-dir can't be given"),
        (["compare", *COMPARED, "--set", "dipo.run-dir=r"], 1, "--run-dir can't be given"),
        (["compare", *COMPARED, "--set", "dipo.env=Hopper-v5"], 1, "--env can't be given"),
        (["plot"], 2, "at least one run directory"),
        (["plot", "gone"], 1, "error: there is no run directory gone"),
    ],
)
def test_wrong_arguments(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code(arguments) == code
    captured = capsys.readouterr()
    assert message in captured.out + captured.err
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_complete_run_is_not_resumed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(run)]) == 1
    assert "has done 60 of 60 steps" in capsys.readouterr().err


def test_every_setting_that_may_change_is_an_option_of_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def remember(path: Path, *, console: Any, **changes: Any) -> TrainResult:
        asked.update(changes)
        return TrainResult(tmp_path, 0, True, None, 0.0)

    monkeypatch.setattr(diffcore.cli, "resume", remember)
    options = {
        "total_steps": "70", "device": "cpu", "threads": "1", "eval_interval": "7",
        "log_interval": "3", "checkpoint_minutes": "2.5", "tensorboard": "False",
    }  # fmt: skip
    assert options.keys() == {*RESUMABLE}
    words = [w for name, value in options.items() for w in ("--" + name.replace("_", "-"), value)]
    assert main(["train", "--resume", str(tmp_path), *words]) == 130
    assert {name: str(value) for name, value in asked.items()} == options


TRAIN = [sys.executable, "-m", "diffcore", "train"]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(diffcore.__file__).parents[1]),
}


def start_training(
    path: Path, prefix: Sequence[str] = (), more: Sequence[str] = (), **how: Any
) -> subprocess.Popen[Any]:
    """A process that trains in ``path``, unless ``more`` says otherwise without an end."""
    arguments = ["dipo", *TINY, "--total-steps", "1000000", "--run-dir", str(path), *more]
    return subprocess.Popen([*prefix, *TRAIN, *arguments], env=ENVIRONMENT, cwd=path.parent, **how)


def wait_for_evaluation(process: subprocess.Popen[Any], path: Path) -> None:
    deadline = time.monotonic() + 60
    while not (path / "evaluations.csv").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_saves_and_the_message_says_how_to_go_on(tmp_path: Path) -> None:
    path = tmp_path / "run"
    process = start_training(path, stdout=subprocess.PIPE, text=True)
    try:
        wait_for_evaluation(process, path)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    interrupted = re.search(r"interrupted at step ([\d,]+), saved", output)
    assert interrupted is not None
    assert f"diffcore train --resume {path}" in output

    # In another process the run goes on as if it had never stopped.
    total = str(int(interrupted[1].replace(",", "")) + 40)
    resumed = subprocess.run(
        [*TRAIN, "--resume", str(path), "--total-steps", total],
        env=ENVIRONMENT,
        cwd=tmp_path,
        check=False,
    )
    assert resumed.returncode == 0
    whole = tmp_path / "whole"
    assert main(["train", "dipo", *TINY, "--total-steps", total, "--run-dir", str(whole)]) == 0
    for name in ("progress.csv", "evaluations.csv"):
        assert read_csv(path / name) == read_csv(whole / name)
    weights = [(each / "weights.safetensors").read_bytes() for each in (path, whole)]
    assert weights[0] == weights[1]


def test_a_run_whose_terminal_closes_saves(tmp_path: Path) -> None:
    path = tmp_path / "run"
    ours, terminal = os.openpty()
    name = os.ttyname(terminal)
    # A session's leader that opens a terminal is who is told that it closes.
    shell = ["sh", "-c", f'exec "$@" <{name} >{name} 2>&1', "sh"]

    def be_told() -> None:  # though the tests may run under nohup, which isn't
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    process = start_training(path, shell, start_new_session=True, preexec_fn=be_told)
    try:
        deadline = time.monotonic() + 60
        seen = b""
        while b"/1,000,000" not in seen or not (path / "evaluations.csv").exists():
            assert time.monotonic() < deadline
            seen += os.read(ours, 4096)
        os.close(ours)
        process.wait(timeout=60)
    finally:
        process.kill()
        os.close(terminal)
    rows = read_csv(path / "progress.csv")[1]
    step = load_checkpoint(path / "checkpoint.pt")["step"]
    assert int(rows[-1]["step"]) <= step < int(rows[-1]["step"]) + 7


def test_a_run_goes_on_if_nobody_reads_what_it_prints(tmp_path: Path) -> None:
    path = tmp_path / "run"
    finite = ["--total-steps", "60"]
    process = start_training(path, more=finite, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("run: ")
        process.stdout.close()  # as | head -1 does
        process.wait(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert load_checkpoint(path / "checkpoint.pt")["step"] == 60


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_run_goes_on_if_its_output_finds_no_place(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with Path("/dev/full").open("w") as full:
        process = start_training(path, more=["--total-steps", "60"], stdout=full)
        try:
            process.wait(timeout=60)
        finally:
            process.kill()
    assert load_checkpoint(path / "checkpoint.pt")["step"] == 60
