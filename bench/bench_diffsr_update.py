"""``pytest bench/bench_diffsr_update.py``: a whole update of Diff-SR, by pytest-benchmark."""

from __future__ import annotations

import functools

import pytest
from conftest import TimeVariant
from diffsr_workloads import diffsr_update_case
from workloads import VARIANTS, Case


@functools.cache
def case(env: str, batch: int) -> Case:
    return diffsr_update_case(env, batch)


@pytest.mark.parametrize("batch", [256, 1024])
@pytest.mark.parametrize("env", ["Pendulum-v1", "HalfCheetah-v5", "Humanoid-v4"])
@pytest.mark.parametrize("name", VARIANTS)
def test_diffsr_update(time_variant: TimeVariant, name: str, env: str, batch: int) -> None:
    time_variant(case(env, batch), name)
