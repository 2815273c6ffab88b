"""Noise schedules against recorded and closed forms; solver tables against independent formulas."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import GOLDEN, load_golden
from torch import Tensor

from diffcore import DiffusionSchedule, nn, ops
from diffcore.ops.q_sample import cached_levels
from diffcore.schedule import SOLVERS, SolverTable

SCHEDULES: dict[str, Callable[[int], DiffusionSchedule]] = {
    "cosine": DiffusionSchedule.cosine,
    "linear": DiffusionSchedule.linear,
    "vp": DiffusionSchedule.vp,
    "beta_cdf": DiffusionSchedule.beta_cdf,
}
#: Those whose levels all differ and that are finely spaced: samplers are tested on them.
SMOOTH = ("cosine", "linear", "vp")


# -- schedules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", np.load(GOLDEN / "dipo_schedules.npz").files)
def test_betas_are_those_of_the_released_code(key: str) -> None:
    name, K, _ = key.split("_")
    betas = SCHEDULES[name](int(K)).betas
    torch.testing.assert_close(
        betas, load_golden("dipo_schedules")[key].double(), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("K", [3, 5, 20, 100, 1000])
def test_fields_agree_with_each_other(name: str, K: int) -> None:
    schedule = SCHEDULES[name](K)
    assert schedule.K == K
    for values in (schedule.betas, schedule.alphas, schedule.alphas_cumprod):
        assert values.dtype == torch.float64
        assert values.shape == (K,)
        assert values.device.type == "cpu"
    assert ((schedule.betas > 0) & (schedule.betas < 1)).all()
    torch.testing.assert_close(schedule.alphas, 1 - schedule.betas)
    running = 1.0
    for t in range(K):
        assert schedule.alphas_cumprod_prev[t].item() == pytest.approx(running, rel=1e-12)
        running *= 1 - schedule.betas[t].item()
        assert schedule.alphas_cumprod[t].item() == pytest.approx(running, rel=1e-12)


@pytest.mark.parametrize("K", [2, 10, 100])
def test_cosine_levels(K: int) -> None:
    """abar_t is f(t + 1) / f(0); only the last step is limited, where f reaches 0."""
    u = torch.arange(K + 1).double() / K
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    levels = DiffusionSchedule.cosine(K).alphas_cumprod
    torch.testing.assert_close(levels[:-1], (f[1:] / f[0])[:-1], rtol=1e-12, atol=0)
    assert DiffusionSchedule.cosine(K).betas[-1] == 0.999


def test_linear_and_vp_end_points() -> None:
    linear = DiffusionSchedule.linear(100, beta_min=1e-3, beta_max=0.5).betas
    assert linear[0] == 1e-3
    assert linear[-1] == 0.5
    torch.testing.assert_close(linear.diff(), torch.full((99,), (0.5 - 1e-3) / 99).double())
    # The exponents of the variance preserving SDE add up to (b_min + b_max) / 2 over its unit time.
    level = DiffusionSchedule.vp(50, b_min=0.2, b_max=8.0).alphas_cumprod[-1]
    assert level.item() == pytest.approx(math.exp(-(0.2 + 8.0) / 2), rel=1e-12)


def test_which_schedules_end_in_noise() -> None:
    for K in (1, 5, 20, 100, 1000):
        assert DiffusionSchedule.cosine(K).ends_in_noise
        assert DiffusionSchedule.vp(K).ends_in_noise
        assert DiffusionSchedule.linear(K).ends_in_noise is (K == 1000)
        if K >= 3:
            assert not DiffusionSchedule.beta_cdf(K).ends_in_noise
    for level, ends in ((0.019, True), (0.021, False)):
        levels = torch.tensor([0.5, level], dtype=torch.float64)
        assert DiffusionSchedule.from_alphas_cumprod(levels).ends_in_noise is ends


def test_beta_cdf_levels_follow_the_distribution() -> None:
    """(a, b) = (1, 1) is the uniform distribution; (2, 1) and (1, 2) have quadratic CDFs."""
    x = torch.linspace(0, 1, 11, dtype=torch.float64)
    for a, b, cdf in ((1, 1, x), (2, 1, x**2), (1, 2, 1 - (1 - x) ** 2)):
        levels = DiffusionSchedule.beta_cdf(11, a, b).alphas_cumprod
        torch.testing.assert_close(levels[1:-1], (1 - cdf)[1:-1], rtol=1e-12, atol=1e-12)
        assert levels[0] == levels[1]
        torch.testing.assert_close(levels[-1], levels[-2])


def test_beta_cdf_with_poles_at_both_ends() -> None:
    """At the defaults (0.3, 0.1) the density is infinite at 0 and 1; B(a, b) I_x(a, b) is also the
    power series x^a sum_n (1 - b)_n / (n! (a + n)) x^n, which converges for x < 1."""
    a, b, K = 0.3, 0.1, 21
    beta = math.gamma(a) * math.gamma(b) / math.gamma(a + b)
    levels = DiffusionSchedule.beta_cdf(K).alphas_cumprod
    for k in (1, 5, 10, 15):
        x = k / (K - 1)
        term, total = 1.0, 0.0
        for n in range(2000):
            total += term / (a + n)
            term *= (n + 1 - b) / (n + 1) * x
        assert levels[k].item() == pytest.approx(1 - x**a * total / beta, rel=1e-10)


def test_from_alphas_cumprod_keeps_the_levels() -> None:
    levels = torch.tensor([0.9, 0.9, 0.5, 0.1], dtype=torch.float64)
    schedule = DiffusionSchedule.from_alphas_cumprod(levels)
    torch.testing.assert_close(schedule.alphas_cumprod, levels, rtol=1e-14, atol=0)


def test_schedule_keeps_its_own_copy() -> None:
    betas = torch.tensor([0.1, 0.2], dtype=torch.float64)
    schedule = DiffusionSchedule(betas)
    betas.fill_(0.9)
    assert schedule.betas.tolist() == [0.1, 0.2]


@pytest.mark.parametrize("name", ["cosine", "linear", "vp", "beta_cdf"])
def test_numbers_of_numpy(name: str) -> None:
    build = getattr(DiffusionSchedule, name)
    schedule = build(np.int64(8))
    assert schedule == build(8)
    table = schedule.solver("ddim", steps=np.int32(5), eta=np.float32(0.5))
    assert table is schedule.solver("ddim", steps=5, eta=0.5)
    for value in (np.bool_(True), np.float64(8.0)):
        with pytest.raises(TypeError, match="^K: expected an integer"):
            build(value)


def test_repr_is_one_short_line() -> None:
    assert repr(DiffusionSchedule.linear(4, 0.1, 0.4)) == (
        "<DiffusionSchedule K=4, betas 0.1 to 0.4, alphas_cumprod 0.9 to 0.3024>"
    )


def test_schedules_are_equal_by_value() -> None:
    schedule, same = DiffusionSchedule.vp(9), DiffusionSchedule.vp(9)
    assert schedule == same
    assert hash(schedule) == hash(same)
    nearly = schedule.betas.clone()
    nearly[4] = nearly[4].nextafter(nearly[5])
    for other in (DiffusionSchedule(nearly), DiffusionSchedule.vp(10), schedule.betas, None):
        assert (schedule == other) is False
    assert len({schedule, same, DiffusionSchedule(nearly)}) == 2


def test_equal_schedules_share_what_follows_from_them() -> None:
    schedule, same = DiffusionSchedule.vp(9), DiffusionSchedule.vp(9)
    assert schedule.solver("ddim", steps=3) is same.solver("ddim", steps=3)
    assert schedule.solver("ddim", steps=3) is not DiffusionSchedule.vp(10).solver("ddim", steps=3)
    cpu = torch.device("cpu")
    assert cached_levels(schedule, cpu) is cached_levels(same, cpu)


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_copies_and_pickles(copied: Callable[[DiffusionSchedule], DiffusionSchedule]) -> None:
    schedule = DiffusionSchedule.cosine(9)
    other = copied(schedule)
    assert other == schedule
    assert hash(other) == hash(schedule)
    for name in ("betas", "alphas", "alphas_cumprod", "alphas_cumprod_prev"):
        assert torch.equal(getattr(other, name), getattr(schedule, name))


def test_a_schedule_made_within_a_transform_serves_outside_of_it() -> None:
    denoiser, state, action = nn.Denoiser(2, 2, 4), torch.randn(3, 2), torch.rand(3, 2)
    given = {"t": torch.tensor([0, 3, 6]), "noise": torch.randn(3, 2)}

    def loss(action: Tensor) -> Tensor:
        schedule = DiffusionSchedule.vp(7, b_min=0.3)  # whose tables no other test has asked for
        return ops.denoising_loss(denoiser, schedule, state, action, **given)

    within = torch.func.grad(loss)(action)
    action.requires_grad_()
    (outside,) = torch.autograd.grad(loss(action), action)
    exact = ops.denoising_loss(
        denoiser, DiffusionSchedule.vp(7, 0.3), state, action, **given, backend="reference"
    )
    (expected,) = torch.autograd.grad(exact, action)
    torch.testing.assert_close(within, expected)
    torch.testing.assert_close(outside, expected)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_don_t_follow_the_default_device(name: str) -> None:
    with torch.device("meta"):
        schedule = SCHEDULES[name](5)
        table = schedule.solver("ddim", steps=3)
    assert schedule.betas.device.type == "cpu"
    assert table.coefficients.device.type == "cpu"


# -- solver tables ---------------------------------------------------------------------------------


def run(
    table: SolverTable, eps_of: Callable[[Tensor, int], Tensor], x: Tensor, noise: Tensor
) -> Tensor:
    """A chain in float64 without clipping."""
    x0 = torch.zeros_like(x)
    for i, t in enumerate(table.timesteps.tolist()):
        x, x0 = ops.reverse_step(
            x,
            eps_of(x, t),
            table.coefficients[i],
            noise=noise[i],
            x0_previous=x0,
            clip=math.inf,
        )
    return x


@pytest.fixture
def chain_inputs() -> tuple[Callable[[Tensor, int], Tensor], Tensor, Tensor]:
    """A denoiser of no particular form, a start, and noise for at most 64 steps."""
    weight = torch.randn(3, 3).double()
    return (
        lambda x, t: torch.tanh(x @ weight + 0.1 * t),
        torch.randn(5, 3).double(),
        torch.randn(64, 5, 3).double(),
    )


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_copied_tables_know_their_schedule(copied: Callable[[Any], Any]) -> None:
    table = DiffusionSchedule.cosine(9).solver("ddim", steps=4)
    other = copied(table)
    assert torch.equal(other.timesteps, table.timesteps)
    assert torch.equal(other.coefficients, table.coefficients)
    assert other.schedule == table.schedule == DiffusionSchedule.cosine(9)
    assert table != other  # tables are compared by identity


def test_a_table_pickled_before_tables_knew_their_schedule_has_none() -> None:
    table = DiffusionSchedule.cosine(9).solver("ddim", steps=4)
    old = object.__new__(SolverTable)
    old.__dict__.update(timesteps=table.timesteps, coefficients=table.coefficients)
    assert pickled(old).schedule is None


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("K", [3, 20])
def test_tables_are_finite_and_fall_from_the_last_level(name: str, schedule: str, K: int) -> None:
    table = SCHEDULES[schedule](K).solver(name)
    assert table.steps == K
    assert table.timesteps.tolist() == list(range(K - 1, -1, -1))
    assert table.coefficients.dtype == torch.float64
    assert torch.isfinite(table.coefficients).all()


@pytest.mark.parametrize("schedule", SMOOTH)
def test_ddpm_is_the_posterior(schedule: str) -> None:
    """q(x_{t-1} | x_t, x_0) by Bayes' rule: precision-weighted mean of two Gaussians."""
    s = SCHEDULES[schedule](20)
    table = s.solver("ddpm")
    for i, t in enumerate(table.timesteps.tolist()):
        alpha, before = s.alphas[t], s.alphas_cumprod_prev[t]
        c = table.coefficients[i]
        if t == 0:  # before = 1: x_0 itself, and no noise
            torch.testing.assert_close(c[2:], torch.tensor([1.0, 0, 0, 0, 0]).double())
            continue
        # x_{t-1} ~ N(sqrt(before) x_0, 1 - before), and x_t ~ N(sqrt(alpha) x_{t-1}, beta).
        prior, likelihood = 1 / (1 - before), alpha / s.betas[t]
        variance = 1 / (prior + likelihood)
        torch.testing.assert_close(c[5], variance.sqrt(), rtol=1e-10, atol=0)
        torch.testing.assert_close(c[2], variance * prior * before.sqrt(), rtol=1e-10, atol=0)
        torch.testing.assert_close(c[3], variance * likelihood / alpha.sqrt(), rtol=1e-10, atol=0)
        assert c[4] == c[6] == 0


