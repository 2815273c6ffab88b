"""The representation as a generator: its reverse chain against distributions that are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from doubles import ACTION_DIM, OBSERVATION_DIM, make_kind
from torch import Tensor

from diffcore import DiffusionSchedule
from diffcore.agents import DiffusionRepresentation


class KnownScore(DiffusionRepresentation):
    """Predicts the noise exactly, for next states 0.5 b + 0.2 z, b = 1 or -1 (0.7 and 0.3)."""

    share = 0.7

    def predicted_noise(self, psi: Tensor, perturbed: Tensor, level: Tensor) -> Tensor:
        alpha_bar = self.alpha_bar[level].unsqueeze(-1)
        spread = (1 - alpha_bar) * self.noise_scale**2  # variance of the noise in s~
        variance = 0.04 * alpha_bar + spread
        residuals = [perturbed - alpha_bar.sqrt() * b for b in (0.5, -0.5)]
        weights = torch.stack(
            [
                math.log(p) - 0.5 * r.square() / variance
                for p, r in zip((self.share, 1 - self.share), residuals, strict=True)
            ]
        ).softmax(dim=0)
        expected = sum(w * r for w, r in zip(weights, residuals, strict=True))
        return expected * (spread.sqrt() / variance)


@pytest.mark.parametrize(
    ("levels", "K", "noise_scale", "options"),
    [
        ("linear", 1000, 1.0, {}),
        ("linear", 1000, 1.0, {"solver": "ddim", "steps": 100}),
        ("linear", 100, 1.0, {}),
        ("cosine", 1000, 0.449, {}),
        ("beta_cdf", 1000, 0.449, {}),
        ("beta_cdf", 1000, 0.449, {"solver": "ddim", "steps": 100}),
        ("beta_cdf", 1000, 0.449, {"corrector_steps": 300}),
    ],
)
def test_the_chain_draws_from_the_distribution_whose_score_it_is_given(
    levels: str, K: int, noise_scale: float, options: dict[str, Any]
) -> None:
    model = known_score(levels, K, noise_scale)
    state = torch.full((2000, 1), -2.0)  # far from the next states
    generator = torch.Generator().manual_seed(0)
    drawn = model.sample_next_state(state, state, generator=generator, **options).squeeze(-1)
    right = drawn > 0
    assert float(right.float().mean()) == pytest.approx(0.7, abs=0.04)
    for mode, rows in ((0.5, drawn[right]), (-0.5, drawn[~right])):
        assert float(rows.mean()) == pytest.approx(mode, abs=0.03)
        # The last step of a chain of finite levels returns a mean: a little is missing.
        assert 0.13 < float(rows.std()) < 0.22


def known_score(levels: str, K: int, noise_scale: float) -> KnownScore:
    schedule: DiffusionSchedule = getattr(DiffusionSchedule, levels)(K)
    return KnownScore(1, 1, schedule=schedule, noise_scale=noise_scale, feature_dim=2)


def test_without_a_corrector_what_is_drawn_leans_towards_the_state() -> None:
    model, state = known_score("beta_cdf", 1000, 0.449), torch.full((500, 1), -2.0)
    drawn = model.sample_next_state(state, state, corrector_steps=0)
    assert float((drawn > 0).float().mean()) < 0.1  # of 0.7


@pytest.mark.parametrize(("levels", "steps"), [("beta_cdf", 200), ("cosine", 0)])
def test_the_corrector_runs_where_the_levels_end_far_from_noise(levels: str, steps: int) -> None:
    model, state = known_score(levels, 10, 0.449), torch.zeros(3, 1)
    by_default, stated = (
        model.sample_next_state(
            state, state, generator=torch.Generator().manual_seed(0), **options
        )
        for options in ({}, {"corrector_steps": steps})
    )
    assert torch.equal(by_default, stated)


def test_the_corrector_stays_at_the_noisiest_level() -> None:
    asked = []

    class Watched(KnownScore):
        def predicted_noise(self, psi: Tensor, perturbed: Tensor, level: Tensor) -> Tensor:
            asked.append(int(level[0]))
            return super().predicted_noise(psi, perturbed, level)

    model = Watched(1, 1, schedule=DiffusionSchedule.linear(4), feature_dim=4)
    state = torch.zeros(3, 1)
    model.sample_next_state(state, state, corrector_steps=2)
    assert asked == [3, 3, 3, 2, 1, 0]


def test_what_is_drawn_follows_the_generator_and_keeps_gradients_out() -> None:
    agent = make_kind("diffsr-paper")
    state, action = torch.randn(5, OBSERVATION_DIM), torch.rand(5, ACTION_DIM)
    own = agent.generator.get_state()
    first, again, other = (
        agent.sample_next_state(state, action, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(agent.generator.get_state(), own)
    assert first.shape == (5, OBSERVATION_DIM)
    assert not first.requires_grad
    agent.sample_next_state(state, action)
    assert not torch.equal(agent.generator.get_state(), own)


@pytest.mark.parametrize("kind", ["diffsr", "diffsr-paper"])
def test_next_states_keep_their_bound(kind: str) -> None:
    agent = make_kind(kind)
    state, action = 5 * torch.randn(50, OBSERVATION_DIM), torch.rand(50, ACTION_DIM)
    bounded = agent.sample_next_state(state, action, clip=0.3)
    assert float(bounded.abs().max()) == pytest.approx(0.3)
    assert float(agent.sample_next_state(state, action).abs().max()) > 0.3


def test_levels_are_drawn_uniformly() -> None:
    schedule = DiffusionSchedule.cosine(5)
    representation = DiffusionRepresentation(3, 2, schedule=schedule, feature_dim=4)
    generator = torch.Generator().manual_seed(0)
    level = representation.perturb(torch.zeros(5000, 3), generator=generator).level
    counts = level.bincount(minlength=5)
    assert len(counts) == 5
    assert ((counts - 1000).abs() < 150).all()


def test_no_states_give_no_next_states() -> None:
    agent = make_kind("diffsr")
    nothing = torch.empty(0, OBSERVATION_DIM), torch.empty(0, ACTION_DIM)
    assert agent.sample_next_state(*nothing).shape == (0, OBSERVATION_DIM)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"state": torch.zeros(2, 5)}, ValueError, r"state must have shape \[B, 4\], got \[2, 5\]"),
        ({"action": torch.zeros(2, 3)}, ValueError, r"action must have shape \[B, 2\], got \[2, 3\]"),
        ({"action": torch.zeros(3, 2)}, ValueError, "action must have 2 rows like state, got 3"),
        ({"state": torch.zeros(2, 4).double()}, TypeError, "state must be a torch.float32 tensor"),
        ({"corrector_steps": -1}, ValueError, "corrector_steps must be at least 0, got -1"),
        ({"clip": 0.0}, ValueError, "clip must be above 0, got 0.0"),
        ({"clip": float("nan")}, ValueError, "clip must be above 0, got nan"),
        ({"steps": 3}, ValueError, "steps: ddpm runs all 10 steps"),
        ({"solver": "euler"}, ValueError, "solver: expected one of"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], error: type, message: str) -> None:
    arguments = {"state": torch.zeros(2, 4), "action": torch.zeros(2, 2), **changes}
    with pytest.raises(error, match=message):
        make_kind("diffsr").sample_next_state(**arguments)
