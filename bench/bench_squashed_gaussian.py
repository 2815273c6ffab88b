"""``pytest bench/bench_squashed_gaussian.py``: a policy's sample, by pytest-benchmark."""

from __future__ import annotations

import functools

import pytest
from conftest import TimeVariant
from diffsr_workloads import squashed_gaussian_case
from workloads import VARIANTS, Case


@functools.cache
def case(batch: int) -> Case:
    return squashed_gaussian_case("HalfCheetah-v5", batch)


@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("name", VARIANTS)
def test_squashed_gaussian(time_variant: TimeVariant, name: str, batch: int) -> None:
    time_variant(case(batch), name)
