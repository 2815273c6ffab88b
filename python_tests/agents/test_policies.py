"""The policies' losses and samples against their equations."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from diffcore import DiffusionSchedule
from diffcore.agents import DiffusionPolicy, MLPPolicy, VAEPolicy

OBSERVATION_DIM, ACTION_DIM, HIDDEN_DIM, K = 4, 2, 32, 5


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def observation(generator: torch.Generator) -> Tensor:
    return torch.randn(6, OBSERVATION_DIM, generator=generator)


@pytest.fixture
def action(generator: torch.Generator) -> Tensor:
    return torch.rand(6, ACTION_DIM, generator=generator) * 2 - 1


def make_diffusion_policy(noise_ratio: float = 1.0) -> DiffusionPolicy:
    return DiffusionPolicy(
        OBSERVATION_DIM,
        ACTION_DIM,
        hidden_dim=HIDDEN_DIM,
        schedule=DiffusionSchedule.cosine(K),
        noise_ratio=noise_ratio,
    )


def test_a_schedule_that_ends_far_from_the_start_of_chains_is_warned_of() -> None:
    sizes = {"observation_dim": OBSERVATION_DIM, "action_dim": ACTION_DIM, "hidden_dim": 4}
    with pytest.warns(UserWarning, match=r"^schedule: abar_K is 0\.36 after 100 steps"):
        DiffusionPolicy(**sizes, schedule=DiffusionSchedule.linear(100))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for schedule in (
            DiffusionSchedule.linear(1000),
            DiffusionSchedule.cosine(5),
            DiffusionSchedule.vp(5),
        ):
            DiffusionPolicy(**sizes, schedule=schedule)


def test_diffusion_loss_is_the_denoising_loss(
    observation: Tensor, action: Tensor, generator: torch.Generator
) -> None:
    policy = make_diffusion_policy()
    t = torch.tensor([0, 1, 2, 3, 4, 0])
    noise = torch.randn(6, ACTION_DIM, generator=generator)
    abar = policy.schedule.alphas_cumprod[t].unsqueeze(-1)
    noisy = (abar.sqrt() * action + (1 - abar).sqrt() * noise).float()
    expected = (noise - policy.denoiser(noisy, observation, t)).square().mean()
    loss = policy.loss(observation, action, t=t, noise=noise)
    torch.testing.assert_close(loss, expected)

    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in policy.parameters())


def test_diffusion_loss_draws_levels_and_noise_from_the_generator(
    observation: Tensor, action: Tensor
) -> None:
    policy = make_diffusion_policy()
    losses = [
        float(policy.loss(observation, action, generator=torch.Generator().manual_seed(seed)))
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_exploration_noise_scales_with_noise_ratio(observation: Tensor) -> None:
    """With ratio 0, exploring is evaluation; with 1 the same start ends elsewhere."""
    x_init = torch.zeros(6, ACTION_DIM)

    def sample(policy: DiffusionPolicy, explore: bool) -> Tensor:
        policy.load_state_dict(reference.state_dict())
        return policy.sample(
            observation,
            explore=explore,
            x_init=x_init,
            generator=torch.Generator().manual_seed(2),
        )

    reference = make_diffusion_policy()
    quiet, noisy = make_diffusion_policy(0.0), make_diffusion_policy(1.0)
    assert torch.equal(sample(quiet, True), sample(quiet, False))
    assert torch.equal(sample(quiet, False), sample(noisy, False))
    assert not torch.equal(sample(noisy, True), sample(noisy, False))


def test_mlp_policy(observation: Tensor, action: Tensor, generator: torch.Generator) -> None:
    policy = MLPPolicy(OBSERVATION_DIM, ACTION_DIM, hidden_dim=HIDDEN_DIM)
    mean = policy.mean(observation).detach()
    torch.testing.assert_close(policy.loss(observation, action), (mean - action).square().mean())
    assert torch.equal(policy.sample(observation, explore=False), mean.clamp(-1, 1))

    many = observation[:1].expand(20_000, -1)
    noise = policy.sample(many, explore=True, generator=generator) - mean[0]
    assert float(noise.std()) == pytest.approx(0.1, rel=0.03)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.01)


def test_vae_loss_is_the_negative_elbo_with_a_weight(
    observation: Tensor, action: Tensor, generator: torch.Generator
) -> None:
    policy = VAEPolicy(OBSERVATION_DIM, ACTION_DIM, hidden_dim=HIDDEN_DIM, latent_dim=3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(4)  # at first all variances are 1, and the latent hardly counts
    noise = torch.randn(6, 3, generator=generator)
    mean, log_variance = policy.encoder(torch.cat([action, observation], dim=-1)).chunk(2, -1)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    prior = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
    kl = torch.distributions.kl_divergence(posterior, prior).sum(dim=-1).mean()
    latent = posterior.mean + posterior.stddev * noise
    decoded = policy.decoder(torch.cat([latent, observation], dim=-1))
    expected = (decoded - action).square().mean() + 0.1 * kl
    torch.testing.assert_close(policy.loss(observation, action, noise=noise), expected)


def test_vae_explores_by_its_latent(observation: Tensor, generator: torch.Generator) -> None:
    policy = VAEPolicy(OBSERVATION_DIM, ACTION_DIM, hidden_dim=HIDDEN_DIM, latent_dim=3)
    latent = torch.zeros(6, 3)
    decoded = policy.decoder(torch.cat([latent, observation], dim=-1)).detach().clamp(-1, 1)
    assert torch.equal(policy.sample(observation, explore=False), decoded)
    explored = [policy.sample(observation, explore=True, generator=generator) for _ in range(2)]
    assert not torch.equal(*explored)


@pytest.mark.parametrize(
    "policy",
    [
        make_diffusion_policy(),
        MLPPolicy(OBSERVATION_DIM, ACTION_DIM, hidden_dim=HIDDEN_DIM),
        VAEPolicy(OBSERVATION_DIM, ACTION_DIM, hidden_dim=HIDDEN_DIM, latent_dim=3),
    ],
    ids=["diffusion", "mlp", "vae"],
)
def test_samples_are_detached_and_within_bounds(
    policy: DiffusionPolicy | MLPPolicy | VAEPolicy, generator: torch.Generator
) -> None:
    far_away = 100 * torch.randn(32, OBSERVATION_DIM, generator=generator)
    for explore in (True, False):
        sample = policy.sample(far_away, explore=explore, generator=generator)
        assert sample.shape == (32, ACTION_DIM)
        assert not sample.requires_grad
        assert float(sample.abs().max()) == 1.0  # clamped, not merely small
