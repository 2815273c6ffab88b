"""``pytest bench/bench_denoising_update.py``: a training step of a denoiser, by pytest-benchmark."""

from __future__ import annotations

import functools

import pytest
from conftest import TimeVariant
from workloads import VARIANTS, Case, denoising_update_case


@functools.cache
def case() -> Case:
    return denoising_update_case("HalfCheetah-v5", 256, 100)


@pytest.mark.parametrize("name", VARIANTS)
def test_denoising_update(time_variant: TimeVariant, name: str) -> None:
    time_variant(case(), name)
