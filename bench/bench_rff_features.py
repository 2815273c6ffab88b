"""``pytest bench/bench_rff_features.py``: Fourier features and back, by pytest-benchmark."""

from __future__ import annotations

import functools

import pytest
from conftest import TimeVariant
from diffsr_workloads import rff_features_case
from workloads import VARIANTS, Case


@functools.cache
def case() -> Case:
    return rff_features_case(256)


@pytest.mark.parametrize("name", VARIANTS)
def test_rff_features(time_variant: TimeVariant, name: str) -> None:
    time_variant(case(), name)
