"""``python bench --profile``: where the time of a training step goes.

DIPO trains in its environment for a while, with the methods of agent, replay and environment timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import eager
import gymnasium
import measure
import numpy as np
import report
import torch
from torch import nn
from workloads import SEED

from diffcore.agents import DIPO, DIPOConfig, optimization
from diffcore.training import ReplayBuffer

START_STEPS = 300
FUNCTIONS = (
    ("gradient norms", optimization, "cut_norm_"),
    ("gradient norms", nn.utils, "clip_grad_norm_"),
)
"""What the library's agent or the eager one calls that is no method of either: part, module, name."""
PARTS = (
    "environment step",
    "action for the environment",
    "replay: add, sample, write back",
    "target actions (the chain)",
    "critic: targets, forward, backward",
    "action gradient",
    "denoising loss: forward, backward",
    "gradient norms",
    "Adam",
    "moving averages",
    "everything else",
)


class Profile:
    """Seconds spent in each part; a part inside another counts for itself only."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.stack: list[str] = []
        self.last = 0.0

    def switch(self) -> None:
        """What has passed since the last switch goes to the innermost part."""
        now = time.perf_counter()
        if self.stack:
            self.seconds[self.stack[-1]] += now - self.last
        self.last = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self.stack.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self.stack.pop()

        return wrapped

    def watch(self, part: str, owner: Any, *names: str) -> None:
        """Time an object's methods."""
        for name in names:
            setattr(owner, name, self.timed(part, getattr(owner, name)))


def watch_agent(profile: Profile, agent: Any) -> None:
    """The parts of DIPO's update, of the library's agent and of the eager one alike."""
    profile.watch("action for the environment", agent, "act")
    profile.watch("target actions (the chain)", agent.actor_target, "sample")
    profile.watch("critic: targets, forward, backward", agent, "update_critic")
    profile.watch("action gradient", agent, "improve_actions")
    profile.watch("denoising loss: forward, backward", agent, "update_actor")
    profile.watch("denoising loss: forward, backward", agent.actor, "loss")
    profile.watch("Adam", agent.critic_optimizer, "step")
    profile.watch("Adam", agent.actor_optimizer, "step")
    profile.watch("moving averages", agent, "update_targets")


def train(env_id: str, steps: int, agent: Any, update: Callable[[Any], object]) -> Profile:
    """Training as in :mod:`diffcore.training.loop`, without evaluation, logs and checkpoints."""
    env: Any = gymnasium.make(env_id)
    high = env.action_space.high
    observation_dim, action_dim = env.observation_space.shape[0], len(high)
    replay = ReplayBuffer(
        START_STEPS + steps, observation_dim, action_dim, bootstrap_truncated=True
    )
    profile = Profile()
    watch_agent(profile, agent)
    profile.watch("environment step", env, "step", "reset")
    profile.watch(
        "replay: add, sample, write back", replay, "add", "sample", "set_best_action"
    )
    originals = [getattr(module, name) for _, module, name in FUNCTIONS]

    observation, _ = env.reset(seed=SEED)

    def step(action: torch.Tensor) -> None:
        nonlocal observation
        state = torch.as_tensor(observation, dtype=torch.float32)[None]
        scaled = action[0].numpy() * high
        following, reward, terminated, truncated, _ = env.step(scaled.astype(np.float32))
        replay.add(
            state,
            action,
            torch.tensor([float(reward)]),
            torch.as_tensor(following, dtype=torch.float32)[None],
            torch.tensor([float(terminated)]),
            torch.tensor([float(truncated)]),
        )
        observation = env.reset()[0] if terminated or truncated else following

    def training_step() -> None:
        state = torch.as_tensor(observation, dtype=torch.float32)[None]
        step(agent.act(state))
        update(replay)

    for _ in range(START_STEPS):
        step(torch.rand(1, action_dim) * 2 - 1)
    for _ in range(measure.WARM_UP_CALLS):
        training_step()
    profile.seconds = dict.fromkeys(PARTS, 0.0)
    for part, module, name in FUNCTIONS:
        profile.watch(part, module, name)
    try:
        whole = profile.timed("everything else", training_step)
        for _ in range(steps):
            whole()
    finally:
        for (_, module, name), original in zip(FUNCTIONS, originals, strict=True):
            setattr(module, name, original)
        env.close()
    return profile


def profiles(
    env_id: str, config: DIPOConfig, rounds: int, steps: int
) -> dict[str, list[dict[str, float]]]:
    """Variant -> milliseconds a step and part, round after round; the variants take turns."""
    env: Any = gymnasium.make(env_id)
    sizes = env.observation_space.shape[0], env.action_space.shape[0]
    env.close()
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        agents: dict[str, tuple[Any, Callable[[Any], object]]] = {}
        for name, dtype in (("diffcore", "float32"), ("diffcore, bf16", "bfloat16")):
            agent = DIPO(*sizes, dataclasses.replace(config, compute_dtype=dtype), seed=SEED)
            act = agent.act
            agent.act = lambda state, act=act: act(state, explore=True)  # type: ignore
            agents[name] = agent, agent.update
        as_written = eager.EagerDIPO(DIPO(*sizes, config, seed=SEED))
        generator = torch.Generator().manual_seed(SEED)
        agents["eager, as written"] = (
            as_written,
            lambda replay, a=as_written, g=generator: a.update(replay, g),
        )
        for name, (an_agent, update) in agents.items():
            profile = train(env_id, steps, an_agent, update)
            in_ms = {part: 1e3 * s / steps for part, s in profile.seconds.items()}
            found.setdefault(name, []).append(in_ms)
    return found


def run(options: argparse.Namespace) -> str:
    """The table, as Markdown."""
    rounds, steps = (1, 2) if options.quick else (3, 6)
    config = DIPOConfig.for_env(options.env)
    if options.quick:
        config = dataclasses.replace(config, diffusion_steps=5)
    found = profiles(options.env, config, rounds, steps)
    medians = {
        name: {part: statistics.median(r[part] for r in profile) for part in PARTS}
        for name, profile in found.items()
    }
    lines = []
    for part in (*PARTS, "a whole step"):
        line = [part]
        for median in medians.values():
            total = sum(median.values())
            ms = median.get(part, total)
            line += [f"{ms:.2f} ms", f"{ms / total:.0%}"]
        lines.append(line)
    header = ["part"] + [h for name in medians for h in (name, "share")]
    return "\n\n".join(
        [
            "# Where the time of a training step goes",
            report.environment_line({**measure.environment(), "env": options.env}),
            report.table(header, lines),
            f"DIPO on {options.env} with the paper's settings: K = {config.diffusion_steps}, batch "
            f"{config.batch_size}, {config.action_gradient_steps} action-gradient steps. One step "
            "is an\naction, a step of the environment and an update. A part inside another counts "
            f"for itself only. Medians of {rounds}\nrounds of {steps} steps.",
        ]
    )
