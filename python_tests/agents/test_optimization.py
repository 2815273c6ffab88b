"""Optimiser steps: cut norms, frozen modules, moving averages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffcore.agents.optimization import ema_update_, frozen, gradient_step, make_adam


@pytest.mark.parametrize("max_norm", [0.5, 0.0])
def test_gradient_step_cuts_the_joint_norm(max_norm: float) -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = make_adam([first, second], lr=1.0, eps=1.0)
    norm = gradient_step((3 * first + 4 * second).sum(), optimizer, max_norm)
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


def test_gradients_go_to_the_optimisers_parameters_alone() -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    seen = []
    for parameter in (first, second):
        parameter.register_post_accumulate_grad_hook(seen.append)
    gradient_step(3 * first * second, make_adam([first], lr=1.0, eps=1.0))
    assert len(seen) == 1
    assert seen[0] is first
    assert second.grad is None
    assert first.grad is None  # the next loss has its memory


def test_a_step_on_parameters_that_the_loss_does_not_depend_on_moves_nothing() -> None:
    used, unused = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    norm = gradient_step(3 * used, make_adam([unused], lr=1.0, eps=1.0))
    assert float(norm) == 0.0
    assert used.item() == unused.item() == 1.0
    assert used.grad is None


def test_a_frozen_module_passes_gradients_on_and_takes_none() -> None:
    module = nn.Linear(2, 1)
    module.bias.requires_grad_(False)
    x = torch.ones(3, 2, requires_grad=True)
    with frozen(module):
        module(x).sum().backward()
    assert x.grad is not None
    assert module.weight.grad is None
    assert module.weight.requires_grad
    assert not module.bias.requires_grad


def test_a_module_is_thawed_after_an_error() -> None:
    module = nn.Linear(2, 1)
    with pytest.raises(ZeroDivisionError), frozen(module):
        raise ZeroDivisionError
    assert all(parameter.requires_grad for parameter in module.parameters())
