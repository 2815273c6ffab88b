"""The tasks of the benchmark MBBL (arXiv 1907.02057), on Gymnasium's v5 MuJoCo models.

Model-based methods need rewards that are functions of what they observe, so the benchmark rewrote
the rewards of Gym's tasks; later work, Diff-SR among it, reports results on them. Each reward here
is a function of the observation o BEFORE the step and of the action a. For a robot,

    ``r = velocity + height term - 0.1 |a|^2 + alive bonus``,

with the velocity of its root along x. Observations are MuJoCo's qpos without the root's x (Ant,
Humanoid: without x and y), then qvel, neither clipped nor scaled. z is the height of the torso,
``o[0]``. ET, early termination, ends an episode once the robot has fallen; the bonus is paid while
it hasn't.

================  ====  ==========  ==================  =====  ====================================
task              size  velocity    height term         alive  ends unless
================  ====  ==========  ==================  =====  ====================================
HalfCheetah-MBBL  17    o[8]        0                   0      (never ends)
Hopper-ET         11    o[5]        -3 (z - 1.3)^2      1      z > 0.7 and abs(o[1]) < 0.2
Walker-ET         17    o[8]        -3 (z - 1.3)^2      1      0.8 < z < 2.0 and abs(o[1]) < 1.0
Ant-ET            27    o[13]       -3 (z - 0.57)^2     1      0.2 <= z <= 1.0
Humanoid-ET       376   0.25/0.015  0                   5      1.0 <= z <= 2.0
                        * o[22]
SlimHumanoid-ET   45    likewise    0                   5      1.0 <= z <= 2.0
================  ====  ==========  ==================  =====  ====================================

Humanoid-ET observes cinert (140), cvel (84), qfrc_actuator (23) and cfrc_ext (84) too, of all
bodies and joints, and pays for contacts: ``max(-5e-7 |cfrc_ext|^2, -10)``.

The small tasks end only at their time limit:

=======================  =========================================================================
Pendulum-MBBL            ``-cos(theta) - 0.1 |sin(theta)| - 0.1 theta'^2 - 0.001 u^2``, u the torque
CartPole-MBBL            ``cos(theta) - 0.01 x^2``; pushes by 10 N, to the right where a > 0
InvertedPendulum-MBBL    ``-theta^2``
Reacher-MBBL             ``-|fingertip - target| - |a|^2``
=======================  =========================================================================

Definitions are those of the benchmark's code, which the paper's tables abridge. Two need a word.
Pendulum counts theta from the upright position, so its reward is highest where the pendulum
HANGS, at 1 a step: a task of coming to rest, not of swinging up. CartPole sees a continuous action by
its sign only.

What differs from the benchmark as published, which ran MuJoCo 1.5 under Gym 0.9:

- The simulator is today's MuJoCo, and the models are those of Gymnasium's v5: Walker2d's feet have
  the same friction, 1.9 (the right one had 0.9), and Humanoid's model was changed slightly in
  between. Returns are comparable in kind, not to the last digit. Frame skips are the same, and so
  are start distributions, except that Reacher's target lies in a disc (a square).
- cfrc_ext is computed after every step, as MuJoCo 1.5 did, but is 0 in the first observation of an
  episode. Between MuJoCo 2.0 and Gymnasium's v4 it was 0 throughout.
- Actions are those of Gymnasium's action spaces, and the control term sees what it is given:
  nothing is rescaled. (The benchmark hands Pendulum actions in [-1, 1] and multiplies them by the
  largest torque, 2.)
- Pendulum's, CartPole's and InvertedPendulum's episodes have 200, 200 and 100 steps, as the paper
  has it; the code lets one more pass.
- A state that isn't finite counts as fallen.
- Reacher observes the third component of fingertip - target, which v5 left out for being 0.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv
from gymnasium.envs.mujoco.inverted_pendulum_v5 import InvertedPendulumEnv
from gymnasium.envs.mujoco.reacher_v5 import ReacherEnv
from gymnasium.envs.mujoco.walker2d_v5 import Walker2dEnv
from gymnasium.utils import EzPickle, RecordConstructorArgs
from numpy.typing import NDArray

Observation = NDArray[np.float64]
StepResult = tuple[Observation, Any, bool, bool, dict[str, Any]]


class _Task(MujocoEnv, EzPickle):
    """What the MuJoCo tasks share. Comes before one of Gymnasium's classes, which it redefines.

    Args:
        render_mode: as the task's Gymnasium class has it.
        width: of pictures, in pixels.
        height: of pictures, in pixels.
        camera_id: the camera that takes them, by number ...
        camera_name: ... or by name.
    """

    left_out: ClassVar[int] = 0
    """How many of the root's coordinates aren't observed."""
    also_observed: ClassVar[tuple[str, ...]] = ()
    """What is observed beside qpos and qvel, by MuJoCo's names."""

    def __init__(
        self,
        render_mode: str | None = None,
        *,
        width: int = 480,
        height: int = 480,
        camera_id: int | None = None,
        camera_name: str | None = None,
    ) -> None:
        settings: dict[str, Any] = {
            "render_mode": render_mode,
            "width": width,
            "height": height,
            "camera_id": camera_id,
            "camera_name": camera_name,
        }
        super().__init__(**settings)
        EzPickle.__init__(self, **settings)  # copies are made from our arguments, not the parent's
        size = self._get_obs().size
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), dtype=np.float64)
        if hasattr(self, "observation_structure"):  # what the parent has may not be observed here
            self.observation_structure = {
                "skipped_qpos": self.left_out,
                "qpos": self.model.nq - self.left_out,
                "qvel": self.model.nv,
                **{name: getattr(self.data, name).size for name in self.also_observed},
            }

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """One step. ``info`` has the reward's terms."""
        terms = self._reward_terms(self._get_obs(), np.asarray(action, dtype=np.float64))
        self.do_simulation(action, self.frame_skip)
        observation = self._get_obs()
        if self.render_mode == "human":
            self.render()
        return observation, sum(terms.values()), not self._is_up(observation), False, terms

    def _get_obs(self) -> Observation:
        more = [getattr(self.data, name).ravel() for name in self.also_observed]
        return np.concatenate([self.data.qpos[self.left_out :], self.data.qvel, *more])

    def _is_up(self, observation: Observation) -> bool:
        """Whether the episode goes on."""
        return True

    def _reward_terms(self, observation: Observation, action: Observation) -> dict[str, float]:
        """The reward, in parts.

        Args:
            observation: before the step.
            action: of the step.
        """
        raise NotImplementedError


