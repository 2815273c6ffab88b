"""``pytest bench/bench_soft_value.py``: the loss of Diff-SR's policy, by pytest-benchmark."""

from __future__ import annotations

import functools

import pytest
from conftest import TimeVariant
from diffsr_workloads import soft_value_case
from workloads import VARIANTS, Case


@functools.cache
def case(batch: int) -> Case:
    return soft_value_case("HalfCheetah-v5", batch)


@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("name", VARIANTS)
def test_soft_value(time_variant: TimeVariant, name: str, batch: int) -> None:
    time_variant(case(batch), name)
