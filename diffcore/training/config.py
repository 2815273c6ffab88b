"""What can be set about a training run, beside the agent's own hyper-parameters."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args, get_type_hints

from tyro.constructors import PrimitiveConstructorSpec

from diffcore.training.errors import ConfigError

C = TypeVar("C")

# How the command line reads a dict.
_JSON: PrimitiveConstructorSpec[dict[str, Any]] = PrimitiveConstructorSpec(
    nargs=1,
    metavar="JSON",
    instance_from_str=lambda words: cast("dict[str, Any]", json.loads(words[0])),
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [json.dumps(value)],
)


@dataclass(frozen=True)
class TrainConfig:
    """The training run.

    Raises:
        ConfigError: if a value lies outside its range.
    """

    env: str
    """Gymnasium id. Your own: "module:Id", where importing the module registers the id."""
    seed: int = 0
    """Seed of everything random."""
    total_steps: int = 1_000_000
    """Environment steps to train for, summed over the environments."""
    num_envs: int = 1
    """Environments stepped together, in this process."""
    max_episode_steps: int | None = None
    """Time limit of an episode. None keeps the environment's own."""
    env_kwargs: Annotated[dict[str, Any], _JSON] = field(default_factory=dict, hash=False)
    """Arguments for the environment, as JSON: {"mass": 2.0}."""
    updates_per_step: float = 1.0
    """Agent updates per environment step, once the random start is over."""
    device: str = "cpu"
    """Torch device of the agent and its replay buffer, such as cpu or cuda."""
    threads: int | None = None
    """Torch's CPU threads while the run lasts. None leaves torch's choice."""
    eval_interval: int = 10_000
    """Environment steps between evaluations. The last step is always evaluated."""
    eval_episodes: int = 10
    """Episodes per evaluation."""
    eval_deterministic: bool = False
    """Evaluate with a deterministic policy, instead of the agent's usual evaluation form."""
    log_interval: int = 1_000
    """Environment steps between rows of progress.csv."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints. One is always written at the end, at Ctrl-C and at a hangup."""
    tensorboard: bool = True
    """Write TensorBoard logs too."""
    runs_dir: Path = Path("runs")
    """The run is written to RUNS_DIR/ENV/AGENT-MODE-sSEED-TIME."""
    run_dir: Path | None = None
    """Write the run to this new directory instead."""

    def __post_init__(self) -> None:
        for name in ("runs_dir", "run_dir"):
            value = getattr(self, name)
            if isinstance(value, str) and value:
                object.__setattr__(self, name, Path(value))
            elif value is not None and not isinstance(value, Path):
                raise ConfigError(f"{name} must be a path, got {value!r}")
        if not isinstance(self.env, str):
            raise ConfigError(
                f"env must be the id of an environment, got {self.env!r}; a class of your own gets "
                "an id by gymnasium.register('MyEnv-v0', entry_point=MyEnv)"
            )
        if not self.env:
            raise ConfigError("env must be the id of an environment, got an empty string")
        object.__setattr__(self, "env_kwargs", _as_json_object("env_kwargs", self.env_kwargs))
        _check_integer("seed", self.seed, at_least=0)
        for name in ("total_steps", "num_envs", "eval_interval", "eval_episodes", "log_interval"):
            _check_integer(name, getattr(self, name), at_least=1)
        for name in ("threads", "max_episode_steps"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), at_least=1)
        for name in ("eval_deterministic", "tensorboard"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        _check_number("updates_per_step", self.updates_per_step, at_least=0.0)
        _check_number("checkpoint_minutes", self.checkpoint_minutes, at_least=0.0)


RESUMABLE = (
    "total_steps",
    "device",
    "threads",
    "eval_interval",
    "log_interval",
    "checkpoint_minutes",
    "tensorboard",
)
"""The settings that may be others when a run is resumed. The rest is what the run is a run of."""


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain data, fit for JSON and for a checkpoint."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(config).items()
    }


def from_dict(config_type: type[C], values: dict[str, Any]) -> C:
    """The inverse of :func:`to_dict`.

    Raises:
        ConfigError: if fields are missing, unknown or out of range.
    """
    types = get_type_hints(config_type)
    unknown = sorted(values.keys() - types.keys())
    if unknown:
        raise ConfigError(f"{config_type.__name__} has no fields {unknown}")
    converted = {
        name: Path(value) if value is not None and _holds_path(types[name]) else value
        for name, value in values.items()
    }
    try:
        return config_type(**converted)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"not a {config_type.__name__}: {error}") from error


def _holds_path(annotation: Any) -> bool:
    return Path in (annotation, *get_args(annotation))


def _as_json_object(name: str, value: object) -> dict[str, Any]:
    """A copy of ``value`` as it comes back from config.json: with lists for tuples."""
    try:
        copy = json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must hold what JSON can hold, got {value!r}: {error}") from error
    if not isinstance(value, dict) or not _has_names_for_keys(value):
        raise ConfigError(f"{name} must be a dict with names for keys, got {value!r}")
    return cast("dict[str, Any]", copy)


def _has_names_for_keys(value: object) -> bool:
    """Whether JSON keeps the keys of all dicts in ``value``; it would make texts of numbers."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and _has_names_for_keys(v) for k, v in value.items())
    return not isinstance(value, (list, tuple)) or all(map(_has_names_for_keys, value))


def _check_integer(name: str, value: object, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be an integer, got {type(value).__name__} {value!r}")
    if value < at_least:
        raise ConfigError(f"{name} must be at least {at_least}, got {value}")


def _check_number(name: str, value: object, *, at_least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    if not (math.isfinite(value) and value >= at_least):
        raise ConfigError(f"{name} must be finite and at least {at_least:g}, got {value}")
