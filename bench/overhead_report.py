"""``python bench --overhead``: what a call of an op costs beside its kernel, at batch 1.

Every public call is timed as it is, and again with the compiled module wrapped, which says how long
the call was inside it; without the noise drawn; and after a change of all weights. The fingerprint,
by which a call sees whether its packed weights are still right, is timed by itself on the same
weights. The kernel is what is left.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import random
import statistics
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import measure
import report
import torch
from diffsr_workloads import FEATURES, RANDOM_FEATURES, ZETA_HIDDEN
from torch import nn
from workloads import SEED, SIZES, change_weights

from diffcore import DiffusionSchedule, ops
from diffcore.nn import Denoiser, TwinCritic
from diffcore.ops import _backends, _native, _philox

GOAL = 0.15
"""Share of the call that all but the kernel may take in a chain of 100 steps and in the action
gradient, on weights that stay as they are."""


@dataclass(frozen=True)
class Call:
    """A public call at batch 1."""

    name: str
    call: Callable[[nn.Module], object]
    module: nn.Module
    given: Callable[[nn.Module], object] | None = None
    """The same with the noise given, for an op that draws it."""
    threads: int = 1
    """How many read the weights."""


class Stopwatch:
    """Stands in for the compiled module and adds up the seconds that calls spend in it."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.inside = 0.0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.core, name)
        if not isinstance(value, types.BuiltinFunctionType):
            return value

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = value(*arguments)
            self.inside += time.perf_counter() - start
            return result

        return timed


@contextlib.contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """The compiled module, wrapped for the ops meanwhile.

    They call it on the way that all backends share: an ordinary call may be one of the compiled
    module's altogether, in which nobody sees where the kernel begins.
    """
    core, watch, straight = _native._core, Stopwatch(_native._core), _backends.may_go_straight
    _native._core, _backends.may_go_straight = watch, lambda *_: False
    try:
        yield watch
    finally:
        _native._core, _backends.may_go_straight = core, straight


def calls(env: str) -> list[Call]:
    torch.manual_seed(SEED)
    state_dim, action_dim = SIZES[env]
    denoiser, critic = Denoiser(state_dim, action_dim), TwinCritic(state_dim, action_dim)
    state, action = torch.randn(1, state_dim), torch.rand(1, action_dim) * 2 - 1
    x = torch.cat([state, action], dim=1)
    psi = torch.randn(1, FEATURES)
    threads = _native._core.team_threads(torch.get_num_threads())

    def chain(steps: int) -> Call:
        schedule = DiffusionSchedule.cosine(steps)
        given = {"x_init": torch.randn(1, action_dim), "noise": torch.randn(steps, 1, action_dim)}
        return Call(
            f"reverse_diffusion, {steps} steps",
            lambda model: ops.reverse_diffusion(model, schedule, state),
            denoiser,
            lambda model: ops.reverse_diffusion(model, schedule, state, **given),
            threads,
        )

    def ascent(model: nn.Module) -> object:
        return ops.action_gradient(model, state, action, max_norm=0.1 * action_dim)

    schedule = DiffusionSchedule.cosine(100)
    given = {"t": torch.tensor([50]), "noise": torch.randn(1, action_dim)}
    denoising = Call(
        "denoising_loss, forward",
        lambda model: ops.denoising_loss(model, schedule, state, action),
        denoiser,
        lambda model: ops.denoising_loss(model, schedule, state, action, **given),
    )
    target = torch.randn(1, 1)
    hidden, offset, level = torch.randn(1, ZETA_HIDDEN), torch.randn(1, state_dim), torch.rand(1)
    noise, coefficients = torch.randn(1, action_dim), schedule.solver("ddpm").coefficients[0]

    def score_matching(last_layer: nn.Module) -> object:
        rows = psi, hidden, last_layer.weight, last_layer.bias, offset, level
        return ops.score_matching_loss(*rows)

    return [
        chain(100),
        chain(20),
        Call("action_gradient, 20 steps", ascent, critic, threads=threads),
        Call("mlp, forward", lambda model: model(x), critic.q1),
        Call(
            "rff_features, forward",
            lambda layer: ops.rff_features(psi, layer.weight, layer.bias),
            nn.Linear(FEATURES, RANDOM_FEATURES),
        ),
        denoising,
        Call("critic_loss, forward", lambda model: model.loss(state, action, target), critic),
        Call(
            "score_matching_loss, forward",
            score_matching,
            nn.Linear(ZETA_HIDDEN, FEATURES * state_dim),
        ),
        Call(
            "reverse_step",
            lambda _: ops.reverse_step(action, noise, coefficients, noise=noise),
            nn.Identity(),
        ),
    ]