class _Robot(_Task):
    """A robot that is to walk in the direction of x."""

    left_out: ClassVar[int] = 1
    velocity_index: ClassVar[int]
    velocity_weight: ClassVar[float] = 1.0
    target_height: ClassVar[float | None] = None
    """None: any height will do."""
    alive_bonus: ClassVar[float] = 0.0

    def _reward_terms(self, observation: Observation, action: Observation) -> dict[str, float]:
        height_error = 0.0 if self.target_height is None else observation[0] - self.target_height
        return {
            "reward_velocity": self.velocity_weight * float(observation[self.velocity_index]),
            "reward_height": -3.0 * float(height_error) ** 2,
            "reward_control": -0.1 * float(np.square(action).sum()),
            "reward_alive": self.alive_bonus if self._is_up(observation) else 0.0,
        }


class HalfCheetahMBBLEnv(_Robot, HalfCheetahEnv):
    """HalfCheetah-MBBL."""

    velocity_index = 8


class HopperETEnv(_Robot, HopperEnv):
    """Hopper-ET."""

    velocity_index = 5
    target_height = 1.3
    alive_bonus = 1.0

    def _is_up(self, observation: Observation) -> bool:
        z, angle = observation[:2]
        return bool(z > 0.7 and abs(angle) < 0.2)


class WalkerETEnv(_Robot, Walker2dEnv):
    """Walker-ET."""

    velocity_index = 8
    target_height = 1.3
    alive_bonus = 1.0

    def _is_up(self, observation: Observation) -> bool:
        z, angle = observation[:2]
        return bool(0.8 < z < 2.0 and abs(angle) < 1.0)


