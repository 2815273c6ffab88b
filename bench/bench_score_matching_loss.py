"""``pytest bench/bench_score_matching_loss.py``: Diff-SR's loss and back, by pytest-benchmark."""

from __future__ import annotations

import functools

import pytest
from conftest import TimeVariant
from diffsr_workloads import score_matching_loss_case
from workloads import VARIANTS, Case


@functools.cache
def case() -> Case:
    return score_matching_loss_case("HalfCheetah-v5", 256)


@pytest.mark.parametrize("name", VARIANTS)
def test_score_matching_loss(time_variant: TimeVariant, name: str) -> None:
    time_variant(case(), name)
