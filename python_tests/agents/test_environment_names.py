"""The name under which agents look up an environment's defaults."""

from __future__ import annotations

import pytest

from diffcore.agents import DIPOConfig
from diffcore.agents.environment_names import environment_base_name


@pytest.mark.parametrize(
    ("env_id", "name"),
    [
        ("HalfCheetah-v5", "HalfCheetah"),
        ("HalfCheetah", "HalfCheetah"),
        ("HumanoidStandup-v5", "HumanoidStandup"),
        ("diffcore/MultiGoal-v0", "MultiGoal"),
        ("some.module:diffcore/Pendulum-v12", "Pendulum"),
        ("diffcore/Hopper-ET-v0", "Hopper"),
        ("diffcore/Walker-ET-v0", "Walker2d"),
        ("diffcore/Walker-ET-masked-v0", "Walker2d"),
        ("diffcore/SlimHumanoid-ET-v0", "Humanoid"),
        ("diffcore/HalfCheetah-MBBL-v0", "HalfCheetah"),
        ("diffcore/HalfCheetah-MBBL-masked-v0", "HalfCheetah"),
        ("diffcore/HalfCheetah-masked-v0", "HalfCheetah"),
        ("Pendulum-masked", "Pendulum"),
        ("My-masked-Robot-v3", "My-masked-Robot"),  # only endings count
        ("Planet-v0", "Planet"),  # a name that merely ends in the letters
        ("CarRacing-v3", "CarRacing"),
        ("", ""),
    ],
)
def test_base_names(env_id: str, name: str) -> None:
    assert environment_base_name(env_id) == name


@pytest.mark.parametrize(
    ("variant", "task"),
    [
        ("diffcore/Hopper-ET-v0", "Hopper-v5"),
        ("diffcore/Walker-ET-masked-v0", "Walker2d-v5"),
        ("diffcore/Ant-masked-v0", "Ant-v5"),
        ("diffcore/HalfCheetah-MBBL-v0", "HalfCheetah-v5"),
        ("diffcore/Pendulum-masked-v0", "Pendulum-v1"),
    ],
)
def test_a_variant_has_its_tasks_defaults(variant: str, task: str) -> None:
    assert DIPOConfig.for_env(variant) == DIPOConfig.for_env(task) != DIPOConfig()
