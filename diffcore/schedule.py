"""Noise schedules, and the samplers that follow from them as tables of coefficients.

Everything here is computed in float64, whatever the precision of the networks.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Integral

import torch
from torch import Tensor

from diffcore._kept import kept

SOLVERS = ("ddpm", "ddpm_unclipped", "ddim", "exponential_integrator", "dpmpp_2m")


@dataclass(frozen=True, eq=False)
class SolverTable:
    """A sampler, written as the coefficients of one update rule.

    The i-th executed step evaluates ``eps = denoiser(x, state, timesteps[i])`` and updates::

        x0 = clip(c0 * x - c1 * eps)
        x  = c2 * x0 + c3 * x + c4 * eps + c5 * z + c6 * x0_of_the_previous_step

    with ``z ~ N(0, I)`` and ``c0 .. c6 = coefficients[i]``. The ops keep what they derive from a
    table: make a new one instead of changing its tensors in place.

    Attributes:
        timesteps: int64 ``[steps]``, the noise level each step starts from, falling.
        coefficients: float64 ``[steps, 7]``.
        schedule: whose levels the steps run through; None, of a table made by hand, isn't checked.
    """

    timesteps: Tensor
    coefficients: Tensor
    schedule: DiffusionSchedule | None = None

    def __post_init__(self) -> None:
        t, c = self.timesteps, self.coefficients
        for name, value in (("timesteps", t), ("coefficients", c)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if t.dtype != torch.int64 or t.ndim != 1 or len(t) == 0:
            raise ValueError(
                f"timesteps: expected a non-empty int64 vector, got {t.dtype} of shape "
                f"{list(t.shape)}"
            )
        if c.dtype != torch.float64 or list(c.shape) != [len(t), 7]:
            raise ValueError(
                f"coefficients: expected float64 of shape [{len(t)}, 7], got {c.dtype} of shape "
                f"{list(c.shape)}"
            )
        if not torch.isfinite(c).all():
            raise ValueError("coefficients: expected finite numbers, got NaN or Inf")
        if int(t.min()) < 0:
            raise ValueError(f"timesteps: expected values >= 0, got {int(t.min())}")
        if not isinstance(self.schedule, (DiffusionSchedule, type(None))):
            raise TypeError(
                f"schedule: expected a DiffusionSchedule or None, got {type(self.schedule).__name__}"
            )

    @property
    def steps(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True, eq=False, repr=False)
class DiffusionSchedule:
    """The noise levels of a diffusion of K steps.

    ``q(x_t | x_0) = N(sqrt(alphas_cumprod[t]) x_0, (1 - alphas_cumprod[t]) I)``, t = 0 .. K-1.

    Schedules with the same betas are equal, have the same hash, and share what the ops derive from
    them: make a new one instead of changing its tensors in place.

    Args:
        betas: ``[K]``, each in (0, 1), with a product of 1 - betas in (0, 1) as float64 has it.

    Attributes, all float64 ``[K]`` on the CPU:
        betas: as given.
        alphas: 1 - betas.
        alphas_cumprod: abar, the running product of the alphas.
        alphas_cumprod_prev: abar one step earlier; 1 before the first.

    Raises:
        TypeError: ``betas`` isn't a floating-point tensor.
        ValueError: ``betas`` is empty, not a vector, or has a value outside (0, 1) or a NaN; or
            alphas_cumprod rounds to 1 or 0.
    """

    betas: Tensor
    alphas: Tensor = field(init=False)
    alphas_cumprod: Tensor = field(init=False)
    alphas_cumprod_prev: Tensor = field(init=False)

    def __post_init__(self) -> None:
        _check_vector("betas", self.betas)
        betas = self.betas.detach().to("cpu", torch.float64).clone()
        if (bad := _first_not((betas > 0) & (betas < 1))) is not None:
            raise ValueError(
                f"betas: expected values in (0, 1), got {float(betas[bad])} at index {bad}"
            )
        alphas = 1 - betas
        alphas_cumprod = torch.cumprod(alphas, 0)
        # No noise or no signal at all would be a division by zero in every sampler.
        least = torch.finfo(torch.float64).tiny
        if (bad := _first_not((alphas_cumprod >= least) & (alphas_cumprod < 1))) is not None:
            raise ValueError(
                "betas: expected alphas_cumprod, the running product of 1 - betas, to stay in "
                f"[{least:.2g}, 1), got {float(alphas_cumprod[bad]):.2g} at index {bad}"
            )
        before = torch.cat([betas.new_ones(1), alphas_cumprod[:-1]])
        # Not from NumPy: within torch.func's transforms a tensor may have no memory to look at.
        content = array("d", map(float, betas)).tobytes()
        for name, value in (
            ("betas", betas),
            ("alphas", alphas),
            ("alphas_cumprod", alphas_cumprod),
            ("alphas_cumprod_prev", before),
            ("_content", content),  # to compare by: bytes keep their hash
        ):
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DiffusionSchedule):
            return NotImplemented
        return bool(self._content == other._content)  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(self._content)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        ends = [
            f"{name} {float(values[0]):.4g} to {float(values[-1]):.4g}"
            for name, values in (("betas", self.betas), ("alphas_cumprod", self.alphas_cumprod))
        ]
        return f"<DiffusionSchedule K={self.K}, {', '.join(ends)}>"

    def __reduce__(self) -> tuple[type[DiffusionSchedule], tuple[Tensor]]:
        return type(self), (self.betas,)  # all else follows from them

    # -- the usual schedules ------------------------------------------------------------------

    @staticmethod
    def cosine(K: int) -> DiffusionSchedule:
        """Nichol & Dhariwal 2021, Eq. 17: abar(u) = cos^2((u + 0.008) / 1.008 * pi / 2).

        betas are limited to 0.999.
        """
        K = _check_steps(K)
        u = torch.arange(K + 1, dtype=torch.float64, device="cpu") / K
        abar = torch.cos((u + 0.008) / 1.008 * (math.pi / 2)) ** 2
        return DiffusionSchedule((1 - abar[1:] / abar[:-1]).clamp(max=0.999))

    @staticmethod
    def linear(K: int, beta_min: float = 1e-4, beta_max: float = 2e-2) -> DiffusionSchedule:
        """Ho et al. 2020: betas evenly spaced from ``beta_min`` to ``beta_max``, whatever K is.

        The default ends are meant for K = 1000. Fewer steps of them end far from noise: abar_K is
        4e-5 for K = 1000, 0.36 for 100 and 0.82 for 20 (see :attr:`ends_in_noise`). The same
        diffusion in any number of steps is ``vp(K, 0.1, 20)``, of which DDPM's 1000 are a
        discretisation (Song et al. 2021, Appendix C).
        """
        K = _check_steps(K)
        return DiffusionSchedule(
            torch.linspace(beta_min, beta_max, K, dtype=torch.float64, device="cpu")
        )

    @staticmethod
    def vp(K: int, b_min: float = 0.1, b_max: float = 10.0) -> DiffusionSchedule:
        """Variance preserving SDE in K steps (Xiao et al. 2022).

        alpha_t = exp(-b_min / K - (b_max - b_min) (2 t - 1) / (2 K^2)), t = 1 .. K.
        """
        K = _check_steps(K)
        t = torch.arange(1, K + 1, dtype=torch.float64, device="cpu")
        alphas = torch.exp(-b_min / K - 0.5 * (b_max - b_min) * (2 * t - 1) / K**2)
        return DiffusionSchedule(1 - alphas)

    @staticmethod
    def beta_cdf(K: int, a: float = 0.3, b: float = 0.1) -> DiffusionSchedule:
        """Levels of Diff-SR's released code: abar = 1 - BetaCDF(x; a, b) at K points of [0, 1].

        The first and last levels are replaced by their neighbours before the betas are formed, so
        that no level is noiseless or pure noise; K is at least 3.
        """
        K = _check_steps(K, least=3)
        if not (a > 0 and b > 0 and math.isfinite(a) and math.isfinite(b)):
            raise ValueError(f"a, b: expected positive finite numbers, got a={a}, b={b}")
        return DiffusionSchedule.from_alphas_cumprod(_beta_cdf_levels(K, a, b))

    @staticmethod
    def from_alphas_cumprod(alphas_cumprod: Tensor) -> DiffusionSchedule:
        """The schedule with these levels, a falling (or level) sequence in (0, 1).

        Raises:
            TypeError: ``alphas_cumprod`` isn't a floating-point tensor.
            ValueError: it is empty, not a vector, leaves (0, 1), rises, or has a NaN.
        """
        _check_vector("alphas_cumprod", alphas_cumprod)
        abar = alphas_cumprod.detach().to("cpu", torch.float64)
        before = torch.cat([abar.new_ones(1), abar[:-1]])
        if (bad := _first_not((abar > 0) & (abar < 1) & (abar <= before))) is not None:
            after = f" after {float(abar[bad - 1])}" if bad else ""
            raise ValueError(
                "alphas_cumprod: expected falling values in (0, 1), got "
                f"{float(abar[bad])}{after} at index {bad}"
            )
        # Equal neighbours (a repeated level) need a beta above 0 to stay a schedule.
        return DiffusionSchedule((1 - abar / before).clamp(min=torch.finfo(torch.float64).tiny))

    @property
    def K(self) -> int:
        """Number of steps."""
        return len(self.betas)

    @property
    def ends_in_noise(self) -> bool:
        """Whether a chain may start from N(0, I): abar_K is at most 0.02.

        What x_K still has of x_0, such a start leaves out. Of two modes at -0.8 and 0.8, of which the
        second has a share of 0.9, samples then give it 0.88 at abar_K = 0.02, 0.85 at 0.1 and 0.76 at
        0.36.
        """
        return bool(self.alphas_cumprod[-1] <= 0.02)

    # -- samplers -------------------------------------------------------------------------------

    def solver(
        self, name: str = "ddpm", *, steps: int | None = None, eta: float = 0.0
    ) -> SolverTable:
        """The table of a sampler; what torch.compile compiles takes one that was made outside.

        Args:
            name: one of

                * ``ddpm``: Ho et al. 2020, Eq. 7, with the predicted x0 clipped; DIPO's sampler.
                * ``ddpm_unclipped``: DIPO Eq. 12, no x0, nothing to clip but the result.
                * ``ddim``: Song et al. 2021, Eq. 12, noise controlled by ``eta``.
                * ``exponential_integrator``: DIPO Algorithm 1, the reverse Ornstein-Uhlenbeck SDE.
                * ``dpmpp_2m``: DPM-Solver++(2M), Lu et al. 2022, Algorithm 2.
            steps: number of steps to run, at most K. Fewer than K are evenly spaced; only ``ddim``
                and ``dpmpp_2m`` allow it.
            eta: noise of ``ddim``: 0 is deterministic, 1 has DDPM's variance.

        Raises:
            ValueError: unknown ``name``, or ``steps`` or ``eta`` that the sampler can't have.
        """
        if name not in SOLVERS:
            raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {name!r}")
        if steps is None:
            steps = self.K
        if not _is_integer(steps) or not 1 <= steps <= self.K:
            raise ValueError(
                f"steps: expected an integer in 1..{self.K} (the schedule's K), got {steps!r}"
            )
        if steps != self.K and name not in ("ddim", "dpmpp_2m"):
            raise ValueError(f"steps: {name} runs all {self.K} steps of its schedule, got {steps}")
        if name != "ddim" and eta != 0.0:
            raise ValueError(f"eta: only ddim has it, got eta={eta} for {name}")
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta: expected a number in [0, 1], got {eta}")
        return _solver_table(self, name, int(steps), float(eta))


def _check_vector(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a floating-point tensor, got {kind}")
    if value.ndim != 1 or len(value) == 0:
        raise ValueError(f"{name}: expected a non-empty vector, got shape {list(value.shape)}")


def _first_not(holds: Tensor) -> int | None:
    """The first index at which it doesn't hold."""
    return None if bool(holds.all()) else holds.tolist().index(False)


