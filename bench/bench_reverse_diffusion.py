"""``pytest bench/bench_reverse_diffusion.py``: the chain, by pytest-benchmark."""

from __future__ import annotations

import functools

import pytest
from conftest import TimeVariant
from workloads import VARIANTS, Case, reverse_diffusion_case


@functools.cache
def case(batch: int, steps: int) -> Case:
    return reverse_diffusion_case("HalfCheetah-v5", batch, steps)


@pytest.mark.parametrize("steps", [20, 100])
@pytest.mark.parametrize("batch", [1, 16, 256, 4096])
@pytest.mark.parametrize("name", VARIANTS)
def test_reverse_diffusion(time_variant: TimeVariant, name: str, batch: int, steps: int) -> None:
    time_variant(case(batch, steps), name)
