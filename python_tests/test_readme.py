"""Examples in README and docs/training.md run, and README's command lines are valid ones."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import tyro

from diffcore import cli
from diffcore.agents import DIPO, DiffSR, DiffSRConfig, DIPOConfig
from diffcore.training import ReplayBuffer, TrainConfig, train

README = Path(__file__).parent.parent / "README.md"
TRAINING = README.parent / "docs" / "training.md"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def command_lines() -> list[list[str]]:
    joined = [block.replace("\\\n", " ") for block in blocks(README, "sh")]
    lines = [shlex.split(line, comments=True) for block in joined for line in block.splitlines()]
    return [line[1:] for line in lines if line[:1] == ["diffcore"]]


@pytest.fixture
def run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place with a finished run in runs/my-run, as README assumes it."""
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(
        "Pendulum-v1",
        total_steps=12,
        eval_interval=12,
        eval_episodes=1,
        max_episode_steps=5,
        tensorboard=False,
        run_dir=Path("runs/my-run"),
    )
    agent_config = DIPOConfig(start_steps=10, batch_size=4, diffusion_steps=3, buffer_size=100)
    train(config, agent_config)


@pytest.mark.usefixtures("run_directory")
@pytest.mark.parametrize(("page", "least"), [(README, 7), (TRAINING, 8)], ids=["README", "training"])
def test_examples_run_in_order(page: Path, least: int) -> None:
    examples = blocks(page, "python")
    assert len(examples) >= least
    names: dict[str, object] = {}
    threads = torch.get_num_threads()
    try:
        for example in examples:
            exec(compile(example, str(page), "exec"), names)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("line", command_lines(), ids=" ".join)
def test_command_lines_are_valid(line: list[str]) -> None:
    command, *arguments = line
    if command == "train" and arguments[0] == "--resume":
        tyro.cli(cli.ResumeArguments, args=arguments)
    elif command == "train":
        cli.parse_training(arguments[0], arguments[1:])
    elif command == "compare":
        cli.parse_comparison(arguments)
    elif command == "evaluate":
        tyro.cli(cli.EvaluateArguments, args=arguments)
    else:
        assert command == "plot"
        tyro.cli(cli.PlotArguments, args=arguments)


@pytest.mark.parametrize(
    "agent",
    [
        DIPO(3, 1, DIPOConfig(diffusion_steps=2, hidden_dim=8, batch_size=4), seed=0),
        DiffSR(3, 1, DiffSRConfig(batch_size=4, bonus="elliptical", gram_weight=0.1), seed=0),
    ],
    ids=lambda agent: agent.name,
)
def test_every_metric_is_explained(agent: DIPO | DiffSR) -> None:
    replay = ReplayBuffer(4, 3, 1, bootstrap_truncated=True)
    rows = [torch.zeros(4, width) for width in (3, 1)]
    replay.add(*rows, torch.zeros(4), rows[0], torch.zeros(4), torch.zeros(4))
    section = TRAINING.read_text().split("\n## ")[2]
    assert section.startswith("What a run writes")
    assert {name for name in agent.update(replay) if f"`{name}`" not in section} == set()


def test_relative_paths_exist() -> None:
    text = README.read_text()
    paths = re.findall(r"`((?:scripts|docs|diffcore|python_tests|bench|\.ci)/[\w./-]+)", text)
    paths += re.findall(r"^(scripts/\w+\.sh)", text, re.MULTILINE)
    assert paths
    for path in paths:
        assert (README.parent / path).exists(), path
