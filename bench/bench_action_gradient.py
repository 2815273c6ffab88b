"""``pytest bench/bench_action_gradient.py``: the ascent of actions, by pytest-benchmark."""

from __future__ import annotations

import functools

import pytest
from conftest import TimeVariant
from workloads import VARIANTS, Case, action_gradient_case


@functools.cache
def case(batch: int) -> Case:
    return action_gradient_case("HalfCheetah-v5", batch)


@pytest.mark.parametrize("batch", [1, 16, 256, 4096])
@pytest.mark.parametrize("name", VARIANTS)
def test_action_gradient(time_variant: TimeVariant, name: str, batch: int) -> None:
    time_variant(case(batch), name)