def _check_steps(K: int, least: int = 1) -> int:
    if not _is_integer(K):
        raise TypeError(f"K: expected an integer, got {type(K).__name__}")
    if K < least:
        raise ValueError(f"K: expected at least {least}, got {K}")
    return int(K)


def _is_integer(value: object) -> bool:
    """Whether it counts something: NumPy's integers do, truth values don't."""
    return isinstance(value, (int, Integral)) and not isinstance(value, bool)


def _beta_cdf_levels(K: int, a: float, b: float) -> Tensor:
    """1 - BetaCDF at linspace(0, 1, K), end points replaced by their neighbours."""
    # The density has integrable poles at 0 (x^(a-1)) and 1 ((1-x)^(b-1)) when a, b < 1. Each half
    # is integrated in the variable that removes its pole (v = x^a, w = (1-x)^b), with Gauss-
    # Legendre nodes on every subinterval, where the integrand is then smooth.
    nodes, weights = _gauss_legendre(64)
    x = torch.linspace(0, 1, K, dtype=torch.float64, device="cpu")

    def lower(upper: Tensor, p: float, q: float) -> Tensor:
        # integral_0^upper s^(p-1) (1-s)^(q-1) ds with v = s^p, upper <= 1/2
        v = (0.5 * (nodes + 1))[None, :] * (upper**p)[:, None]
        values = (1 - v ** (1 / p)) ** (q - 1) / p
        return (values * weights[None, :]).sum(1) * 0.5 * upper**p

    left = lower(x.clamp(max=0.5), a, b)
    right = lower((1 - x).clamp(max=0.5), b, a)
    half = torch.tensor([0.5], dtype=torch.float64, device="cpu")
    total = lower(half, a, b) + lower(half, b, a)
    abar = torch.where(x <= 0.5, 1 - left / total, right / total)
    return abar.clamp(min=abar[-2], max=abar[1])


