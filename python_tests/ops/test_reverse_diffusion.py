"""The whole reverse chain: values, guarantees and errors. Gradients have a file of their own."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    AMX_EDGES,
    BATCHES,
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
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import diffcore
from diffcore import DiffusionSchedule, explain, nn, ops
from diffcore.ops import _native
from diffcore.ops.reverse_diffusion.native import chain
from diffcore.schedule import SOLVERS, SolverTable

# -- against the released code ---------------------------------------------------------------------


@dataclass
class Recorded:
    """A sampler file, with two tables of coefficients.

    The released code computes its schedule in float32, ours is float64. Of the coefficients, the
    rounding of 1 / abar - 1 alone moves the result of hopper_k50 (linear schedule: abar stays near
    1) by 1.7e-4, more than all other rounding of the chain together. So the chain's arithmetic is
    held against the recorded values with `float32_table`, coefficients computed as there; and the
    float64 schedule where the two agree well enough, and by which is nearer to the truth.
    """

    golden: dict[str, Any]
    denoiser: nn.Denoiser
    schedule: DiffusionSchedule
    float32_table: SolverTable

    def arguments(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        g = self.golden
        return {
            "schedule": self.schedule,
            "state": g["state"].to(dtype),
            "x_init": g["x_T"].to(dtype),
            "noise": g["noise"].to(dtype),
        }

    def sample(self, name: str, **options: Any) -> Tensor:
        scale = self.golden["noise_ratio"] if name == "action_train" else 0.0
        return ops.reverse_diffusion(
            self.denoiser, **self.arguments(), noise_scale=scale, **options
        )

    def exact(self, name: str) -> Tensor:
        """Everything in float64."""
        scale = self.golden["noise_ratio"] if name == "action_train" else 0.0
        denoiser = plain_denoiser(self.denoiser, torch.float64)
        return ops.reverse_diffusion(denoiser, **self.arguments(torch.float64), noise_scale=scale)


@functools.cache
def recorded(name: str) -> Recorded:
    golden = load_golden(f"dipo_sampler_{name}")
    schedule = getattr(DiffusionSchedule, golden["schedule"])(golden["K"])
    return Recorded(golden, golden_denoiser(golden), schedule, float32_table(schedule))


@torch.no_grad()
@pytest.mark.parametrize("action", ["action_train", "action_eval"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_golden_chain(backend: str, name: str, action: str) -> None:
    r = recorded(name)
    sample = r.sample(action, solver=r.float32_table, backend=backend)
    # The reference rounds as torch's matrix product does, which is not the same on every processor,
    # and a chain without noise magnifies that.
    atol = 1e-4 if backend == "reference" else 1e-5
    torch.testing.assert_close(sample, r.golden[action], rtol=0, atol=atol)


@torch.no_grad()
@pytest.mark.parametrize("action", ["action_train", "action_eval"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_golden_chain_with_the_float64_schedule(backend: str, name: str, action: str) -> None:
    r = recorded(name)
    sample = r.sample(action, backend=backend)
    if name != "hopper_k50":
        torch.testing.assert_close(sample, r.golden[action], rtol=0, atol=1e-4)
    exact = r.exact(action)
    assert (sample - exact).abs().max() < (r.golden[action] - exact).abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", SAMPLERS)
def test_golden_steps(backend: str, name: str) -> None:
    """x after the first step and halfway, not clamped yet: what the kernel keeps for gradients."""
    r = recorded(name)
    g, table = r.golden, r.float32_table
    if backend == "cpu":
        trajectory = chain(
            g["state"],
            g["x_T"],
            g["noise"],
            None,
            list(r.denoiser.parameters()),
            table.coefficients.float(),
            nn.time_embedding(table.timesteps, r.denoiser.time_dim).float(),
            g["noise_ratio"],
            1.0,
            r.denoiser.activation,
            "float32",
            True,
            "cpu",
        )[1]
    else:
        x, trajectory = g["x_T"], [g["x_T"]]
        for i, t in enumerate(table.timesteps):
            x, _ = ops.reverse_step(
                x,
                r.denoiser(x, g["state"], t.expand(len(x)), backend=backend),
                table.coefficients[i],
                noise=g["noise"][i],
                noise_scale=g["noise_ratio"],
                backend=backend,
            )
            trajectory.append(x)
    torch.testing.assert_close(trajectory[1], g["x_after_first_step"], rtol=0, atol=1e-5)
    torch.testing.assert_close(trajectory[g["K"] // 2], g["x_after_half"], rtol=0, atol=1e-4)
    torch.testing.assert_close(
        trajectory[g["K"]].clamp(-1, 1), g["action_train"], rtol=0, atol=1e-5
    )


# -- against float64 -------------------------------------------------------------------------------


@dataclass
class Problem:
    """Networks with inputs, and what eager PyTorch makes of them in float32 and float64.

    Several networks, because the error of a small one is one number drawn once with its weights.
    """

    runs: list[tuple[nn.Denoiser, dict[str, Any]]]
    eager: Tensor
    exact: Tensor

    @torch.no_grad()
    def native(self, **options: Any) -> Tensor:
        return torch.cat([ops.reverse_diffusion(d, **a, **options) for d, a in self.runs])


@functools.cache
@torch.no_grad()
def problem(
    sizes: tuple[int, int, int, int],
    activation: str,
    networks: int,
    rows: int,
    schedule: DiffusionSchedule,
    table: SolverTable,
    clip: float,
) -> Problem:
    torch.manual_seed(0)
    state_dim, action_dim, hidden_dim, hidden_layers = sizes

    runs, results = [], []
    for _ in range(networks):
        denoiser = nn.Denoiser(
            state_dim, action_dim, hidden_dim, hidden_layers, activation=activation
        )
        arguments = {
            "schedule": schedule,
            "state": torch.randn(rows, state_dim),
            "x_init": torch.randn(rows, action_dim),
            "noise": torch.randn(table.steps, rows, action_dim),
            "solver": table,
            "clip": clip,
        }
        runs.append((denoiser, arguments))
        results.append(
            [
                ops.reverse_diffusion(
                    plain_denoiser(denoiser, dtype),
                    **{
                        name: value.to(dtype) if isinstance(value, Tensor) else value
                        for name, value in arguments.items()
                    },
                )
                for dtype in (torch.float32, torch.float64)
            ]
        )
    eager, exact = (torch.cat(column) for column in zip(*results, strict=True))
    return Problem(runs, eager, exact)


#: (state, action, hidden, layers), activation, networks, rows
SIZES = [
    ((1, 1, 1, 1), "mish", 128, 8),
    ((1, 1, 3, 2), "tanh", 128, 8),
    ((2, 1, 17, 1), "elu", 16, 64),
    ((17, 6, 31, 2), "silu", 4, 65),
    ((17, 6, 32, 2), "relu", 4, 65),
    ((17, 6, 33, 2), "identity", 4, 65),
    ((11, 3, 100, 3), "mish", 4, 130),
    ((376, 17, 64, 2), "silu", 1, 130),
    ((376, 17, 48, 1), "elu", 1, 130),
    ((11, 33, 3, 4), "relu", 4, 65),
    ((3, 33, 16, 4), "tanh", 4, 65),
    ((17, 6, 256, 3), "mish", 1, 257),
]


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_accuracy_of_the_predicted_noise(isa: str, case: tuple[Any, ...]) -> None:
    """One evaluation of the network, which no coefficient amplifies."""
    p = problem(*case, schedules("linear"), EPS_ONLY, math.inf)
    assert_error_at_most_twice_eager(p.native(), p.eager, p.exact)


@pytest.mark.parametrize("clip", [1.0, math.inf])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_accuracy_of_the_chain(isa: str, schedule: str, solver: str, clip: float) -> None:
    s = schedules(schedule)
    table = rounded(s.solver(solver))
    p = problem((17, 6, 64, 2), "mish", 1, 257, s, table, clip)
    assert_error_at_most_twice_eager(p.native(), p.eager, p.exact, amplified=True)


@functools.cache
def schedules(name: str) -> DiffusionSchedule:
    return getattr(DiffusionSchedule, name)(10)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_accuracy_with_fewer_steps(isa: str, solver: str, steps: int) -> None:
    s = schedules("linear")
    table = rounded(s.solver(solver, steps=steps))
    p = problem((17, 6, 33, 2), "silu", 1, 257, s, table, 1.0)
    assert_error_at_most_twice_eager(p.native(), p.eager, p.exact, amplified=True)


@torch.no_grad()
def test_a_name_stands_for_its_table(backend: str) -> None:
    schedule, denoiser, state = (
        DiffusionSchedule.cosine(8),
        nn.Denoiser(5, 3, 16),
        torch.randn(9, 5),
    )
    noise, x = torch.randn(8, 9, 3), torch.randn(9, 3)
    for solver in SOLVERS:
        by_name, by_table = (
            ops.reverse_diffusion(
                denoiser, schedule, state, x_init=x, noise=noise, solver=s, backend=backend
            )
            for s in (solver, schedule.solver(solver))
        )
        assert torch.equal(by_name, by_table)


@torch.no_grad()
def test_activations_over_the_whole_range(isa: str) -> None:
    """A network of width one is its activation: eps = f(state), from tiny to huge arguments."""
    tiny, huge = torch.logspace(-30, 0, 500), torch.logspace(0, 37, 500)
    z = torch.cat([torch.linspace(-30, 30, 5000), tiny, -tiny, huge, -huge, torch.zeros(1)])
    for activation, function in ACTIVATIONS.items():
        denoiser = nn.Denoiser(1, 1, 1, 1, activation=activation)
        for parameter in denoiser.parameters():
            parameter.zero_()
        denoiser.trunk.layers[0].weight[0, -1] = 1
        denoiser.trunk.layers[1].weight[0, 0] = 1
        eps = predicted_noise(denoiser, z[:, None])[:, 0]
        exact = function(z.double())
        # Rounding, and polynomials good for 2 ulp, on both sides of a quotient.
        ulp = torch.finfo(torch.float32).eps
        torch.testing.assert_close(eps.double(), exact, rtol=4 * ulp, atol=1e-30)


@torch.no_grad()
def predicted_noise(denoiser: nn.Denoiser, state: Tensor, **options: Any) -> Tensor:
    rows, columns = len(state), denoiser.action_dim
    return ops.reverse_diffusion(
        denoiser,
        DiffusionSchedule.linear(5),
        state,
        x_init=torch.zeros(rows, columns),
        noise=torch.zeros(1, rows, columns),
        solver=EPS_ONLY,
        clip=math.inf,
        backend="cpu",
        **options,
    )


# -- bfloat16 --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", SAMPLERS)
def test_bfloat16_chain(isa: str, name: str) -> None:
    """The bound of the docstring, on trained-size networks: about 1e-2 over a whole chain."""
    r = recorded(name)
    half = r.sample("action_train", compute_dtype=torch.bfloat16, backend="cpu")
    full = r.sample("action_train", backend="cpu")
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0, atol=1e-2)
    assert root_mean_square(half - full) < 2e-3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16_network(isa: str, activation: str) -> None:
    """A bound from the rounding itself: every hidden layer's inputs and weights are off by at most
    2^-9 of themselves, and no activation here stretches a difference by more than 1.1."""
    denoiser = nn.Denoiser(17, 6, 40, 3, activation=activation)
    x, state = torch.randn(65, 6), torch.randn(65, 17)
    time = denoiser.time_mlp(nn.time_embedding(torch.tensor([3]), 32).float()).expand(65, -1)
    with torch.no_grad():
        h = torch.cat([x, time, state], dim=1).double()
        error = torch.zeros_like(h)
        for i, layer in enumerate(denoiser.trunk.layers):
            weight, bias = layer.weight.double(), layer.bias.double()
            if i > 0:  # the first layer is in float32
                error = error + 2 * 2**-9 * (1 + 2**-9) * (h.abs() + error)
            error = error @ weight.abs().T + 1e-6  # and what float32 itself adds
            h = h @ weight.T + bias
            if i < 3:
                h, error = ACTIVATIONS[activation](h), 1.1 * error
        eps = ops.reverse_diffusion(
            denoiser,
            DiffusionSchedule.linear(5),
            state,
            x_init=x,
            noise=torch.zeros(1, 65, 6),
            solver=EPS_ONLY,
            clip=math.inf,
            compute_dtype=torch.bfloat16,
        )
    assert ((eps - h).abs() <= error).all()
    # Far more than float32 would be off: bfloat16 is really used.
    assert (eps - h).abs().max() > 2**-12 * h.abs().max()


@torch.no_grad()
def test_bfloat16_rounds_like_torch(isa: str) -> None:
    """To nearest, ties to even: a layer of one input and weight 1 shows the rounded value."""
    denoiser = nn.Denoiser(1, 1, 1, 1, activation="identity")
    for parameter in denoiser.parameters():
        parameter.zero_()
    denoiser.trunk.layers[0].weight[0, -1] = 1
    denoiser.trunk.layers[1].weight[0, 0] = 1
    ties = 1 + torch.arange(256) / 2**8  # every second one lies between two neighbours
    values = torch.cat([ties, -ties, torch.randn(1000), torch.logspace(-30, 30, 1000)])
    eps = predicted_noise(denoiser, values[:, None], compute_dtype=torch.bfloat16)[:, 0]
    assert torch.equal(eps, values.bfloat16().float())
    # Weights are rounded the same way: ties down and up, and others.
    for value in [*ties[1::8].tolist(), *ties[3::8].tolist(), *values[512::100].tolist()]:
        denoiser.trunk.layers[1].weight[0, 0] = value
        eps = predicted_noise(denoiser, torch.ones(1, 1), compute_dtype=torch.bfloat16)
        assert eps.item() == torch.tensor(value).bfloat16().item()


# -- guarantees ------------------------------------------------------------------------------------


def guarantee_problem(
    hidden: int = 100,
) -> tuple[nn.Denoiser, DiffusionSchedule, dict[str, Tensor]]:
    denoiser = nn.Denoiser(17, 6, hidden, 2)
    return (
        denoiser,
        DiffusionSchedule.cosine(7),
        {
            "state": torch.randn(257, 17),
            "x_init": torch.randn(257, 6),
            "noise": torch.randn(7, 257, 6),
        },
    )


@torch.no_grad()
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_threads_and_repeats_don_t_matter(
    isa: str, set_threads: Callable[[int], None], compute_dtype: torch.dtype
) -> None:
    denoiser, schedule, tensors = guarantee_problem()
    for rows in (1, 9, 64, 65, 257):
        given_rows = {
            name: v[:, :rows] if name == "noise" else v[:rows] for name, v in tensors.items()
        }
        results = []
        for threads in (1, 2, 3, 2, 1):
            set_threads(threads)
            results.append(
                ops.reverse_diffusion(denoiser, schedule, **given_rows, compute_dtype=compute_dtype)
            )
        for other in results[1:]:
            assert torch.equal(results[0], other)


#: (hidden, layers): one wide layer or several, none at all, fewer panels than threads, a narrow last
#: panel, panels that don't come out even.
TEAM_SIZES = [(3, 2), (20, 1), (33, 3), (100, 2), (160, 6), (256, 4), (1024, 2)]


@torch.no_grad()
@pytest.mark.parametrize("given_noise", [True, False], ids=["given", "drawn"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("hidden", "layers"), TEAM_SIZES)
def test_a_team_s_size_doesn_t_matter(
    isa: str,
    teams: None,
    set_threads: Callable[[int], None],
    hidden: int,
    layers: int,
    precision: str,
    given_noise: bool,
) -> None:
    """Fewer than 8 rows are run by all threads together; every x on the way is the same."""
    denoiser = nn.Denoiser(17, 6, hidden, layers)
    steps = 10  # the noise of a single row is drawn for 8 at a time
    table = DiffusionSchedule.cosine(steps).solver("ddpm")
    embedding = nn.time_embedding(table.timesteps, denoiser.time_dim).float()
    has_work_for_two = layers > 1
    for rows in range(1, 10):
        noise = (torch.randn(rows, 6), torch.randn(steps, rows, 6), None)
        inputs = noise if given_noise else (None, None, torch.tensor(7))

        def run(
            threads: int, state: Tensor, inputs: tuple[Tensor | None, ...]
        ) -> tuple[Tensor, Tensor]:
            set_threads(threads)
            return chain(
                state,
                *inputs,
                list(denoiser.parameters()),
                table.coefficients.float(),
                embedding,
                1.0,
                1.0,
                denoiser.activation,
                precision,
                True,
                "cpu",
            )

        state = torch.randn(rows, 17)
        expected = run(1, state, inputs)
        assert torch.isfinite(expected[1]).all()
        for threads in (2, 3, 4, 2):
            before = _native._core.teams_run()
            results = run(threads, state, inputs)
            assert _native._core.teams_run() - before == (rows < 8 and has_work_for_two)
            for result, one_thread_s in zip(results, expected, strict=True):
                assert torch.equal(result, one_thread_s)


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", AMX_EDGES)
def test_a_row_doesn_t_depend_on_its_batch(
    isa: str,
    set_threads: Callable[[int], None],
    hidden: int,
    compute_dtype: torch.dtype,
    threads: int,
) -> None:
    set_threads(threads)
    denoiser, schedule, v = guarantee_problem(hidden)
    whole = ops.reverse_diffusion(denoiser, schedule, **v, compute_dtype=compute_dtype)
    for rows in BATCHES:
        for first in (0, 257 - rows):
            part = slice(first, first + rows)
            alone = ops.reverse_diffusion(
                denoiser,
                schedule,
                v["state"][part],
                x_init=v["x_init"][part],
                noise=v["noise"][:, part],
                compute_dtype=compute_dtype,
            )
            assert torch.equal(alone, whole[part])


@torch.no_grad()
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["state", "x_init", "noise"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_in_its_row(
    backend: str, activation: str, name: str, compute_dtype: torch.dtype
) -> None:
    denoiser = nn.Denoiser(5, 3, 33, 2, activation=activation)
    tensors = {
        "state": torch.randn(70, 5),
        "x_init": torch.randn(70, 3),
        "noise": torch.randn(4, 70, 3),
    }
    for row in (0, 66):
        tensors[name][..., row, 1] = math.nan
    actions = ops.reverse_diffusion(
        denoiser,
        DiffusionSchedule.linear(4),
        **tensors,
        backend=backend,
        compute_dtype=compute_dtype,
    )
    rows_with_nan = torch.nonzero(actions.isnan().any(dim=1)).flatten().tolist()
    assert rows_with_nan == [0, 66]
    assert torch.isfinite(actions[1:66]).all()


@torch.no_grad()
@given(
    rows=st.integers(0, 9),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(1, 3)),
    steps=st.integers(1, 4),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    layout=st.sampled_from(["transposed", "every second", "shifted", "expanded"]),
)
def test_any_shape_and_stride(
    isa: str,
    rows: int,
    sizes: tuple[int, int, int, int],
    steps: int,
    activation: str,
    layout: str,
) -> None:
    state_dim, action_dim, hidden_dim, hidden_layers = sizes
    denoiser = nn.Denoiser(state_dim, action_dim, hidden_dim, hidden_layers, activation=activation)

    def draw(*shape: int) -> Tensor:
        if layout == "transposed":
            return torch.randn(*reversed(shape)).permute(*range(len(shape) - 1, -1, -1))
        if layout == "every second":
            return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
        if layout == "shifted":  # contiguous, but not aligned
            return torch.randn(math.prod(shape) + 1)[1:].view(shape)
        return torch.randn(shape[-1]).expand(shape)

    schedule, tensors = (
        DiffusionSchedule.linear(steps),
        {
            "state": draw(rows, state_dim),
            "x_init": draw(rows, action_dim),
            "noise": draw(steps, rows, action_dim),
        },
    )
    before = {name: value.clone() for name, value in tensors.items()}
    native = ops.reverse_diffusion(denoiser, schedule, **tensors)
    assert native.shape == (rows, action_dim)
    assert native.is_contiguous()
    assert torch.equal(native, ops.reverse_diffusion(denoiser, schedule, **before))
    for name, value in tensors.items():
        assert torch.equal(value, before[name])
    reference = ops.reverse_diffusion(denoiser, schedule, **tensors, backend="reference")
    # Weights of standard deviation 1 / (2 sqrt(in)) amplify nothing: rounding of a few operations.
    torch.testing.assert_close(native, reference, rtol=0, atol=1e-5)


@torch.no_grad()
@given(
    magnitude=st.integers(-40, 15),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    solver=st.sampled_from(SOLVERS),
)
def test_finite_input_gives_actions_in_range(
    isa: str, magnitude: int, activation: str, solver: str
) -> None:
    denoiser = nn.Denoiser(3, 2, 9, 2, activation=activation)
    scale = 10.0**magnitude
    actions = ops.reverse_diffusion(
        denoiser,
        DiffusionSchedule.cosine(5),
        torch.randn(7, 3) * scale,
        x_init=torch.randn(7, 2) * scale,
        noise=torch.randn(5, 7, 2) * scale,
        clip=0.5,
        solver=solver,
    )
    assert (actions.abs() <= 0.5).all()


@torch.no_grad()
def test_weights_of_any_layout(isa: str) -> None:
    schedule, denoiser = DiffusionSchedule.linear(4), nn.Denoiser(5, 3, 16, 2)
    arguments = {"x_init": torch.randn(9, 3), "noise": torch.randn(4, 9, 3)}
    state = torch.randn(9, 5)
    expected = ops.reverse_diffusion(denoiser, schedule, state, **arguments)
    for parameter in denoiser.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.T.contiguous().T
            assert not parameter.is_contiguous()
    assert torch.equal(ops.reverse_diffusion(denoiser, schedule, state, **arguments), expected)


# -- what runs where -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "dtype", "reason"),
    [
        ({}, torch.float32, None),
        ({"hidden_layers": 15}, torch.float32, None),
        ({"hidden_layers": 16}, torch.float32, "17 layers, the CPU kernels take at most 16"),
        ({}, torch.float64, "a tensor is torch.float64"),
        ({}, torch.bfloat16, "a tensor is torch.bfloat16"),
    ],
)
def test_what_kernels_can_t_take_runs_on_the_reference(
    options: dict[str, Any], dtype: torch.dtype, reason: str | None
) -> None:
    denoiser = nn.Denoiser(5, 3, **{"hidden_dim": 8, **options}).to(dtype)
    arguments = (denoiser, DiffusionSchedule.linear(4), torch.randn(6, 5).to(dtype))
    answer = diffcore.explain("reverse_diffusion", *arguments)
    assert answer.backend == ("cpu" if reason is None else "reference")
    actions = ops.reverse_diffusion(*arguments)
    assert actions.dtype == dtype
    assert actions.shape == (6, 3)
    if reason is None:
        assert answer.passed_over == {}
    else:
        assert reason in answer.passed_over["cpu"]
        with pytest.raises(ValueError, match=r"^backend: reverse_diffusion can't run on 'cpu'"):
            ops.reverse_diffusion(*arguments, backend="cpu")


@torch.no_grad()
def test_any_callable_is_a_denoiser() -> None:
    """The schedule's own noise as prediction: x0 is exact at once, the chain ends at 0."""
    schedule = DiffusionSchedule.cosine(20)

    def denoiser(x: Tensor, state: Tensor, t: Tensor) -> Tensor:
        return x / (1 - schedule.alphas_cumprod[t])[:, None].sqrt()

    state, x = torch.zeros(5, 2).double(), torch.randn(5, 3).double()
    actions = ops.reverse_diffusion(denoiser, schedule, state, x_init=x, noise_scale=0.0)
    torch.testing.assert_close(actions, torch.zeros_like(x))