@torch.no_grad()
def measure_call(call: Call, seconds: float) -> dict[str, float]:
    """Medians, in seconds: the whole call, and what it is made of."""
    kept, retrained = call.module, copy.deepcopy(call.module)
    samples: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        samples.setdefault(name, []).append(value)

    def whole() -> None:
        add("call", measure.seconds_of(lambda: call.call(kept)))

    def seconds_inside(run: Callable[[nn.Module], object], module: nn.Module) -> float:
        with stopwatch() as watch:
            run(module)
        return watch.inside

    def inside() -> None:
        add("inside", seconds_inside(call.call, kept))

    def inside_given() -> None:
        if call.given is not None:
            add("inside, noise given", seconds_inside(call.given, kept))
            add("seed", measure.seconds_of(lambda: _philox.draw_seed(None)))

    def inside_new_weights() -> None:
        change_weights(retrained)
        add("inside, new weights", seconds_inside(call.call, retrained))

    places = [(p.data_ptr(), p.numel()) for p in kept.parameters()]

    def fingerprint() -> None:
        add("fingerprint", _native._core.fingerprint(places, call.threads))

    rounds = [whole, inside, inside_given, inside_new_weights, fingerprint]
    started = time.perf_counter()
    with measure.no_garbage_collection():
        for done in range(100_000):
            if done >= 20 and time.perf_counter() - started > seconds:
                break
            random.shuffle(rounds)
            for step in rounds:
                step()
    return {name: statistics.median(values) for name, values in samples.items()}


def parts_of(median: dict[str, float]) -> dict[str, float]:
    """Where the time of a call goes, and what new weights add to it, in seconds."""
    noise = 0.0
    if "seed" in median:
        noise = max(0.0, median["inside"] - median["inside, noise given"]) + median["seed"]
    python = median["call"] - median["inside"] - median.get("seed", 0.0)
    kernel = median["call"] - python - noise - median["fingerprint"]
    return {
        "call": median["call"],
        "checks and dispatch": python,
        "fingerprint": median["fingerprint"],
        "noise": noise,
        "kernel": kernel,
        "new weights": max(0.0, median["inside, new weights"] - median["inside"]),
    }


@torch.no_grad()
def measure_torch(between: Call, rounds: int = 200) -> float:
    """Median seconds of torch's linear layer of one number, between calls that use the caches."""
    one = torch.ones(1, 1)
    samples = []
    with measure.no_garbage_collection():
        for _ in range(rounds):
            between.call(between.module)
            samples.append(measure.seconds_of(lambda: nn.functional.linear(one, one)))
    return statistics.median(samples)


def run(options: argparse.Namespace) -> str:
    """The table, as Markdown."""
    lines = []
    every_call = calls(options.env)
    for call in every_call:
        for _ in range(measure.WARM_UP_CALLS):
            call.call(call.module)
        parts = parts_of(measure_call(call, min(options.seconds, 5.0)))
        total, kernel, new_weights = parts["call"], parts["kernel"], parts["new weights"]
        beside = [f"{1 - kernel / total:.0%}", f"{1 - kernel / (total + new_weights):.0%}"]
        lines.append([call.name, *map(report.duration, parts.values()), *beside])
    torch_alone = measure_torch(every_call[0])
    header = ["op", "whole call", "checks, dispatch", "fingerprint", "noise", "kernel"]
    header += ["packing new weights", "beside the kernel", "with new weights"]
    return "\n\n".join(
        [
            "# What a call costs beside its kernel, at batch 1",
            report.environment_line({**measure.environment(), "env": options.env}),
            report.table(header, lines),
            "Medians of single calls in random order, without gradients. *Fingerprint*: weights "
            "are read once a call, to see\nwhether the packed copy is still theirs; *packing new "
            "weights* comes on top where they changed. Goal for a\nchain of 100 steps and the action "
            f"gradient, on weights that stay: less than {GOAL:.0%} beside the kernel.\nOf kernels of "
            "10 us that would be 2 us: torch's own linear layer of one number takes "
            f"{report.duration(torch_alone)}.",
        ]
    )
