"""Where a run keeps its files.

==================  ==============================================================================
config.json         what was set, and the versions of everything; see ``resumed_config``
progress.csv        training: one row per ``log_interval``
evaluations.csv     one row per evaluation
timing.csv          clock readings; kept apart, so that equal runs have equal CSV files
tensorboard/        all of that for TensorBoard
checkpoint.pt       everything needed to continue
weights.safetensors the policy's weights: at the end, or if the last checkpoint can't be written
==================  ==============================================================================
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from diffcore.training.config import RESUMABLE, TrainConfig, to_dict
from diffcore.training.errors import ConfigError, RunError, WriteError
from diffcore.training.files import write_atomically
from diffcore.training.registry import AgentConfig, agent_name


class RunDirectory:
    """The paths of one run.

    Args:
        path: the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.progress = path / "progress.csv"
        self.evaluations = path / "evaluations.csv"
        self.timing = path / "timing.csv"
        self.tensorboard = path / "tensorboard"
        self.checkpoint = path / "checkpoint.pt"
        self.weights = path / "weights.safetensors"

    @classmethod
    def create(cls, config: TrainConfig, agent_config: AgentConfig) -> RunDirectory:
        """Make a new directory, named after the run, and write config.json into it.

        Raises:
            RunError: if ``config.run_dir`` exists already, or the directory can't be made.
            WriteError: if config.json can't be written; then there is no directory either.
        """
        path = config.run_dir or config.runs_dir / _relative_path(config, agent_config)
        run = cls(_make_directory(path, numbered=config.run_dir is None))
        try:
            run.write_config(config, agent_config)
        except WriteError:
            run.path.rmdir()
            raise
        return run

    @classmethod
    def open(cls, path: Path | str) -> RunDirectory:
        """An existing run.

        Raises:
            RunError: if ``path`` isn't one.
        """
        path = Path(path)
        run = cls(path)
        if not path.is_dir():
            raise RunError(f"there is no run directory {path}")
        if not run.config.is_file():
            raise RunError(f"{path} isn't a run directory: it has no config.json")
        return run

    def write_config(self, config: TrainConfig, agent_config: AgentConfig) -> None:
        """Write config.json."""
        contents = {
            "agent": agent_name(agent_config),
            "train": to_dict(config),
            "agent_config": to_dict(agent_config),
            "command": sys.argv,
            "versions": _versions(),
        }
        text = json.dumps(contents, indent=2) + "\n"
        write_atomically(self.config, lambda file: file.write(text.encode()))

    def read_config(self) -> dict[str, Any]:
        """What config.json holds: ``agent``, ``train`` and ``agent_config`` among others.

        Raises:
            RunError: if it can't be read.
        """
        try:
            contents = json.loads(self.config.read_text())
        except (OSError, ValueError) as error:
            raise RunError(f"can't read {self.config}: {error}") from error
        required = ("agent", "train", "agent_config")
        if not isinstance(contents, dict) or any(key not in contents for key in required):
            raise RunError(f"{self.config} lacks one of {list(required)}")
        for key in ("train", "agent_config"):
            if not isinstance(contents[key], dict):
                got = repr(contents[key])
                raise RunError(f"{self.config}: {key} must be settings by name, got {got}")
        return contents

    def resumed_config(self, saved: TrainConfig, agent_config: AgentConfig) -> TrainConfig:
        """The settings that the run goes on with: ``RESUMABLE`` ones as config.json has them now.

        There they may be newer than in the checkpoint: edited, or set by an earlier resumption that
        ended before it wrote one.

        Args:
            saved, agent_config: the checkpoint's.

        Raises:
            RunError: if config.json can't be read, or differs from the checkpoint in another setting.
        """
        there = self.read_config()
        pairs = [
            ({"agent": there["agent"]}, {"agent": agent_name(agent_config)}),
            (there["train"], to_dict(saved)),
            (there["agent_config"], to_dict(agent_config)),
        ]
        changed: dict[str, Any] = {}
        refused = []
        for ours, checkpoints in pairs:
            kept = json.loads(json.dumps(checkpoints))  # tuples become lists, as in config.json
            for name in sorted(ours):  # one that is missing is from before there was such a setting
                if name in kept and ours[name] == kept[name]:
                    continue
                if name in RESUMABLE and name in kept:
                    changed[name] = ours[name]
                else:
                    refused.append(f"{name} {ours[name]!r} (checkpoint: {kept.get(name)!r})")
        if refused:
            raise RunError(
                f"{self.config} differs from the checkpoint: {', '.join(refused)}. A run goes on "
                f"with the settings it was begun with, all but {', '.join(RESUMABLE)}: put them "
                "back, or train a new run"
            )
        try:
            return dataclasses.replace(saved, **changed)
        except ConfigError as error:
            raise RunError(f"{self.config}: {error}") from error

    def weights_step(self) -> int | None:
        """The step whose weights are exported; None if there are none that can be read."""
        try:
            with safe_open(self.weights, "pt") as file:
                return int(json.loads(file.metadata()["diffcore"])["step"])
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            return None

    def lock(self) -> FileLock:
        """Take the run for this process, until the lock is released.

        Raises:
            RunError: if another process is training in it, or it can't be written to.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RunError(f"another process is training in {self.path}") from error
        except OSError as error:
            raise RunError(f"can't write to the run directory {self.path}: {error}") from error
        return lock


def _make_directory(path: Path, *, numbered: bool) -> Path:
    """Make a new directory, at the first of ``path``, ``path``-2, ``path``-3, ... if ``numbered``.

    Raises:
        RunError: if it exists already, unless ``numbered``, or can't be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"can't make the run directory {path}: {error}") from error
    candidate, number = path, 1
    while True:
        try:
            candidate.mkdir()
            return candidate
        except FileExistsError as error:
            if not numbered:
                raise _in_the_way(path) from error
        except OSError as error:
            raise RunError(f"can't make the run directory {candidate}: {error}") from error
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")


def _in_the_way(path: Path) -> RunError:
    if RunDirectory(path).checkpoint.is_file():
        way_out = f"to go on with that run: diffcore train --resume {path}"
    else:
        way_out = (
            "it holds no checkpoint that could be gone on from: choose another directory or, if no "
            "run is at work in it, remove it"
        )
    return RunError(f"{path} exists already and is never overwritten; {way_out}")


def _relative_path(config: TrainConfig, agent_config: AgentConfig) -> Path:
    time = datetime.now().strftime("%Y%m%d-%H%M%S")
    parts = [agent_name(agent_config), getattr(agent_config, "mode", None), f"s{config.seed}", time]
    return Path(directory_name(config.env)) / "-".join(part for part in parts if part)


def directory_name(env_id: str) -> str:
    """An environment's id as the name of a directory."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", env_id)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("diffcore", "torch", "gymnasium", "mujoco", "numpy", "stable-baselines3"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