def test_meta_tensors() -> None:
    """Everything on another device runs on the reference."""
    with torch.device("meta"):
        denoiser, state = nn.Denoiser(5, 3, 8), torch.randn(6, 5)
    actions = ops.reverse_diffusion(denoiser, DiffusionSchedule.linear(4), state)
    assert actions.shape == (6, 3)
    assert actions.device.type == "meta"


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"denoiser": None}, TypeError, "^denoiser: expected a Denoiser or a callable"),
        ({"schedule": "cosine"}, TypeError, "^schedule: expected a DiffusionSchedule, got str"),
        ({"state": [[0.0] * 5]}, TypeError, "^state: expected a tensor, got list"),
        ({"state": torch.ones(2, 5).long()}, TypeError, "^state: .* got torch.int64"),
        ({"state": torch.ones(5)}, ValueError, r"^state: expected shape \[B, 5\], got \[5\]"),
        ({"state": torch.ones(2, 4)}, ValueError, r"^state: expected shape \[B, 5\], got \[2, 4\]"),
        ({"state": torch.ones(2, 0)}, ValueError, r"^state: expected shape \[B, 5\], got \[2, 0\]"),
        (
            {"state": torch.ones(2, 5).double(), "x_init": None, "noise": None},
            TypeError,
            "^state: expected torch.float32 like the denoiser, got torch.float64",
        ),
        (
            {"state": torch.ones(2, 5, device="meta"), "x_init": None, "noise": None},
            ValueError,
            "^state: expected to be on cpu like the denoiser, is on meta",
        ),
        ({"x_init": 0.0}, TypeError, "^x_init: expected a tensor, got float"),
        ({"x_init": torch.ones(3, 3)}, ValueError, r"^x_init: .* \[2, 3\], got \[3, 3\]"),
        ({"x_init": torch.ones(2, 2)}, ValueError, r"^x_init: .* \[2, 3\], got \[2, 2\]"),
        ({"x_init": torch.ones(2, 3).double()}, TypeError, "^x_init: expected torch.float32 like"),
        ({"x_init": torch.ones(2, 3).int()}, TypeError, "^x_init: .* got torch.int32"),
        ({"x_init": torch.ones(2, 3, device="meta")}, ValueError, "^x_init: .* is on meta"),
        ({"noise": torch.ones(3, 2, 3)}, ValueError, r"^noise: .* \[4, 2, 3\], got \[3, 2, 3\]"),
        ({"noise": torch.ones(2, 3)}, ValueError, "^noise: "),
        ({"noise": torch.ones(4, 2, 3).half()}, TypeError, "^noise: "),
        ({"noise": torch.ones(4, 2, 3, device="meta")}, ValueError, "^noise: .* is on meta"),
        ({"noise_scale": -0.1}, ValueError, "^noise_scale: expected at least 0.0, got -0.1"),
        ({"noise_scale": math.nan}, ValueError, "^noise_scale: expected a finite number"),
        ({"noise_scale": math.inf}, ValueError, "^noise_scale: "),
        ({"noise_scale": True}, TypeError, "^noise_scale: expected a number, got bool"),
        ({"clip": 0.0}, ValueError, "^clip: expected more than 0.0, got 0.0"),
        ({"clip": -1}, ValueError, "^clip: "),
        ({"clip": math.nan}, ValueError, "^clip: "),
        ({"clip": None}, TypeError, "^clip: expected a number, got NoneType"),
        ({"solver": "euler"}, ValueError, "^solver: expected one of ddpm, .*, got 'euler'"),
        ({"solver": 3}, TypeError, "^solver: expected a name or a SolverTable, got int"),
        (
            {"solver": DiffusionSchedule.linear(4).solver("ddim", steps=2)},
            ValueError,
            r"^noise: expected shape \[2, 2, 3\]",
        ),
        ({"generator": 7}, TypeError, "^generator: expected a torch.Generator, got int"),
        (
            {"denoiser": lambda x, s, t: x[:, :1]},
            ValueError,
            r"^denoiser: expected it to return shape \[2, 3\] like x, got \[2, 1\]",
        ),
        ({"denoiser": lambda x, s, t: None}, TypeError, "^denoiser: .* a tensor, got NoneType"),
        (
            {"solver": rounded(DiffusionSchedule.linear(9).solver("ddim", steps=4))},
            ValueError,
            "^solver: expected levels of the schedule, 0 to 3, got a table of another .* to 8",
        ),
        ({"compute_dtype": torch.float64}, ValueError, "^compute_dtype: "),
        ({"compute_dtype": "bfloat16"}, ValueError, "^compute_dtype: .* got 'bfloat16'"),
        ({"backend": "gpu"}, ValueError, "^backend: expected one of .*got 'gpu'"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "denoiser": nn.Denoiser(5, 3, 8),
        "schedule": DiffusionSchedule.linear(4),
        "state": torch.ones(2, 5),
        "x_init": torch.ones(2, 3),
        "noise": torch.ones(4, 2, 3),
    }
    with pytest.raises(error, match=message):
        ops.reverse_diffusion(**{**arguments, **change})


