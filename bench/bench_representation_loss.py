"""``pytest bench/bench_representation_loss.py``: psi, zeta, loss and back, by pytest-benchmark."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import TimeVariant
from diffsr_workloads import random_noise, representation_loss_case
from pytest_benchmark.fixture import BenchmarkFixture
from workloads import SEED, SIZES, VARIANTS, Case

from diffcore import ops
from diffcore.agents import DiffSR, DiffSRConfig

ENVS = ["Pendulum-v1", "HalfCheetah-v5"]
BATCH = 256


@functools.cache
def case(env: str) -> Case:
    return representation_loss_case(env, BATCH)


@pytest.mark.parametrize("env", ENVS)
@pytest.mark.parametrize("name", VARIANTS)
def test_representation_loss(time_variant: TimeVariant, name: str, env: str) -> None:
    time_variant(case(env), name)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("env", ENVS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_representation_step(
    benchmark: BenchmarkFixture, backend: str, env: str, compute_dtype: torch.dtype
) -> None:
    """The step inside the loss's kernel, and by itself after it."""
    torch.manual_seed(SEED)
    agent = DiffSR(*SIZES[env], DiffSRConfig.for_env(env), seed=SEED)
    networks = agent.representation.psi.trunk, agent.representation.zeta.trunk
    inputs = [torch.randn(BATCH, network.in_dim) for network in networks]
    inputs += random_noise(BATCH, SIZES[env][0])

    optimizer = agent.representation_optimizer
    options = {"compute_dtype": compute_dtype, "backend": backend}
    benchmark(ops.representation_step, *networks, *inputs, optimizer, **options)
