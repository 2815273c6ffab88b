"""Fixtures for tests of everything above the agents."""

from __future__ import annotations

import io
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from rich.console import Console
from tiny import CountingEnv, TinyAgent

from diffcore.training import AGENTS, TrainConfig, Trainer


@pytest.fixture(autouse=True)
def tiny_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the tiny agent known under the name "tiny"."""
    monkeypatch.setitem(AGENTS, "tiny", TinyAgent)


@pytest.fixture
def register_env() -> Any:
    """Registers environments for the length of a test: ``register_env(entry_point, **kwargs)``."""
    ids: list[str] = []

    def register(entry_point: Callable[..., Any], **kwargs: Any) -> str:
        env_id = f"diffcore-test-{len(ids)}-v0"
        gym.register(id=env_id, entry_point=entry_point, **kwargs)
        ids.append(env_id)
        return env_id

    yield register
    for env_id in ids:
        del gym.registry[env_id]


@pytest.fixture
def counting_env(register_env: Any) -> str:
    """The id of :class:`CountingEnv`, with episodes of three steps that terminate."""
    return str(register_env(CountingEnv, max_episode_steps=100))


@pytest.fixture
def output() -> io.StringIO:
    """What a run printed to :func:`console`."""
    return io.StringIO()


@pytest.fixture
def console(output: io.StringIO) -> Console:
    return Console(file=output, width=200)


@pytest.fixture
def tiny_run(tmp_path: Path) -> Callable[..., TrainConfig]:
    """A short run: ``tiny_run(name, **changes)``, written to ``tmp_path / name``."""

    def make(name: str = "run", **changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "env": "Pendulum-v1",
            "total_steps": 60,
            "max_episode_steps": 25,
            "eval_interval": 20,
            "eval_episodes": 2,
            "log_interval": 7,
            "tensorboard": False,
            "run_dir": tmp_path / name,
        }
        return TrainConfig(**{**settings, **changes})

    return make


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``signal_at(step, number=SIGINT)``: send the process a signal when a run reaches ``step``."""

    def arrange(step: int, number: signal.Signals = signal.SIGINT) -> None:
        advance = Trainer.advance

        def advance_and_signal(trainer: Trainer) -> list[float]:
            returns = advance(trainer)
            if trainer.step == step:
                os.kill(os.getpid(), number)
            return returns

        monkeypatch.setattr(Trainer, "advance", advance_and_signal)

    return arrange


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; only root can make one."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(directory)]
    try:
        made = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        made = False
    if not made:
        pytest.skip("can't mount a file system here")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)
