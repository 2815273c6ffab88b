"""Random streams."""

from __future__ import annotations

import random

import numpy as np
import torch

from diffcore.training.seeding import (
    Stream,
    derive_seed,
    preserved_process_random_state,
    seed_process,
)


def draws() -> tuple[float, float, float]:
    return random.random(), np.random.random(), float(torch.rand(()))


def test_streams_differ_and_repeat() -> None:
    seeds = {
        derive_seed(seed, stream, *path)
        for seed in range(5)
        for stream in Stream
        for path in ((), (0,), (1,), (0, 1))
    }
    assert len(seeds) == 5 * len(Stream) * 4
    assert derive_seed(3, Stream.AGENT, 7) == derive_seed(3, Stream.AGENT, 7)


def test_process_wide_generators_are_seeded_and_preserved() -> None:
    with preserved_process_random_state():
        seed_process(1)
        np.random.standard_normal()  # leaves half a Box-Muller pair behind
        expected = (np.random.standard_normal(), *draws())
        seed_process(1)
        np.random.standard_normal()
        with preserved_process_random_state():
            seed_process(2)
            np.random.standard_normal()
            for own, of_another_seed in zip(draws(), expected[1:], strict=True):
                assert own != of_another_seed
        assert (np.random.standard_normal(), *draws()) == expected
