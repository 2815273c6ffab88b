"""Optimiser steps: cut norms, frozen modules, moving averages."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffcore.agents.optimization import (
    cut_norm_,
    ema_update_,
    frozen,
    gradient_step,
    load_moments,
    make_adam,
    measured_step,
)
from diffcore.ops import _native

STEPS = 6
LR = 0.01
PARTS = ("first", "late")


@pytest.mark.parametrize("max_norm", [0.5, 0.0])
def test_gradient_step_cuts_the_joint_norm(max_norm: float) -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = make_adam([first, second], lr=1.0, eps=1.0)
    norm = measured_step((3 * first + 4 * second).sum(), optimizer, max_norm)
    assert float(norm) == pytest.approx(5.0)
    scale = max_norm / 5 if max_norm else 1.0
    for parameter, slope in ((first, 3.0), (second, 4.0)):
        expected = -slope * scale / (slope * scale + 1)  # Adam's first step with eps = 1
        assert float(parameter.detach()) == pytest.approx(expected, rel=1e-5)


def test_ema_moves_by_tau() -> None:
    target, source = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = 0.9 * target.weight.detach() + 0.1 * source.weight.detach()
    ema_update_(target, source, 0.1)
    torch.testing.assert_close(target.weight.detach(), expected)
    assert target.weight.requires_grad


@pytest.mark.parametrize("step", [gradient_step, measured_step])
def test_gradients_go_to_the_optimisers_parameters_alone(step: Callable[..., object]) -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    seen = []
    for parameter in (first, second):
        parameter.register_post_accumulate_grad_hook(seen.append)
    step(3 * first * second, make_adam([first], lr=1.0, eps=1.0))
    assert len(seen) == 1
    assert seen[0] is first
    assert second.grad is None
    assert first.grad is None  # the next loss has its memory


def test_a_step_on_parameters_that_the_loss_does_not_depend_on_moves_nothing() -> None:
    used, unused = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    norm = measured_step(3 * used, make_adam([unused], lr=1.0, eps=1.0))
    assert float(norm) == 0.0
    assert used.item() == unused.item() == 1.0
    assert used.grad is None


def test_a_frozen_module_passes_gradients_on_and_takes_none() -> None:
    module = nn.Linear(2, 1)
    module.bias.requires_grad_(False)
    x = torch.ones(3, 2, requires_grad=True)
    with frozen(module.parameters()):
        module(x).sum().backward()
    assert x.grad is not None
    assert module.weight.grad is None
    assert module.weight.requires_grad
    assert not module.bias.requires_grad


def test_a_module_is_thawed_after_an_error() -> None:
    module = nn.Linear(2, 1)
    with pytest.raises(ZeroDivisionError), frozen(module.parameters()):
        raise ZeroDivisionError
    assert all(parameter.requires_grad for parameter in module.parameters())


# -- the same bits as torch --------------------------------------------------------------------------


class Twins:
    """A network of two parts, stepped by ``measured_step``, and its copy, stepped by torch alone."""

    def __init__(self, *, parts: tuple[str, ...] = PARTS, fused: bool = True) -> None:
        network = nn.ModuleDict({part: nn.Linear(5, 30) for part in PARTS})
        self.networks = network, copy.deepcopy(network)
        ours, theirs = (
            [p for part in parts for p in twin[part].parameters()] for twin in self.networks
        )
        self.optimizers = (
            make_adam(ours, lr=LR, eps=1e-8) if fused else torch.optim.Adam(ours, lr=LR),
            torch.optim.Adam(theirs, lr=LR, fused=fused),
        )

    def step(self, *parts: str, max_norm: float = 0.0) -> Tensor:
        """Step both on a loss of these parts, and compare all that a step changes."""
        x = torch.randn(8, 5)
        norms = [
            step(sum(network[part](x).square().mean() for part in parts), optimizer, max_norm)
            for step, network, optimizer in zip(
                (measured_step, torch_step), self.networks, self.optimizers, strict=True
            )
        ]
        if max_norm > 0:  # a norm that cuts has torch's bits, one that is only reported fewer errors
            assert torch.equal(*norms)
        torch.testing.assert_close(*norms, rtol=1e-6, atol=0.0)
        for pair in zip(*(network.parameters() for network in self.networks), strict=True):
            assert torch.equal(*pair)
            ours, theirs = (o.state.get(p, {}) for o, p in zip(self.optimizers, pair, strict=True))
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                assert torch.equal(ours[name], value), name
        return norms[0]


def torch_step(loss: Tensor, optimizer: torch.optim.Adam, max_norm: float) -> Tensor:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)
    optimizer.step()
    return norm


@pytest.mark.parametrize("max_norm", [0.05, 0.0])
@pytest.mark.parametrize("fused", [True, False])
def test_steps_follow_torch(fused: bool, max_norm: float) -> None:
    twins = Twins(fused=fused)
    for _ in range(STEPS):
        assert twins.step(*PARTS, max_norm=max_norm) > max_norm


def test_steps_follow_torch_after_moments_were_loaded() -> None:
    """Of an optimiser with another learning rate, which isn't taken over."""
    twins, saved = Twins(), Twins()
    for optimizer in saved.optimizers:
        optimizer.param_groups[0]["lr"] = 0.5
    for _ in range(STEPS):
        saved.step(*PARTS)
    load_moments(twins.optimizers[0], saved.optimizers[0].state_dict())
    twins.optimizers[1].load_state_dict(saved.optimizers[1].state_dict())
    twins.optimizers[1].param_groups[0]["lr"] = LR
    for _ in range(STEPS):
        twins.step(*PARTS)


