"""``pytest bench/bench_reverse_step.py``: one step of the chain, by pytest-benchmark."""

from __future__ import annotations

import functools

import pytest
from conftest import TimeVariant
from workloads import VARIANTS, Case, reverse_step_case


@functools.cache
def case(batch: int) -> Case:
    return reverse_step_case("HalfCheetah-v5", batch)


@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("name", VARIANTS)
def test_reverse_step(time_variant: TimeVariant, name: str, batch: int) -> None:
    time_variant(case(batch), name)
