"""``python bench --memory``: leaks over many calls of every op, and the peak of a training step."""

from __future__ import annotations

import argparse
import gc
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eager
import eager_diffsr
import measure
import report
import torch
from torch import Tensor, nn
from workloads import SEED, SIZES, change_weights, random_replay

from diffcore import DiffusionSchedule, ops
from diffcore.agents import DIPO, DiffSR, DiffSRConfig, DIPOConfig
from diffcore.nn import MLP, Denoiser, Psi, SquashedGaussian, TwinCritic, TwinRFFCritic
from diffcore.ops import _native

MOST_CALLS = 1_000_000
NEW_WEIGHTS_EVERY, NEW_NETWORK_EVERY = 16, 1024
KEPT_PACKS = 2**20  # bytes: of so few the cache is full before growth is counted
STEPS = 3
MIB = 2**20


# -- leaks ----------------------------------------------------------------------------------------


def tiny_calls() -> dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object]]]:
    """Op -> (makes a tiny network, one call of the op on it at batch 1)."""
    torch.manual_seed(SEED)
    schedule = DiffusionSchedule.cosine(2)
    state, action = torch.randn(1, 2), torch.rand(1, 1) * 2 - 1
    coefficients = schedule.solver("ddpm").coefficients[0].float()
    psi, hidden = torch.randn(1, 3), torch.randn(1, 4)
    t = torch.zeros(1, dtype=torch.int64)
    tiny = {"hidden_dim": 8, "hidden_layers": 1}

    def gradients(loss: Tensor, module: nn.Module) -> object:
        return torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])

    def without_gradients(call: Callable[[nn.Module], object]) -> Callable[[nn.Module], object]:
        return torch.no_grad()(call)

    def denoiser() -> nn.Module:
        return Denoiser(2, 1, **tiny)

    def critic() -> nn.Module:
        return TwinCritic(2, 1, **tiny)

    def layer() -> nn.Module:
        return nn.Linear(4, 6)

    def mlp() -> nn.Module:
        return MLP(2, 8, 2, 1)

    def judged_policy() -> nn.Module:
        judges = nn.ModuleList([Psi(2, 1, 3, 8), TwinRFFCritic(3, 8)]).requires_grad_(False)
        return nn.ModuleList([SquashedGaussian(2, 1, 8), *judges])

    def networks() -> nn.Module:
        return nn.ModuleList([MLP(2, 8, 3, 1), MLP(4, 8, 3 * 2, 1)])

    def networks_with_adam() -> nn.Module:
        module = networks()
        module.optimizer = torch.optim.Adam(module.parameters())  # type: ignore[assignment]
        return module

    def critics_loss(module: nn.Module) -> Tensor:
        x = torch.cat([state, action], dim=1)
        networks = [list(q.parameters()) for q in (module.q1, module.q2)]
        return ops.critic_loss(x, networks, module.q1.activations, action)[0]

    def policy_sample(module: nn.Module) -> Tensor:
        parameters = list(module.parameters())
        layers = parameters[::2], parameters[1::2], module.activations
        sample, log_prob = ops.squashed_gaussian(state, *layers, action)
        return sample.sum() + log_prob.sum()

    def policy_loss(module: nn.Module) -> Tensor:
        return ops.soft_value(*module, state, action, torch.ones(()))[0]

    def rff(module: nn.Module) -> Tensor:
        return ops.rff_features(hidden, module.weight, module.bias)

    def score(module: nn.Module) -> Tensor:
        return ops.score_matching_loss(
            psi, hidden, module.weight, module.bias, state, torch.ones(1)
        )

    def representation(module: nn.Module) -> Tensor:
        return ops.representation_loss(*module, state, hidden, state, torch.ones(1))

    def step(module: nn.Module) -> object:
        inputs = state, hidden, state, torch.ones(1)
        return ops.representation_step(*module, *inputs, module.optimizer)

    return {
        "reverse_diffusion": (
            denoiser,
            without_gradients(lambda m: ops.reverse_diffusion(m, schedule, state)),
        ),
        "reverse_diffusion, backward": (
            denoiser,
            lambda m: gradients(ops.reverse_diffusion(m, schedule, state).sum(), m),
        ),
        "reverse_step": (
            nn.Identity,
            lambda m: ops.reverse_step(action, action, coefficients, noise=action),
        ),
        "q_sample": (nn.Identity, lambda m: ops.q_sample(action, t, action, schedule)),
        "action_gradient": (
            critic,
            lambda m: ops.action_gradient(m, state, action, steps=2, max_norm=0.1),
        ),
        "mlp": (mlp, without_gradients(lambda m: m(state))),
        "mlp, backward": (mlp, lambda m: gradients(m(state).sum(), m)),
        "mlp_ensemble": (critic, without_gradients(lambda m: m(state, action))),
        "mlp_ensemble, backward": (critic, lambda m: gradients(sum(m(state, action)).sum(), m)),
        "critic_loss": (critic, without_gradients(critics_loss)),
        "critic_loss, backward": (critic, lambda m: gradients(critics_loss(m), m)),
        "squashed_gaussian": (mlp, without_gradients(policy_sample)),
        "squashed_gaussian, backward": (mlp, lambda m: gradients(policy_sample(m), m)),
        "soft_value": (judged_policy, without_gradients(policy_loss)),
        "soft_value, backward": (judged_policy, lambda m: gradients(policy_loss(m), m)),
        "denoising_loss": (
            denoiser,
            without_gradients(lambda m: ops.denoising_loss(m, schedule, state, action)),
        ),
        "denoising_loss, backward": (
            denoiser,
            lambda m: gradients(ops.denoising_loss(m, schedule, state, action), m),
        ),
        "rff_features": (layer, without_gradients(rff)),
        "rff_features, backward": (layer, lambda m: gradients(rff(m).sum(), m)),
        "score_matching_loss": (layer, without_gradients(score)),
        "score_matching_loss, backward": (layer, lambda m: gradients(score(m), m)),
        "representation_loss": (networks, without_gradients(representation)),
        "representation_loss, backward": (networks, lambda m: gradients(representation(m), m)),
        "representation_step": (networks_with_adam, step),
    }