@lru_cache(maxsize=1)
def _gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


# -- the samplers' coefficients -------------------------------------------------------------------


@kept
def _solver_table(schedule: DiffusionSchedule, name: str, steps: int, eta: float) -> SolverTable:
    if steps == schedule.K:
        t = torch.arange(schedule.K - 1, -1, -1, device="cpu")
    else:
        even = torch.linspace(schedule.K - 1, 0, steps, dtype=torch.float64, device="cpu")
        t = even.round().to(torch.int64)
    builders: dict[str, Callable[[DiffusionSchedule, Tensor], Tensor]] = {
        "ddpm": _ddpm,
        "ddpm_unclipped": _ddpm_unclipped,
        "ddim": lambda s, t: _ddim(s, t, eta),
        "exponential_integrator": _exponential_integrator,
        "dpmpp_2m": _dpmpp_2m,
    }
    return SolverTable(t, builders[name](schedule, t), schedule)


def _predict_x0(abar: Tensor) -> tuple[Tensor, Tensor]:
    """c0, c1 of x0 = sqrt(1/abar) x - sqrt(1/abar - 1) eps."""
    return (1 / abar).sqrt(), (1 / abar - 1).sqrt()


def _columns(*columns: Tensor | None) -> Tensor:
    like = next(c for c in columns if c is not None)
    return torch.stack([torch.zeros_like(like) if c is None else c for c in columns], dim=1)


