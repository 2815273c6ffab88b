"""Environments of our own. Importing this package registers them with Gymnasium.

>>> import gymnasium, diffcore.envs
>>> env = gymnasium.make("diffcore/MultiGoal-v0")

Beside the toy there are the tasks of the MBBL benchmark (:mod:`diffcore.envs.mbbl`), and variants
with hidden velocities (:mod:`diffcore.envs.partial_observability`) of these and of Gymnasium's.
``docs/environments.md`` lists them all.
"""

import gymnasium

from diffcore.envs.multigoal import MultiGoalEnv
from diffcore.envs.partial_observability import (
    HistoryObservation,
    MaskObservation,
    velocity_indices,
)

__all__ = ["HistoryObservation", "MaskObservation", "MultiGoalEnv", "velocity_indices"]

gymnasium.register(
    id="diffcore/MultiGoal-v0",
    entry_point="diffcore.envs.multigoal:MultiGoalEnv",
    max_episode_steps=30,
)

_MBBL = {  # task: (what makes it, steps of an episode)
    "HalfCheetah-MBBL": ("HalfCheetahMBBLEnv", 1000),
    "Hopper-ET": ("HopperETEnv", 1000),
    "Walker-ET": ("WalkerETEnv", 1000),
    "Ant-ET": ("AntETEnv", 1000),
    "Humanoid-ET": ("HumanoidETEnv", 1000),
    "SlimHumanoid-ET": ("SlimHumanoidETEnv", 1000),
    "Pendulum-MBBL": ("PendulumMBBLEnv", 200),
    "CartPole-MBBL": ("make_cartpole", 200),
    "InvertedPendulum-MBBL": ("InvertedPendulumMBBLEnv", 100),
    "Reacher-MBBL": ("ReacherMBBLEnv", 50),
}
for _task, (_entry, _steps) in _MBBL.items():
    gymnasium.register(
        id=f"diffcore/{_task}-v0",
        entry_point=f"diffcore.envs.mbbl:{_entry}",
        max_episode_steps=_steps,
    )

_GYMNASIUM = {  # task: its id there
    "HalfCheetah": "HalfCheetah-v5",
    "Hopper": "Hopper-v5",
    "Walker2d": "Walker2d-v5",
    "Ant": "Ant-v5",
    "Humanoid": "Humanoid-v5",
    "HumanoidStandup": "HumanoidStandup-v5",
    "Swimmer": "Swimmer-v5",
    "InvertedPendulum": "InvertedPendulum-v5",
    "InvertedDoublePendulum": "InvertedDoublePendulum-v5",
    "Reacher": "Reacher-v5",
    "Pusher": "Pusher-v5",
    "Pendulum": "Pendulum-v1",
}
for _task, _base in {**_GYMNASIUM, **{task: f"diffcore/{task}-v0" for task in _MBBL}}.items():
    gymnasium.register(
        id=f"diffcore/{_task}-masked-v0",
        entry_point="diffcore.envs.partial_observability:make_masked",
        max_episode_steps=gymnasium.spec(_base).max_episode_steps,
        kwargs={"base": _base},
    )