def resident() -> int:
    """Bytes of this process that lie in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def growth(
    make: Callable[[], nn.Module], call: Callable[[nn.Module], object], seconds: float, every: int
) -> tuple[int, int, int]:
    """(calls made, bytes by which resident memory grew until half time, and until the end).

    The weights change now and then, and the network ``every`` so many calls: what is kept for one
    must go.
    """
    module = make()
    calls = 0

    def go_on(until: float, most: int) -> None:
        nonlocal module, calls
        while True:
            for _ in range(every // NEW_WEIGHTS_EVERY):
                for _ in range(NEW_WEIGHTS_EVERY):
                    call(module)
                change_weights(module)
            calls += every
            module = make()
            if calls >= most or time.perf_counter() > until:
                break

    go_on(time.perf_counter() + 0.2 * seconds, MOST_CALLS // 5)  # until the caches are full
    gc.collect()
    before, calls, started = resident(), 0, time.perf_counter()
    go_on(started + seconds / 2, MOST_CALLS // 2)
    gc.collect()
    half = resident() - before
    go_on(started + seconds, MOST_CALLS)
    gc.collect()
    return calls, half, resident() - before


# -- peak -----------------------------------------------------------------------------------------


def reset_peak() -> None:
    """Let the highest resident size be counted anew from here (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Highest resident size in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def dipo_step(env: str) -> Callable[[], object]:
    state_dim, action_dim = SIZES[env]
    agent = DIPO(state_dim, action_dim, DIPOConfig.for_env(env), seed=SEED)
    replay = random_replay(state_dim, action_dim)
    return lambda: agent.update(replay)


def eager_dipo_step(env: str) -> Callable[[], object]:
    state_dim, action_dim = SIZES[env]
    agent = DIPO(state_dim, action_dim, DIPOConfig.for_env(env), seed=SEED)
    as_written = eager.EagerDIPO(agent)
    replay = random_replay(state_dim, action_dim)
    generator = torch.Generator().manual_seed(SEED)
    return lambda: as_written.update(replay, generator)


def diffsr_agent(env: str) -> tuple[DiffSR, Any]:
    agent = DiffSR(*SIZES[env], DiffSRConfig.for_env(env), seed=SEED)
    return agent, random_replay(*SIZES[env])


def diffsr_step(env: str) -> Callable[[], object]:
    agent, replay = diffsr_agent(env)
    return lambda: agent.update(replay)


def eager_diffsr_step(env: str) -> Callable[[], object]:
    agent, replay = diffsr_agent(env)
    as_written = eager_diffsr.EagerDiffSR(agent)
    generator = torch.Generator().manual_seed(SEED)
    return lambda: as_written.update(replay, generator)


LARGEST = "Humanoid-v4"
"""Whose 376 numbers Diff-SR's peak is measured with."""
PEAKS: dict[str, tuple[Callable[[str], Callable[[], object]], str | None]] = {
    "DIPO, diffcore": (dipo_step, None),
    "DIPO, eager as written": (eager_dipo_step, None),
    "Diff-SR on Humanoid, diffcore": (diffsr_step, LARGEST),
    "Diff-SR on Humanoid, eager as written": (eager_diffsr_step, LARGEST),
}


def print_peak(name: str, env: str) -> None:
    """In a process of its own: bytes before the first step, and those that steps add at most."""
    make, own_env = PEAKS[name]
    step = make(own_env or env)
    gc.collect()
    before = resident()
    reset_peak()
    for _ in range(STEPS):
        step()
    print(before, peak() - before)


def peak_in_child(name: str, env: str) -> tuple[int, int]:
    code = f"import memory_report; memory_report.print_peak({name!r}, {env!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},  # this process's diffcore
        capture_output=True,
        text=True,
        check=True,
    )
    before, added = done.stdout.split()
    return int(before), int(added)