@torch.no_grad()
def test_a_table_of_another_schedule_is_refused(backend: str) -> None:
    schedule, denoiser, state = DiffusionSchedule.cosine(8), nn.Denoiser(5, 3, 8), torch.ones(2, 5)

    generator = torch.Generator()

    def act(table: SolverTable) -> Tensor:
        generator.manual_seed(0)
        return ops.reverse_diffusion(
            denoiser, schedule, state, solver=table, generator=generator, backend=backend
        )

    levels = schedule.alphas_cumprod.clone()
    levels[-1] *= 2
    nearly = DiffusionSchedule.from_alphas_cumprod(levels)
    for other in (DiffusionSchedule.vp(8), DiffusionSchedule.cosine(4), nearly):
        message = f"solver: expected a table of {schedule}, got one of {other}"
        for _ in range(2):  # what is known of a table is kept, an error too
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                act(other.solver("ddim"))
            untouched = torch.Generator().manual_seed(0).get_state()
            assert torch.equal(generator.get_state(), untouched)
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                explain("reverse_diffusion", denoiser, schedule, state, solver=other.solver("ddim"))
    # The same levels made anew, come through float32, or copied with their table.
    expected = act(schedule.solver("ddim", steps=4))
    again = DiffusionSchedule.cosine(8).solver("ddim", steps=4)
    rounded = DiffusionSchedule(schedule.betas.float()).solver("ddim", steps=4)
    for table in (again, rounded, copy.deepcopy(again)):
        torch.testing.assert_close(act(table), expected, rtol=0, atol=1e-3)