def _ddpm(schedule: DiffusionSchedule, t: Tensor) -> Tensor:
    beta, alpha = schedule.betas[t], schedule.alphas[t]
    abar, before = schedule.alphas_cumprod[t], schedule.alphas_cumprod_prev[t]
    c0, c1 = _predict_x0(abar)
    posterior_mean_coef1 = beta * before.sqrt() / (1 - abar)
    posterior_mean_coef2 = (1 - before) * alpha.sqrt() / (1 - abar)
    sigma = _posterior_sigma(schedule, t)
    return _columns(c0, c1, posterior_mean_coef1, posterior_mean_coef2, None, sigma, None)


def _posterior_sigma(schedule: DiffusionSchedule, t: Tensor) -> Tensor:
    """Standard deviation of q(x_{t-1} | x_t, x_0); 0 at t = 0, where the released code adds none."""
    abar, before = schedule.alphas_cumprod[t], schedule.alphas_cumprod_prev[t]
    variance = schedule.betas[t] * (1 - before) / (1 - abar)
    return torch.where(t > 0, variance.clamp(min=1e-20).sqrt(), 0.0)


def _ddpm_unclipped(schedule: DiffusionSchedule, t: Tensor) -> Tensor:
    beta, alpha, abar = schedule.betas[t], schedule.alphas[t], schedule.alphas_cumprod[t]
    c0, c1 = _predict_x0(abar)
    c4 = -beta / ((1 - abar).sqrt() * alpha.sqrt())
    return _columns(c0, c1, None, 1 / alpha.sqrt(), c4, _posterior_sigma(schedule, t), None)