def test_loaded_counts_may_be_views() -> None:
    twins = Twins()
    for _ in range(STEPS):
        twins.step(*PARTS)
    for optimizer in twins.optimizers:
        state = copy.deepcopy(optimizer.state_dict())
        for entry in state["state"].values():
            entry["step"] = entry["step"].clone().view(())
        optimizer.load_state_dict(state)
    for _ in range(STEPS):
        twins.step(*PARTS)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.5},
        {"weight_decay": 0.5, "decoupled_weight_decay": True},
        {"maximize": True},
        {"amsgrad": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_follow_torch(options: dict[str, Any]) -> None:
    twins = Twins()
    for optimizer in twins.optimizers:
        optimizer.param_groups[0].update(options)
    for _ in range(STEPS):
        twins.step(*PARTS)


def test_scaled_gradients_follow_torch() -> None:
    """Adam's epsilon is what shows that they weren't unscaled."""
    twins = Twins()
    for optimizer in twins.optimizers:
        optimizer.param_groups[0]["eps"] = 1e-2
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for _ in range(STEPS):
        twins.step(*PARTS)


@pytest.mark.parametrize("fused", [True, False])
def test_a_first_gradient_may_come_late(fused: bool) -> None:
    twins = Twins(fused=fused)
    for parts in ["first"], ["first"], PARTS, ["late"], PARTS, ["first"]:
        twins.step(*parts)


@pytest.mark.parametrize("fused", [True, False])
def test_a_second_group_may_come_late(fused: bool) -> None:
    twins = Twins(fused=fused, parts=("first",))
    twins.step("first")
    for network, optimizer in zip(twins.networks, twins.optimizers, strict=True):
        optimizer.add_param_group({"params": list(network["late"].parameters()), "lr": 0.003})
    for _ in range(STEPS):
        twins.step(*PARTS)


def test_a_step_without_the_norm_is_the_same_step() -> None:
    twins = Twins()
    networks = twins.networks
    for _ in range(STEPS):
        x = torch.randn(8, 5)
        for step, network in zip((gradient_step, measured_step), networks, strict=True):
            optimizer = twins.optimizers[networks.index(network)]
            step(sum(network[part](x).square().mean() for part in PARTS), optimizer)
    for pair in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.equal(*pair)


@pytest.mark.parametrize("fused", [True, False])
def test_hooks_run_at_every_step(fused: bool) -> None:
    twins = Twins(fused=fused)
    optimizer = twins.optimizers[0]
    ran = []
    optimizer.register_step_pre_hook(lambda *_: ran.append("before"))
    optimizer.register_step_post_hook(lambda *_: ran.append("after"))
    for _ in range(STEPS):
        twins.step(*PARTS)
    assert ran == ["before", "after"] * STEPS


def test_the_profiler_sees_every_step() -> None:
    twins = Twins()
    with torch.profiler.profile() as profile:
        for _ in range(STEPS):
            twins.step(*PARTS)
    seen = {event.key: event.count for event in profile.key_averages()}
    steps = [seen.get(f"Optimizer.step#{name}.step") for name in ("FusedAdam", "Adam")]
    assert steps == [STEPS, STEPS]


@pytest.mark.skipif(_native._core is None, reason="needs the compiled module")
@pytest.mark.parametrize("size", [0, 1, 15, 16, 63, 64, 65, 4095, 4096, 4097, 10_001])
def test_a_norm_that_is_only_reported(isa: str, size: int) -> None:
    gradients = [torch.randn(size), torch.randn(3, 5)]
    expected = torch.cat([g.double().flatten() for g in gradients]).norm()
    assert float(cut_norm_(gradients, 0.0)) == pytest.approx(float(expected), rel=1e-6)