def test_a_chain_knows_nothing_of_the_one_before(isa: str) -> None:
    """Which leaves its last x0 and noise in memory that the next one uses again."""
    schedule, denoiser = DiffusionSchedule.cosine(4), nn.Denoiser(5, 3, 8).requires_grad_(False)
    state, x = torch.randn(9, 5), torch.randn(9, 3)
    steps = torch.tensor([[0.5, 0.1, 0.3, 0.2, 0.1, 0.4, 0.7]] * 2, dtype=torch.float64)
    table = SolverTable(torch.tensor([3, 0]), steps)
    options = {"x_init": x, "noise_scale": 0.0, "solver": table}
    expected = ops.reverse_diffusion(denoiser, schedule, state, **options, backend="reference")
    for noise in (torch.zeros(2, 9, 3), torch.full((2, 9, 3), torch.nan)):
        before = {**options, "noise": noise, "noise_scale": 1.0}
        ops.reverse_diffusion(denoiser, schedule, state, **before, backend="cpu")
        actions = ops.reverse_diffusion(denoiser, schedule, state, **options, backend="cpu")
        torch.testing.assert_close(actions, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_more_steps_than_fit_a_tile(isa: str, threads: int, set_threads: Any) -> None:
    set_threads(threads)
    schedule, state, x = DiffusionSchedule.vp(150), torch.randn(3, 5), torch.randn(3, 3)
    denoiser = nn.Denoiser(5, 3, 8).requires_grad_(False)
    options = {"x_init": x, "noise_scale": 0.0}
    actions, expected = (
        ops.reverse_diffusion(denoiser, schedule, state, **options, backend=backend)
        for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(actions, expected, rtol=0, atol=1e-4)


def test_levels_next_to_nothing_are_told_apart() -> None:
    schedule = DiffusionSchedule.cosine(1000)
    levels = schedule.alphas_cumprod.clone()
    levels[-1] *= 2
    assert levels[-1] < 1e-8  # what torch takes for equal to any other so small
    table = DiffusionSchedule.from_alphas_cumprod(levels).solver("ddim", steps=2)
    with pytest.raises(ValueError, match="^solver: expected a table of"):
        ops.reverse_diffusion(nn.Denoiser(5, 3, 8), schedule, torch.ones(2, 5), solver=table)


def test_a_callable_needs_a_start() -> None:
    message = r"^x_init: expected it to be given, since the denoiser isn't a diffcore.nn.Denoiser$"
    with pytest.raises(ValueError, match=message):
        ops.reverse_diffusion(lambda x, s, t: x, DiffusionSchedule.linear(4), torch.ones(2, 5))


@pytest.mark.parametrize("known", [True, False])
def test_compiles_with_chains_of_several_tables(known: bool) -> None:
    """Each keeps its own constants; losses among them have tables as well."""
    ours, state, x = nn.Denoiser(5, 3, 8), torch.randn(2, 5), torch.randn(2, 3)
    denoiser = ours if known else lambda x, s, t: ours(x, s, t)
    schedules = DiffusionSchedule.linear(4), DiffusionSchedule.cosine(4)
    t, noise = torch.tensor([0, 3]), torch.randn(2, 3)
    table = schedules[0].solver("ddim", steps=2)

    def results(state: Tensor) -> list[Tensor]:
        given = {"x_init": x, "noise_scale": 0.0}
        acts = [ops.reverse_diffusion(denoiser, s, state, **given) for s in schedules]
        fewer = ops.reverse_diffusion(denoiser, schedules[0], state, solver=table, **given)
        losses = [ops.denoising_loss(denoiser, s, state, x, t=t, noise=noise) for s in schedules]
        return [*acts, fewer, *losses]

    compiled = torch.compile(results, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(state), results(state), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "solver", ["ddpm", DiffusionSchedule.linear(4).solver("ddim", steps=2)], ids=["name", "table"]
)
def test_compiles_on_the_reference(solver: str | SolverTable, dynamic: bool | None) -> None:
    schedule, x = DiffusionSchedule.linear(4), torch.randn(2, 3)
    noise = torch.randn(4, 2, 3)

    def act(state: Tensor) -> Tensor:
        given = {"x_init": x, "noise": noise if solver == "ddpm" else noise[:2]}
        return ops.reverse_diffusion(lambda x, s, t: x, schedule, state, solver=solver, **given)

    state = torch.ones(2, 5)
    compiled = torch.compile(act, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert torch.allclose(compiled(state), act(state), atol=1e-6)