class AntETEnv(_Robot, AntEnv):
    """Ant-ET."""

    left_out = 2
    velocity_index = 13
    target_height = 0.57
    alive_bonus = 1.0

    def _is_up(self, observation: Observation) -> bool:
        return bool(0.2 <= observation[0] <= 1.0)


class SlimHumanoidETEnv(_Robot, HumanoidEnv):
    """SlimHumanoid-ET: observes qpos and qvel only."""

    left_out = 2
    velocity_index = 22
    velocity_weight = 0.25 / 0.015
    alive_bonus = 5.0

    def _is_up(self, observation: Observation) -> bool:
        return bool(1.0 <= observation[0] <= 2.0)


class HumanoidETEnv(SlimHumanoidETEnv):
    """Humanoid-ET: observes inertias, velocities and forces too, and pays for contacts."""

    also_observed = ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")

    def _reward_terms(self, observation: Observation, action: Observation) -> dict[str, float]:
        contact_forces = observation[-self.data.cfrc_ext.size :]
        contact = max(-5e-7 * float(np.square(contact_forces).sum()), -10.0)
        return {**super()._reward_terms(observation, action), "reward_contact": contact}


class InvertedPendulumMBBLEnv(_Task, InvertedPendulumEnv):
    """InvertedPendulum-MBBL. Observes [x, theta, x', theta']; theta is 0 where the pole is up."""

    def _reward_terms(self, observation: Observation, action: Observation) -> dict[str, float]:
        return {"reward_angle": -(float(observation[1]) ** 2)}


class ReacherMBBLEnv(_Task, ReacherEnv):
    """Reacher-MBBL.

    Observes the cosines and sines of both joints, the target's x and y, both joints' velocities and
    fingertip - target in x, y and z: 11 numbers.
    """

    def _get_obs(self) -> Observation:
        angles = self.data.qpos[:2]
        distance = self.get_body_com("fingertip") - self.get_body_com("target")
        return np.concatenate(
            [np.cos(angles), np.sin(angles), self.data.qpos[2:], self.data.qvel[:2], distance]
        )

    def _reward_terms(self, observation: Observation, action: Observation) -> dict[str, float]:
        return {
            "reward_distance": -float(np.linalg.norm(observation[-3:])),
            "reward_control": -float(np.square(action).sum()),
        }


class PendulumMBBLEnv(PendulumEnv):
    """Pendulum-MBBL: Pendulum-v1 with another reward, highest where the pendulum hangs still.

    Args:
        render_mode: Pendulum's.
    """

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode=render_mode)

    def step(self, u: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step with the torque ``u`` (``[1]``)."""
        theta, velocity = self.state
        torque = float(np.clip(u, -self.max_torque, self.max_torque)[0])
        cost = np.cos(theta) + 0.1 * abs(np.sin(theta)) + 0.1 * velocity**2 + 0.001 * torque**2
        observation, _, terminated, truncated, info = super().step(u)
        return observation, -float(cost), terminated, truncated, info


class CartPoleMBBL(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """CartPole-MBBL: CartPole with a continuous action, that never ends.

    Observes [x, x', theta, theta'], without bounds; the action, in ``[-1, 1]``, pushes to the right
    where it is above 0, else to the left, always by 10 N.

    Args:
        env: Gymnasium's CartPole.
    """

    def __init__(self, env: CartPoleEnv) -> None:
        RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), dtype=np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), dtype=np.float32)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step with ``action`` (``[1]``)."""
        cart: Any = self.env
        x, _, theta, _ = cart.state
        reward = float(np.cos(theta) - 0.01 * x**2)
        cart.steps_beyond_terminated = None  # what ends CartPole's episodes doesn't end these
        observation, *_, info = cart.step(int(action[0] > 0))
        return observation, reward, False, False, info


def make_cartpole(render_mode: str | None = None) -> CartPoleMBBL:
    """What CartPole-MBBL is registered with."""
    return CartPoleMBBL(CartPoleEnv(render_mode=render_mode))
