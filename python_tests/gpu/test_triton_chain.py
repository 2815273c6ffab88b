"""The reverse chain on Triton. All sizes are small: without a GPU, kernels run in its interpreter."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    EPS_ONLY,
    SAMPLERS,
    assert_error_at_most_twice_eager,
    float32_table,
    golden_denoiser,
    load_golden,
    plain_denoiser,
    root_mean_square,
    rounded,
)
from torch import Tensor

from diffcore import DiffusionSchedule, nn, ops
from diffcore.ops.reverse_diffusion.native import chain
from diffcore.schedule import SOLVERS

# NumPy, in which the interpreter computes, reports where infinities and NaN come from.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

SCHEDULE = DiffusionSchedule.cosine(4)


def on(device: str, *values: Any) -> Any:
    return [v.to(device) for v in values]


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spread(denoiser: nn.Denoiser) -> nn.Denoiser:
    """Weights several times as large as at first, so that activations bend."""
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(2)
    return denoiser


# -- values ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", SAMPLERS)
def test_golden_chain(device: str, large_tiles: None, name: str) -> None:
    """The released code's chain with its own table; rows know nothing of each other, so 8 will do."""
    g = load_golden(f"dipo_sampler_{name}")
    denoiser = golden_denoiser(g).to(device)
    schedule = getattr(DiffusionSchedule, g["schedule"])(g["K"])
    rows = slice(0, 8)
    state, x_init, noise = on(device, g["state"][rows], g["x_T"][rows], g["noise"][:, rows])
    for action, scale in (("action_train", g["noise_ratio"]), ("action_eval", 0.0)):
        sample = ops.reverse_diffusion(
            denoiser,
            schedule,
            state,
            x_init=x_init,
            noise=noise,
            noise_scale=scale,
            solver=float32_table(schedule),
            backend="triton",
        )
        torch.testing.assert_close(sample.cpu(), g[action][rows], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_accuracy(device: str, activation: str) -> None:
    denoiser = spread(nn.Denoiser(5, 8, 33, 2, activation=activation)).to(device)
    state, x_init = on(device, torch.randn(130, 5), torch.randn(130, 8))
    arguments = {"schedule": SCHEDULE, "solver": EPS_ONLY, "clip": math.inf, "noise_scale": 0.0}
    native, eager = (
        ops.reverse_diffusion(denoiser, state=state, x_init=x_init, **arguments, backend=backend)
        for backend in ("triton", "reference")
    )
    exact = ops.reverse_diffusion(
        plain_denoiser(denoiser.cpu(), torch.float64),
        state=state.double().cpu(),
        x_init=x_init.double().cpu(),
        **arguments,
    )
    assert_error_at_most_twice_eager(native.cpu(), eager.cpu(), exact)


@torch.no_grad()
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers(device: str, solver: str) -> None:
    """Noise, x0 of the step before and clipping, each where the solver has them."""
    denoiser = spread(nn.Denoiser(5, 3, 16, 2)).to(device)
    state, x_init, noise = on(device, torch.randn(17, 5), torch.randn(17, 3), torch.randn(4, 17, 3))
    options: dict[str, Any] = {"noise_scale": 0.7, "clip": 0.8}
    options["solver"] = rounded(SCHEDULE.solver(solver))
    sample = ops.reverse_diffusion(
        denoiser, SCHEDULE, state, x_init=x_init, noise=noise, **options, backend="triton"
    )
    exact = ops.reverse_diffusion(
        plain_denoiser(denoiser.cpu(), torch.float64),
        SCHEDULE,
        state.double().cpu(),
        x_init=x_init.double().cpu(),
        noise=noise.double().cpu(),
        **options,
    )
    torch.testing.assert_close(sample.cpu().double(), exact, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("rows", "state_dim", "action_dim", "hidden_dim", "hidden_layers", "time_dim"),
    [
        (0, 5, 3, 16, 2, 32),
        (1, 1, 1, 1, 1, 2),
        (7, 3, 2, 7, 4, 8),
        (9, 40, 33, 65, 2, 32),  # actions and hidden activations in several blocks
        (33, 11, 3, 16, 1, 32),
        (5, 17, 70, 130, 3, 16),
        (3, 4, 2, 260, 2, 32),  # several blocks of outputs
    ],
)
def test_sizes(
    device: str,
    rows: int,
    state_dim: int,
    action_dim: int,
    hidden_dim: int,
    hidden_layers: int,
    time_dim: int,
) -> None:
    """Sizes that are multiples of nothing, noise drawn in the kernel."""
    sizes = (state_dim, action_dim, hidden_dim, hidden_layers, time_dim)
    denoiser = nn.Denoiser(*sizes).to(device)
    state = torch.randn(state_dim, rows, device=device).T  # not contiguous
    samples = [
        ops.reverse_diffusion(
            denoiser, DiffusionSchedule.linear(2), state, generator=seeded(), backend=backend
        )
        for backend in ("triton", "reference")
    ]
    assert samples[0].shape == (rows, action_dim)
    torch.testing.assert_close(*samples, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("hidden", [(12, 16), (16, 12)])
def test_hidden_layers_of_unequal_widths_are_refused(device: str, hidden: tuple[int, int]) -> None:
    denoiser = nn.Denoiser(5, 3, 16, 2)
    widths = [denoiser.trunk.in_dim, *hidden, 3]
    denoiser.trunk.layers = torch.nn.ModuleList(
        torch.nn.Linear(k, n) for k, n in itertools.pairwise(widths)
    )
    denoiser, state = denoiser.to(device), torch.randn(4, 5, device=device)
    with pytest.raises(ValueError, match="'triton' here: the trunk's hidden layers differ in width"):
        ops.reverse_diffusion(denoiser, SCHEDULE, state, backend="triton")


@torch.no_grad()
@pytest.mark.parametrize("noise_scale", [0.0, 0.3])
def test_noise_is_the_cpu_s(device: str, noise_scale: float) -> None:
    """x_init and noise that are drawn: a chain that adds nothing else shows them."""
    denoiser = nn.Denoiser(2, 5, 16, 1)
    for parameter in denoiser.parameters():
        parameter.zero_()
    options = {"noise_scale": noise_scale, "clip": math.inf}
    sample, expected = (
        ops.reverse_diffusion(
            denoiser.to(where),
            SCHEDULE,
            torch.zeros(40, 2, device=where),
            generator=seeded(2**40 + 3),
            backend=backend,
            **options,
        ).cpu()
        for where, backend in ((device, "triton"), ("cpu", "reference"))
    )
    assert expected.std() > 0.1
    torch.testing.assert_close(sample, expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_seed_on_the_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reads it by itself: what a captured graph does at every replay."""
    from diffcore.ops import _triton

    denoiser, state = nn.Denoiser(2, 5, 16, 1).to(device), torch.zeros(9, 2, device=device)

    def sample() -> Tensor:
        return ops.reverse_diffusion(
            denoiser, SCHEDULE, state, generator=seeded(), backend="triton"
        )

    expected = sample()
    monkeypatch.setattr(_triton, "seed_arguments", lambda seed: (0, seed.to(device)))
    assert torch.equal(sample(), expected)


@torch.no_grad()
def test_float16(device: str) -> None:
    denoiser = nn.Denoiser(5, 3, 48, 3).to(device)
    state = torch.randn(40, 5, device=device)
    arguments = (denoiser, SCHEDULE, state)
    full, half = (
        ops.reverse_diffusion(*arguments, generator=seeded(), compute_dtype=dtype, backend="triton")
        for dtype in (None, torch.float16)
    )
    torch.testing.assert_close(half, full, rtol=0, atol=2e-3)
    # Far more than float32 would be off: float16 is really used.
    assert root_mean_square(half - full) > 1e-6


@torch.no_grad()
def test_nan_stays_in_its_row(device: str) -> None:
    denoiser = nn.Denoiser(5, 3, 16, 2, activation="relu").to(device)
    state, x_init = torch.randn(20, 5), torch.randn(20, 3)
    state[3, 2] = math.nan
    x_init[11, 0] = math.nan
    state, x_init = on(device, state, x_init)
    sample = ops.reverse_diffusion(denoiser, SCHEDULE, state, x_init=x_init, backend="triton")
    assert sample.isnan().any(1).nonzero().flatten().tolist() == [3, 11]


@torch.no_grad()
def test_a_row_doesn_t_depend_on_its_place(device: str) -> None:
    denoiser, state = nn.Denoiser(5, 3, 16, 2).to(device), torch.randn(40, 5, device=device)
    x_init = torch.randn(40, 3, device=device)

    def sample(part: slice) -> Tensor:
        return ops.reverse_diffusion(
            denoiser,
            SCHEDULE,
            state[part],
            x_init=x_init[part],
            noise_scale=0.0,
            backend="triton",
        )

    whole = sample(slice(None))
    for part in (slice(0, 1), slice(7, 30), slice(39, 40)):
        torch.testing.assert_close(sample(part), whole[part], rtol=0, atol=1e-6)


# -- gradients and torch ---------------------------------------------------------------------------


def test_gradients(device: str) -> None:
    """From the trajectory that the kernel keeps."""
    denoiser = nn.Denoiser(5, 3, 16, 2).to(device)
    state, x_init = on(device, torch.randn(9, 5), torch.randn(9, 3))
    noise = torch.randn(4, 9, 3, device=device)
    leaves = [t.requires_grad_() for t in (state, x_init, noise)]

    def gradients(backend: str) -> tuple[Tensor, ...]:
        sample = ops.reverse_diffusion(
            denoiser, SCHEDULE, state, x_init=x_init, noise=noise, backend=backend
        )
        weights = torch.linspace(-1, 1, sample.numel(), device=device).view_as(sample)
        return torch.autograd.grad((sample * weights).sum(), [*leaves, *denoiser.parameters()])

    for a, b in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_trajectory(device: str) -> None:
    denoiser = nn.Denoiser(5, 3, 16, 2).to(device)
    state, x_init, noise = on(device, torch.randn(9, 5), torch.randn(9, 3), torch.randn(4, 9, 3))
    table = SCHEDULE.solver("dpmpp_2m")
    inputs = (state, x_init, noise, None, denoiser.weights_and_biases())
    coefficients, embedding = on(device, table.coefficients.float(), torch.randn(4, 32))
    settings = (coefficients, embedding, 1.0, 1.0, "mish", "float32", True)
    actions, trajectory = chain(*inputs, *settings, "triton")
    assert torch.equal(trajectory[0], x_init)
    assert torch.equal(trajectory[4].clamp(-1, 1), actions)
    expected = chain(*(on("cpu", *inputs[:3])), *inputs[3:], *settings, "cpu")
    for a, b in zip((actions, trajectory), expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-5)


def test_opcheck_and_vmap(device: str) -> None:
    denoiser = nn.Denoiser(5, 3, 16, 1).to(device)
    parameters = [p.detach() for p in denoiser.weights_and_biases()]
    state, x_init = on(device, torch.randn(4, 5), torch.randn(4, 3))
    table = on(device, torch.rand(2, 7), torch.rand(2, 32))
    arguments = (state, x_init, None, None, parameters, *table, 0.0, 1.0, "mish", "float32", True)
    torch.library.opcheck(chain.overload, (*arguments, "triton"))

    def sample(state: Tensor) -> Tensor:
        return ops.reverse_diffusion(
            denoiser, SCHEDULE, state, x_init=x_init, noise_scale=0.0, backend="triton"
        )

    states = torch.randn(3, 4, 5, device=device)
    one_by_one = torch.stack([sample(s) for s in states])
    torch.testing.assert_close(torch.vmap(sample)(states), one_by_one)
