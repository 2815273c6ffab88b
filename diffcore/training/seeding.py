"""Independent random streams from one seed, and the process-wide random states.

Nothing in training draws from a process-wide generator, but a user's environment may. So these are
seeded at the start, saved in checkpoints, and put back after an evaluation.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import numpy as np
import torch


class Stream(IntEnum):
    """What a stream of random numbers is for. The values are part of a run's reproducibility."""

    PROCESS = 0
    AGENT = 1
    TRAINING_ENVIRONMENT = 2
    RANDOM_ACTIONS = 3
    EVALUATION_ENVIRONMENT = 4
    EVALUATION_POLICY = 5
    RESUMED_ENVIRONMENT = 6


def derive_seed(seed: int, stream: Stream, *path: int) -> int:
    """A 32-bit seed that depends on all arguments.

    Args:
        seed: the run's seed, at least 0.
        stream: what it is for.
        path: further numbers, such as a step or an environment's index.
    """
    # As a spawn key, since in the entropy trailing zeros would make no difference.
    sequence = np.random.SeedSequence(seed, spawn_key=(int(stream), *path))
    return int(sequence.generate_state(1)[0])


def seed_process(seed: int) -> None:
    """Seed the process-wide generators of Python, numpy and torch."""
    value = derive_seed(seed, Stream.PROCESS)
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def process_random_state() -> dict[str, Any]:
    """The process-wide random states, as plain data and tensors."""
    name, key, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(key).copy()), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_process_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`process_random_state` returned."""
    random.setstate(state["python"])
    name, key, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, key.numpy(), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def preserved_process_random_state() -> Iterator[None]:
    """Leave the process-wide random states as they were, whatever the block draws."""
    state = process_random_state()
    try:
        yield
    finally:
        restore_process_random_state(state)