@pytest.mark.parametrize("schedule", SMOOTH)
def test_ddpm_unclipped_is_ddpm_without_clip(schedule: str, chain_inputs: Any) -> None:
    s = SCHEDULES[schedule](20)
    torch.testing.assert_close(
        run(s.solver("ddpm_unclipped"), *chain_inputs),
        run(s.solver("ddpm"), *chain_inputs),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("schedule", SMOOTH)
def test_ddim_with_all_noise_is_ddpm(schedule: str, chain_inputs: Any) -> None:
    """Song et al. 2021, Section 4.1: eta = 1 has DDPM's variance, and then its mean too."""
    s = SCHEDULES[schedule](20)
    ddim, ddpm = s.solver("ddim", eta=1.0), s.solver("ddpm")
    # (1 - beta) / (1 - beta limited to 0.999) costs cosine's first step four digits.
    torch.testing.assert_close(ddim.coefficients[:, 5], ddpm.coefficients[:, 5], rtol=1e-9, atol=0)
    torch.testing.assert_close(
        run(ddim, *chain_inputs), run(ddpm, *chain_inputs), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_ddim_against_its_equation(eta: float, steps: int, chain_inputs: Any) -> None:
    """Song et al. 2021, Eq. 12 and 16, on a subsequence of the levels."""
    s = DiffusionSchedule.vp(20)
    eps_of, x, noise = chain_inputs
    result = run(s.solver("ddim", steps=steps, eta=eta), eps_of, x, noise)

    levels = [round(v) for v in np.linspace(19, 0, steps)]
    for i, t in enumerate(levels):
        abar = s.alphas_cumprod[t].item()
        target = s.alphas_cumprod[levels[i + 1]].item() if i + 1 < steps else 1.0
        sigma = eta * math.sqrt((1 - target) / (1 - abar)) * math.sqrt(1 - abar / target)
        eps = eps_of(x, t)
        predicted = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        direction = math.sqrt(max(1 - target - sigma**2, 0.0)) * eps
        x = math.sqrt(target) * predicted + direction + sigma * noise[i]
    torch.testing.assert_close(result, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", SMOOTH)
def test_exponential_integrator_against_its_equation(schedule: str, chain_inputs: Any) -> None:
    """DIPO, Algorithm 1: x + (e^h - 1)(x + 2 score) + sqrt(e^{2h} - 1) z, noise in every step."""
    s = SCHEDULES[schedule](20)
    eps_of, x, noise = chain_inputs
    result = run(s.solver("exponential_integrator"), eps_of, x, noise)
    for i, t in enumerate(range(19, -1, -1)):
        h = -0.5 * math.log(s.alphas[t].item())
        score = -eps_of(x, t) / math.sqrt(1 - s.alphas_cumprod[t].item())
        x = x + (math.exp(h) - 1) * (x + 2 * score) + math.sqrt(math.exp(2 * h) - 1) * noise[i]
    torch.testing.assert_close(result, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
def test_dpmpp_2m_against_its_algorithm(steps: int, chain_inputs: Any) -> None:
    """Lu et al. 2022, Algorithm 2, first order in the first and the last step."""
    s = DiffusionSchedule.vp(20)
    eps_of, x, noise = chain_inputs
    result = run(s.solver("dpmpp_2m", steps=steps), eps_of, x, noise)

    levels = [round(v) for v in np.linspace(19, 0, steps)]
    abar = [s.alphas_cumprod[t].item() for t in levels]
    half_log_snr = [0.5 * math.log(a / (1 - a)) for a in abar]
    before = None
    for i, t in enumerate(levels):
        predicted = (x - math.sqrt(1 - abar[i]) * eps_of(x, t)) / math.sqrt(abar[i])
        if i + 1 == steps:  # to the data itself, sigma = 0
            x = predicted
            break
        h = half_log_snr[i + 1] - half_log_snr[i]
        estimate = predicted
        if before is not None:
            r = (half_log_snr[i] - half_log_snr[i - 1]) / h
            estimate = (1 + 1 / (2 * r)) * predicted - 1 / (2 * r) * before
        ratio = math.sqrt((1 - abar[i + 1]) / (1 - abar[i]))
        x = ratio * x - math.sqrt(abar[i + 1]) * math.expm1(-h) * estimate
        before = predicted
    torch.testing.assert_close(result, x, rtol=1e-9, atol=1e-9)


def test_dpmpp_2m_is_second_order() -> None:
    """Halving the steps of the deterministic flow divides the error by four, DDIM's by two."""
    s = DiffusionSchedule.vp(1024)
    mean, spread = 0.4, 0.5

    def eps_of(x: Tensor, t: int) -> Tensor:
        return gaussian_eps(s, x, t, mean, spread)

    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    noise = torch.zeros(1024, 9, 1).double()

    def error(name: str, steps: int) -> float:
        # Only down to level 63, short of the first-order step onto the data.
        table = s.solver(name, steps=steps)
        kept = int((table.timesteps >= 63).sum())
        cut = SolverTable(table.timesteps[:kept], table.coefficients[:kept])
        end = table.timesteps[kept].item()
        exact = flow(s, x, 1023, end, mean, spread)
        return (run(cut, eps_of, x, noise) - exact).abs().max().item()

    assert error("ddim", 64) / error("ddim", 128) == pytest.approx(2, rel=0.2)
    assert error("dpmpp_2m", 64) / error("dpmpp_2m", 128) == pytest.approx(4, rel=0.2)


def gaussian_eps(
    schedule: DiffusionSchedule, x: Tensor, t: int, mean: float, spread: float
) -> Tensor:
    """The exact denoiser of data ~ N(mean, spread^2): E[eps | x_t = x]."""
    abar = schedule.alphas_cumprod[t]
    return (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * spread**2 + 1 - abar)


def flow(
    schedule: DiffusionSchedule, x: Tensor, start: int, end: int, mean: float, spread: float
) -> Tensor:
    """The probability flow between two levels: for Gaussian data, standardised x is kept."""
    a, b = schedule.alphas_cumprod[start], schedule.alphas_cumprod[end]
    standard = (x - a.sqrt() * mean) / (a * spread**2 + 1 - a).sqrt()
    return b.sqrt() * mean + (b * spread**2 + 1 - b).sqrt() * standard


@pytest.mark.parametrize("name", SOLVERS)
def test_samples_of_a_gaussian_have_its_mean_and_variance(name: str) -> None:
    """With the exact denoiser every step is affine in (x, previous x0), so the distribution of the
    samples is Gaussian too, and its moments follow without sampling."""
    schedule, mean, spread = DiffusionSchedule.vp(1000), 0.4, 0.5
    table = schedule.solver(name)
    first = schedule.alphas_cumprod[-1]
    moment = torch.stack([first.sqrt() * mean, torch.zeros(()).double()])
    covariance = torch.diag(torch.stack([first * spread**2 + 1 - first, torch.zeros(()).double()]))
    # The images of three points are what an affine map of the plane is known by.
    x, x0 = torch.tensor([[[0.0], [1.0], [0.0]], [[0.0], [0.0], [1.0]]]).double()
    for t, c in zip(table.timesteps.tolist(), table.coefficients, strict=True):
        eps = gaussian_eps(schedule, x, t, mean, spread)
        step = ops.reverse_step(x, eps, c, x0_previous=x0, clip=math.inf)
        origin, along_x, along_x0 = torch.cat(step, dim=1)
        jacobian = torch.stack([along_x - origin, along_x0 - origin], dim=1)
        moment = jacobian @ moment + origin
        covariance = jacobian @ covariance @ jacobian.T
        covariance[0, 0] += c[5] ** 2
    # Samplers of first order are off by the order of 1 / K.
    assert moment[0].item() == pytest.approx(mean, abs=2e-3)
    assert covariance[0, 0].sqrt().item() == pytest.approx(spread, abs=5e-3)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: DiffusionSchedule.cosine(0), ValueError, "^K: expected at least 1, got 0"),
        (lambda: DiffusionSchedule.linear(-3), ValueError, "^K: expected at least 1, got -3"),
        (lambda: DiffusionSchedule.vp(0), ValueError, "^K: "),
        (lambda: DiffusionSchedule.beta_cdf(2), ValueError, "^K: expected at least 3, got 2"),
        (lambda: DiffusionSchedule.cosine(2.0), TypeError, "^K: expected an integer, got float"),
        (lambda: DiffusionSchedule.cosine(True), TypeError, "^K: expected an integer, got bool"),
        (lambda: DiffusionSchedule.beta_cdf(5, a=0.0), ValueError, "^a, b: expected positive"),
        (lambda: DiffusionSchedule.beta_cdf(5, b=math.nan), ValueError, "^a, b: "),
        (lambda: DiffusionSchedule.linear(5, beta_max=1.5), ValueError, r"^betas: .* in \(0, 1\)"),
        (lambda: DiffusionSchedule.linear(5, beta_min=math.nan), ValueError, "^betas: "),
        (lambda: DiffusionSchedule.vp(5, b_max=math.inf), ValueError, "^betas: "),
        (lambda: DiffusionSchedule([0.1]), TypeError, "^betas: .* got list"),
        (lambda: DiffusionSchedule(torch.tensor([1])), TypeError, "^betas: .* got torch.int64"),
        (lambda: DiffusionSchedule(torch.empty(0)), ValueError, r"^betas: .* got shape \[0\]"),
        (lambda: DiffusionSchedule(torch.ones(2, 2)), ValueError, r"^betas: .* got shape \[2, 2\]"),
        (lambda: DiffusionSchedule(torch.tensor([0.1, math.nan])), ValueError, "^betas: .*nan"),
        (lambda: DiffusionSchedule(torch.tensor([0.1, math.inf])), ValueError, "^betas: .*inf"),
        (lambda: DiffusionSchedule(torch.tensor([0.0, 0.5])), ValueError, "^betas: "),
        (lambda: DiffusionSchedule(torch.tensor([0.5, 1.0])), ValueError, "^betas: "),
        (
            lambda: DiffusionSchedule(torch.tensor([1e-17, 0.1])),
            ValueError,
            "^betas: expected alphas_cumprod, .* got 1 at index 0$",
        ),
        (
            lambda: DiffusionSchedule(torch.full((200,), 0.999)),
            ValueError,
            "^betas: expected alphas_cumprod, .* got .* at index 102$",
        ),
        (
            lambda: DiffusionSchedule.from_alphas_cumprod([0.5]),
            TypeError,
            "^alphas_cumprod: .* got list",
        ),
        (
            lambda: DiffusionSchedule.from_alphas_cumprod(torch.tensor([0.5, 0.6])),
            ValueError,
            "^alphas_cumprod: expected falling values",
        ),
        (
            lambda: DiffusionSchedule.from_alphas_cumprod(torch.tensor([0.5, math.nan])),
            ValueError,
            "^alphas_cumprod: ",
        ),
    ],
)
def test_bad_schedules(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: DiffusionSchedule.linear(1001, 0.1, 1.1),
            "betas: expected values in (0, 1), got 1.0 at index 900",
        ),
        (
            lambda: DiffusionSchedule.from_alphas_cumprod(torch.tensor([0.75, 0.25] * 500)),
            "alphas_cumprod: expected falling values in (0, 1), got 0.75 after 0.25 at index 2",
        ),
        (
            lambda: DiffusionSchedule.from_alphas_cumprod(torch.ones(1000)),
            "alphas_cumprod: expected falling values in (0, 1), got 1.0 at index 0",
        ),
    ],
)
def test_messages_name_the_first_bad_value_alone(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("betas", [[2e-16, 0.1, 0.9], [0.999] * 102])
def test_every_schedule_has_every_solver(name: str, betas: list[float]) -> None:
    """At either end of what a schedule may have."""
    table = DiffusionSchedule(torch.tensor(betas, dtype=torch.float64)).solver(name)
    assert torch.isfinite(table.coefficients).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("euler", {}, "^solver: expected one of ddpm, .*, got 'euler'"),
        ("ddim", {"steps": 0}, r"^steps: expected an integer in 1\.\.10 .*, got 0"),
        ("ddim", {"steps": -1}, "^steps: .* got -1"),
        ("ddim", {"steps": 11}, "^steps: .* got 11"),
        ("ddim", {"steps": 2.0}, "^steps: .* got 2.0"),
        ("ddim", {"steps": True}, "^steps: .* got True"),
        ("ddpm", {"steps": 5}, "^steps: ddpm runs all 10 steps"),
        ("ddpm_unclipped", {"steps": 5}, "^steps: "),
        ("exponential_integrator", {"steps": 5}, "^steps: "),
        ("ddpm", {"eta": 0.5}, "^eta: only ddim has it"),
        ("ddim", {"eta": -0.1}, r"^eta: expected a number in \[0, 1\]"),
        ("ddim", {"eta": math.nan}, "^eta: "),
    ],
)
def test_bad_solvers(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionSchedule.cosine(10).solver(name, **options)


@pytest.mark.parametrize(
    ("timesteps", "coefficients", "error", "message"),
    [
        ([1], torch.zeros(1, 7).double(), TypeError, "^timesteps: expected a tensor, got list"),
        (torch.tensor([1.0]), torch.zeros(1, 7).double(), ValueError, "^timesteps: .*float32"),
        (torch.tensor([-1]), torch.zeros(1, 7).double(), ValueError, "^timesteps: .* got -1"),
        (torch.arange(0), torch.zeros(0, 7).double(), ValueError, "^timesteps: expected a non-e"),
        (torch.tensor([1]), None, TypeError, "^coefficients: expected a tensor, got NoneType"),
        (torch.tensor([1]), torch.zeros(1, 7), ValueError, "^coefficients: expected float64"),
        (torch.tensor([1]), torch.zeros(2, 7).double(), ValueError, r"^coefficients: .*\[1, 7\]"),
        (torch.tensor([1]), torch.full((1, 7), math.nan).double(), ValueError, "^coefficients: "),
        (torch.tensor([1]), torch.full((1, 7), math.inf).double(), ValueError, "^coefficients: "),
    ],
)
def test_bad_tables(
    timesteps: Any, coefficients: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SolverTable(timesteps, coefficients)


def test_a_table_of_no_schedule_is_refused() -> None:
    with pytest.raises(TypeError, match="^schedule: expected a DiffusionSchedule or None, got int"):
        SolverTable(torch.tensor([1]), torch.zeros(1, 7).double(), 2)