def _ddim(schedule: DiffusionSchedule, t: Tensor, eta: float) -> Tensor:
    abar = schedule.alphas_cumprod[t]
    target = torch.cat([abar[1:], abar.new_ones(1)])
    c0, c1 = _predict_x0(abar)
    sigma = eta * ((1 - target) / (1 - abar) * (1 - abar / target)).sqrt()
    c4 = (1 - target - sigma**2).clamp(min=0).sqrt()
    return _columns(c0, c1, target.sqrt(), None, c4, sigma, None)


def _exponential_integrator(schedule: DiffusionSchedule, t: Tensor) -> Tensor:
    # The OU process dx = -x dt + sqrt(2) dw has abar = exp(-2 time), so a step spans
    # h = -log(alpha) / 2, and the score is -eps / sqrt(1 - abar).
    alpha, abar = schedule.alphas[t], schedule.alphas_cumprod[t]
    c0, c1 = _predict_x0(abar)
    grow = 1 / alpha.sqrt()  # e^h
    c4 = -2 * (grow - 1) / (1 - abar).sqrt()
    return _columns(c0, c1, None, grow, c4, (grow**2 - 1).sqrt(), None)


def _dpmpp_2m(schedule: DiffusionSchedule, t: Tensor) -> Tensor:
    abar = schedule.alphas_cumprod[t]
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    # From each level to the next; the last step goes to the data itself (sigma 0), first order.
    alpha_to = torch.cat([alpha[1:], alpha.new_ones(1)])
    sigma_to = torch.cat([sigma[1:], sigma.new_zeros(1)])
    log_snr = torch.log(alpha / sigma)  # lambda in the paper
    h = torch.cat([log_snr[1:] - log_snr[:-1], log_snr.new_full((1,), math.inf)])
    c0, c1 = _predict_x0(abar)
    full = -alpha_to * torch.expm1(-h)
    # 1 / (2 r) with r = h_previous / h; after a step between equal levels there is no slope to take.
    correction = torch.zeros_like(full)
    correction[1:-1] = torch.where(h[:-2] > 0, h[1:-1] / (2 * h[:-2]), 0.0)
    c2, c6 = full * (1 + correction), -full * correction
    return _columns(c0, c1, c2, sigma_to / sigma, None, None, c6)