def run(options: argparse.Namespace) -> str:
    """Both tables, as Markdown."""
    every = NEW_NETWORK_EVERY // 16 if options.quick else NEW_NETWORK_EVERY
    leaks = []
    _native._core.set_pack_budget(KEPT_PACKS)
    for name, (make, call) in tiny_calls().items():
        calls, half, grown = growth(make, call, options.seconds, every)
        # A leak would show in the second half too, when every cache is as full as it gets.
        late = (grown - half) / MIB
        per_million = late / (calls / 2) * 1e6
        figures = (f"{g:.2f} MiB" for g in (grown / MIB, late, per_million))
        leaks.append([name, f"{calls:,}", *figures])
    peaks = []
    for name in list(PEAKS)[: 1 if options.quick else None]:
        before, added = peak_in_child(name, options.env)
        peaks.append([f"update of {name}", f"{before / MIB:.0f} MiB", f"{added / MIB:.0f} MiB"])
    return "\n\n".join(
        [
            "# Memory",
            report.environment_line({**measure.environment(), "env": options.env}),
            "## Many calls of every op",
            report.table(
                ["op", "calls", "growth", "in the second half", "that is, per million calls"], leaks
            ),
            "Growth of the process's resident memory, at batch 1 on tiny networks. Weights change "
            f"every {NEW_WEIGHTS_EVERY} calls,\nthe network every {every:,}. The last "
            "column carries the second half on to a million calls: a single page\ncounts for "
            "much there when the calls were few. Packed weights may take 1 MiB here, so that their\n"
            "cache is full before growth is counted; elsewhere they may take 256 MiB, those of "
            "networks that are gone too.",
            "## Peak of a training step",
            report.table(["work", "before the first step", "added by steps at most"], peaks),
            f"Resident memory of a process that makes {STEPS} updates, batch 256. The first column "
            "is what Python, torch, networks\nand replay take; the second has the gradients and "
            "Adam's moments in it, which are no smaller in eager code.",
        ]
    )
