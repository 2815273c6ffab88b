"""``pytest bench/bench_critic_update.py``: a training step of a twin critic, by pytest-benchmark."""

from __future__ import annotations

import functools

import pytest
from conftest import TimeVariant
from workloads import VARIANTS, Case, critic_update_case


@functools.cache
def case() -> Case:
    return critic_update_case("HalfCheetah-v5", 256)


@pytest.mark.parametrize("name", VARIANTS)
def test_critic_update(time_variant: TimeVariant, name: str) -> None:
    time_variant(case(), name)
