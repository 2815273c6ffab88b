"""``pytest bench/bench_representation_loss.py``: psi, zeta, loss and back, by pytest-benchmark."""

from __future__ import annotations

import functools

import pytest
from conftest import TimeVariant
from diffsr_workloads import representation_loss_case
from workloads import VARIANTS, Case


@functools.cache
def case(env: str) -> Case:
    return representation_loss_case(env, 256)


@pytest.mark.parametrize("env", ["Pendulum-v1", "HalfCheetah-v5"])
@pytest.mark.parametrize("name", VARIANTS)
def test_representation_loss(time_variant: TimeVariant, name: str, env: str) -> None:
    time_variant(case(env), name)
