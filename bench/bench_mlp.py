"""``pytest bench/bench_mlp.py``: forward and backward of a critic, by pytest-benchmark."""

from __future__ import annotations

import functools

import pytest
from conftest import TimeVariant
from workloads import VARIANTS, Case, mlp_case


@functools.cache
def case(batch: int) -> Case:
    return mlp_case("HalfCheetah-v5", batch)


@pytest.mark.parametrize("batch", [1, 16, 256, 4096])
@pytest.mark.parametrize("name", VARIANTS)
def test_mlp(time_variant: TimeVariant, name: str, batch: int) -> None:
    time_variant(case(batch), name)
