"""Environments of our own. Importing this package registers them with Gymnasium.

>>> import gymnasium, diffcore.envs
>>> env = gymnasium.make("diffcore/MultiGoal-v0")
"""

import gymnasium

from diffcore.envs.multigoal import MultiGoalEnv

__all__ = ["MultiGoalEnv"]

gymnasium.register(
    id="diffcore/MultiGoal-v0",
    entry_point="diffcore.envs.multigoal:MultiGoalEnv",
    max_episode_steps=30,
)
