"""The CUDA kernels of the reverse chain and of one step: against the released code's record, float64,
and the noise that the reference draws."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from typing import Any

import emulated
import pytest
import torch
from conftest import ON_GPU
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
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffcore import DiffusionSchedule, nn, ops
from diffcore.ops import _native
from diffcore.ops._philox import draw_seed, normals
from diffcore.ops.reverse_diffusion import native
from diffcore.schedule import SOLVERS, SolverTable

PRECISIONS = ("float32", "tf32", "bfloat16", "float16")


def sample(cuda: str, denoiser: nn.Denoiser, **arguments: Any) -> Tensor:
    """The kernel's result, on the CPU; the denoiser goes to the device and stays there."""
    denoiser.to(cuda)
    on_device = {
        name: value.to(cuda) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    with torch.no_grad():
        return ops.reverse_diffusion(denoiser, **on_device, backend="cuda").cpu()


def chain(
    cuda: str, denoiser: nn.Denoiser, table: SolverTable, *tensors: Tensor | None, **changed: Any
) -> tuple[Tensor, Tensor]:
    """(actions, trajectory) of the op itself, which knows more than the public function asks for."""
    denoiser.to(cuda)
    options = {"noise_scale": 1.0, "clip": 1.0, "precision": "float32", "keep": True, **changed}
    inputs = [None if t is None else t.to(cuda) for t in tensors]
    with torch.no_grad():
        actions, trajectory = native.chain(
            *inputs,
            [p.detach() for p in denoiser.weights_and_biases()],
            table.coefficients.float().to(cuda),
            nn.time_embedding(table.timesteps, denoiser.time_dim).float().to(cuda),
            options["noise_scale"],
            options["clip"],
            denoiser.activation,
            options["precision"],
            options["keep"],
            "cuda",
        )
    return actions.cpu(), trajectory.cpu()


# -- against the released code ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "other"), [*zip(SAMPLERS, ("alone", "streaming", "grid"), strict=True)]
)
def test_golden_chain(cuda: str, monkeypatch: pytest.MonkeyPatch, name: str, other: str) -> None:
    """Training's actions with all that is on the way, in clusters; evaluation's another way."""
    g = load_golden(f"dipo_sampler_{name}")
    denoiser = golden_denoiser(g)
    schedule = getattr(DiffusionSchedule, g["schedule"])(g["K"])
    table = float32_table(schedule)
    inputs = g["state"], g["x_T"], g["noise"], None
    if not ON_GPU:
        monkeypatch.setenv("CUDA_ON_CPU_DEVICE", emulated.DEVICES["clusters"])
    actions, trajectory = chain(cuda, denoiser, table, *inputs, noise_scale=g["noise_ratio"])
    torch.testing.assert_close(actions, g["action_train"], rtol=0, atol=1e-5)
    torch.testing.assert_close(trajectory[1], g["x_after_first_step"], rtol=0, atol=1e-5)
    torch.testing.assert_close(trajectory[g["K"] // 2], g["x_after_half"], rtol=0, atol=1e-4)
    assert torch.equal(trajectory[-1].clamp(-1, 1), actions)
    if not ON_GPU:
        monkeypatch.setenv("CUDA_ON_CPU_DEVICE", emulated.DEVICES[other])
    actions, _ = chain(cuda, denoiser, table, *inputs, noise_scale=0.0, keep=False)
    # Without noise rounding grows along the chain: what was recorded in float32 is itself 1.5e-5
    # from the same chain in float64. And t's embedding is torch's, which rounds as the CPU does.
    torch.testing.assert_close(actions, g["action_eval"], rtol=0, atol=2e-5)
    exact = ops.reverse_diffusion(
        plain_denoiser(denoiser.cpu(), torch.float64),
        schedule,
        g["state"].double(),
        x_init=g["x_T"].double(),
        noise=g["noise"].double(),
        noise_scale=0.0,
        solver=table,
    )
    of_record = (g["action_eval"] - exact).abs().max()
    assert (actions - exact).abs().max() <= 2 * of_record + 1e-7  # a last digit more


# -- against float64 -------------------------------------------------------------------------------


@functools.cache
def schedule(name: str) -> DiffusionSchedule:
    return getattr(DiffusionSchedule, name)(6)


def problem(
    sizes: tuple[int, int, int, int], activation: str, rows: int, table: SolverTable
) -> tuple[nn.Denoiser, dict[str, Any]]:
    state_dim, action_dim, hidden_dim, hidden_layers = sizes
    denoiser = nn.Denoiser(state_dim, action_dim, hidden_dim, hidden_layers, activation=activation)
    return denoiser, {
        "schedule": schedule("linear"),
        "state": torch.randn(rows, state_dim),
        "x_init": torch.randn(rows, action_dim),
        "noise": torch.randn(table.steps, rows, action_dim),
        "solver": table,
    }


def eager(denoiser: nn.Denoiser, arguments: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The same in eager PyTorch."""
    typed = {
        name: value.to(dtype) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    return ops.reverse_diffusion(plain_denoiser(denoiser.cpu(), dtype), **typed)


#: (state, action, hidden, layers), activation, rows
SIZES = [
    ((1, 1, 3, 2), "tanh", 1030),
    ((17, 6, 33, 2), "silu", 200),
    ((11, 33, 3, 4), "relu", 65),
    ((376, 17, 48, 1), "gelu", 65),
    ((17, 6, 256, 3), "mish", 170),
]


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_accuracy_of_the_predicted_noise(cuda: str, case: tuple[Any, ...]) -> None:
    """One evaluation of the network, which no coefficient amplifies."""
    denoiser, arguments = problem(*case, EPS_ONLY)
    arguments["clip"] = math.inf
    ours = sample(cuda, denoiser, **arguments)
    in_float32, exact = (eager(denoiser, arguments, d) for d in (torch.float32, torch.float64))
    assert_error_at_most_twice_eager(ours, in_float32, exact)


@pytest.mark.parametrize("clip", [1.0, math.inf])
@pytest.mark.parametrize("solver", SOLVERS)
def test_accuracy_of_every_solver(cuda: str, solver: str, clip: float) -> None:
    table = rounded(schedule("linear").solver(solver))
    denoiser, arguments = problem((17, 6, 24, 2), "mish", 170, table)
    arguments["clip"] = clip
    ours = sample(cuda, denoiser, **arguments)
    in_float32, exact = (eager(denoiser, arguments, d) for d in (torch.float32, torch.float64))
    assert_error_at_most_twice_eager(ours, in_float32, exact, amplified=True)


#: By how much an action may be off after three steps; what is multiplied is rounded by half of it.
BOUNDS = {"float32": 1e-5, "tf32": 4e-3, "bfloat16": 1.6e-2, "float16": 4e-3}


@settings(max_examples=15)
@given(
    rows=st.integers(1, 70),
    state_dim=st.sampled_from([1, 3, 17]),
    action_dim=st.sampled_from([1, 2, 6, 9, 33]),
    hidden_dim=st.sampled_from([1, 7, 33, 70, 200]),
    hidden_layers=st.integers(1, 4),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    precision=st.sampled_from(PRECISIONS),
    solver=st.sampled_from(["ddpm", "dpmpp_2m"]),
    drawn=st.booleans(),
)
def test_awkward_sizes(
    way: str,
    cuda: str,
    lanes: str,
    rows: int,
    state_dim: int,
    action_dim: int,
    hidden_dim: int,
    hidden_layers: int,
    activation: str,
    precision: str,
    solver: str,
    drawn: bool,
) -> None:
    table = rounded(DiffusionSchedule.cosine(10).solver(solver))
    table = SolverTable(table.timesteps[-3:], table.coefficients[-3:])
    sizes = state_dim, action_dim, hidden_dim, hidden_layers
    denoiser, arguments = problem(sizes, activation, rows, table)
    seed = torch.tensor(2**62 + 11)
    if drawn:
        arguments["x_init"] = normals(seed, 0, rows, action_dim)
        arguments["noise"] = torch.stack([normals(seed, i + 1, rows, action_dim) for i in range(3)])
    exact = eager(denoiser, arguments, torch.float64)
    x, z = (None, None) if drawn else (arguments["x_init"], arguments["noise"])
    tensors = arguments["state"], x, z, seed if drawn else None
    ours, _ = chain(cuda, denoiser, table, *tensors, precision=precision, keep=False)
    assert (ours - exact).abs().max() <= BOUNDS[precision]


@pytest.mark.parametrize("width", [257, 1024])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_wide_networks(cuda: str, width: int, precision: str) -> None:
    table = SolverTable(torch.tensor([3]), torch.tensor([[1, 0.5, 1, 0, 0, 0, 0]]).double())
    denoiser, arguments = problem((5, 3, width, 2), "mish", 17, table)
    exact = eager(denoiser, arguments, torch.float64)
    tensors = arguments["state"], arguments["x_init"], arguments["noise"], None
    ours, _ = chain(cuda, denoiser, table, *tensors, precision=precision, keep=False)
    assert (ours - exact).abs().max() <= BOUNDS[precision]


def test_as_deep_as_the_cpu(cuda: str) -> None:
    table = rounded(schedule("linear").solver("ddim", steps=2))
    denoiser, arguments = problem((3, 2, 8, _native.max_layers - 1), "tanh", 5, table)
    exact = eager(denoiser, arguments, torch.float64)
    torch.testing.assert_close(
        sample(cuda, denoiser, **arguments).double(), exact, rtol=0, atol=1e-5
    )


# -- in groups of every size -----------------------------------------------------------------------


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_in_groups(group: str, cuda: str, precision: str, rows: int) -> None:
    """Of 8 blocks some have no column of the layers. Of 5 rows, in float32, every block makes the
    first layer whole; of 70 rows a group takes several tiles."""
    table = rounded(DiffusionSchedule.cosine(10).solver("dpmpp_2m"))
    table = SolverTable(table.timesteps[-3:], table.coefficients[-3:])
    denoiser, arguments = problem((5, 3, 70, 3), "mish", rows, table)
    exact = eager(denoiser, arguments, torch.float64)
    tensors = arguments["state"], arguments["x_init"], arguments["noise"], None
    ours, trajectory = chain(cuda, denoiser, table, *tensors, precision=precision)
    assert (ours - exact).abs().max() <= BOUNDS[precision]
    assert torch.equal(trajectory[-1].clamp(-1, 1), ours)
    again, _ = chain(cuda, denoiser, table, *tensors, precision=precision, keep=False)
    assert torch.equal(again, ours)


def of_widths(*hidden: int) -> nn.Denoiser:
    """A denoiser of states of 5 and actions of 3 whose hidden layers are unequal."""
    denoiser = nn.Denoiser(5, 3, 8, len(hidden), activation="tanh")
    widths = [3 + denoiser.time_dim + 5, *hidden, 3]
    denoiser.trunk.layers = torch.nn.ModuleList(
        torch.nn.Linear(k, n) for k, n in itertools.pairwise(widths)
    )
    return denoiser


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16"])
def test_layers_of_different_widths(group: str, cuda: str, precision: str) -> None:
    """What a wide layer left behind a narrow one's columns isn't multiplied: NaN in one tile's row
    would spoil a row of the group's next tile."""
    table = rounded(schedule("linear").solver("ddim", steps=3))
    denoiser = of_widths(40, 250, 21)
    _, arguments = problem((5, 3, 1, 1), "tanh", 70, table)
    exact = eager(copy.deepcopy(denoiser), arguments, torch.float64)
    tensors = arguments["state"], arguments["x_init"], arguments["noise"], None
    ours, _ = chain(cuda, denoiser, table, *tensors, precision=precision, keep=False)
    assert (ours - exact).abs().max() <= BOUNDS[precision]
    arguments["state"][4, 1] = math.nan
    spoiled, _ = chain(cuda, denoiser, table, *tensors, precision=precision, keep=False)
    assert spoiled[4].isnan().all()
    others = torch.arange(70) != 4
    assert torch.equal(spoiled[others], ours[others])


@pytest.mark.skipif(ON_GPU, reason="a GPU plans for itself")
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_bits_by_groups_of_the_same_size(
    cuda: str, monkeypatch: pytest.MonkeyPatch, size: int, precision: str
) -> None:
    """However many there are, however they meet, and, alone, whether or not weights stay."""
    table = rounded(schedule("linear").solver("ddpm"))
    denoiser, arguments = problem((17, 6, 200, 2), "mish", 70, table)
    tensors = arguments["state"], arguments["x_init"], arguments["noise"], None
    results = []
    for groups, (shared_bytes, major) in itertools.product((1, 3), ((232448, 9), (166912, 8))):
        device = f"{groups * size},{shared_bytes},{major},{size}"
        monkeypatch.setenv("CUDA_ON_CPU_DEVICE", device)
        results.append(chain(cuda, denoiser, table, *tensors, precision=precision)[1])
    assert all(torch.equal(results[0], other) for other in results[1:])


# -- lower precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
def test_lower_precision_is_used_and_bounded(way: str, cuda: str, precision: str) -> None:
    """A bound from the rounding itself: every hidden layer's inputs and weights are off by at most
    half a unit, and no activation here stretches a difference by more than 1.1."""
    denoiser, arguments = problem((17, 6, 40, 3), "mish", 37, EPS_ONLY)
    tensors = arguments["state"], arguments["x_init"], arguments["noise"], None
    eps, _ = chain(cuda, denoiser, EPS_ONLY, *tensors, clip=math.inf, precision=precision)
    denoiser.cpu()
    rounding = emulated.ROUNDING[precision]
    time = denoiser.time_mlp(nn.time_embedding(EPS_ONLY.timesteps, 32).float()).expand(37, -1)
    with torch.no_grad():
        h = torch.cat([arguments["x_init"], time, arguments["state"]], dim=1).double()
        error = torch.zeros_like(h)
        for i, layer in enumerate(denoiser.trunk.layers):
            weight, bias = layer.weight.double(), layer.bias.double()
            if i > 0:  # the first layer is in float32
                error = error + 2 * rounding * (1 + rounding) * (h.abs() + error)
            error = error @ weight.abs().T + 1e-6  # and what float32 itself adds
            h = h @ weight.T + bias
            if i < 3:
                h, error = ACTIVATIONS["mish"](h), 1.1 * error
    assert ((eps - h).abs() <= error).all()
    assert (eps - h).abs().max() > rounding / 8 * h.abs().max()


@pytest.mark.parametrize("name", ["pendulum_k20"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_docstring_s_bound(cuda: str, name: str, dtype: torch.dtype) -> None:
    g = load_golden(f"dipo_sampler_{name}")
    arguments = {
        "schedule": getattr(DiffusionSchedule, g["schedule"])(g["K"]),
        "state": g["state"],
        "x_init": g["x_T"],
        "noise": g["noise"],
    }
    denoiser = golden_denoiser(g)
    half = sample(cuda, denoiser, compute_dtype=dtype, **arguments)
    full = ops.reverse_diffusion(denoiser.cpu(), **arguments, backend="reference").detach()
    torch.testing.assert_close(half, full, rtol=0, atol=1e-2)
    assert root_mean_square(half - full) < 2e-3


# -- noise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 4, 6, 33])
def test_noise_is_the_reference_s(way: str, cuda: str, lanes: str, columns: int) -> None:
    """A table that makes x' = z shows the drawn numbers themselves."""
    only_noise = SolverTable(
        torch.tensor([2, 1]), torch.tensor([[0, 0, 0, 0, 0, 1, 0]] * 2, dtype=torch.float64)
    )
    denoiser = nn.Denoiser(2, columns, 4, 1)
    for number in (0, 2**63 - 1, -1, 0x123456789ABCDEF):
        seed = torch.tensor(number)
        inputs = torch.zeros(19, 2), None, None, seed
        _, trajectory = chain(cuda, denoiser, only_noise, *inputs, clip=math.inf)
        for step in range(3):
            expected = normals(seed, step, 19, columns)
            torch.testing.assert_close(trajectory[step], expected, rtol=0, atol=1e-6)


def test_a_seed_on_the_device_is_read_there(
    cuda: str, cuda_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its address, so that nothing waits for it."""
    table = rounded(schedule("linear").solver("ddpm"))
    denoiser, arguments = problem((3, 2, 16, 2), "mish", 9, table)
    key = torch.tensor(77)
    by_value, _ = chain(cuda, denoiser, table, arguments["state"], None, None, key)
    if not ON_GPU:
        monkeypatch.setattr(_native, "seed_words", lambda seed: (0, seed.data_ptr()))
    on_device = key.to(cuda)
    by_address, _ = chain(cuda, denoiser, table, arguments["state"], None, None, on_device)
    assert torch.equal(by_value, by_address)


def test_generator_draws_as_on_the_reference(cuda: str) -> None:
    table = rounded(schedule("linear").solver("ddpm"))
    denoiser, arguments = problem((3, 2, 16, 2), "mish", 9, table)
    start, state = arguments.pop("x_init"), arguments["state"]
    del arguments["noise"]
    generator = torch.Generator(cuda).manual_seed(5)
    key = draw_seed(torch.Generator(cuda).manual_seed(5), torch.device(cuda)).cpu()
    ours = sample(cuda, denoiser, generator=generator, **arguments)
    noise = torch.stack([normals(key, i + 1, *start.shape) for i in range(6)])
    x = normals(key, 0, *start.shape)
    denoiser.cpu()
    expected = ops.reverse_diffusion(
        denoiser, schedule("linear"), state, x_init=x, noise=noise, solver=table
    )
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


# -- what else a call may be -----------------------------------------------------------------------


def test_a_row_doesn_t_notice_the_others(way: str, cuda: str) -> None:
    """Beyond rounding: batches of other sizes may be planned for otherwise."""
    table = rounded(schedule("linear").solver("ddpm"))
    denoiser, arguments = problem((3, 2, 33, 2), "mish", 70, table)
    key = torch.tensor(3)
    whole, _ = chain(cuda, denoiser, table, arguments["state"], None, None, key)
    for rows in (1, 15, 33):
        part, _ = chain(cuda, denoiser, table, arguments["state"][:rows], None, None, key)
        torch.testing.assert_close(part, whole[:rows], rtol=0, atol=2e-6)


def test_repeats_are_bitwise_the_same(way: str, cuda: str, lanes: str) -> None:
    table = rounded(schedule("linear").solver("ddpm"))
    denoiser, arguments = problem((3, 2, 33, 2), "mish", 21, table)
    first, second = (
        chain(cuda, denoiser, table, arguments["state"], None, None, torch.tensor(3))
        for _ in range(2)
    )
    assert torch.equal(first[1], second[1])


def test_batch_0_and_strided_inputs(cuda: str) -> None:
    table = rounded(schedule("linear").solver("ddpm"))
    denoiser, arguments = problem((3, 2, 16, 2), "mish", 8, table)
    whole = sample(cuda, denoiser, **arguments)
    strided = {
        name: value.repeat_interleave(2, -1)[..., ::2] if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    assert not strided["noise"].is_contiguous()
    assert torch.equal(sample(cuda, denoiser, **strided), whole)
    empty = dict(arguments, state=torch.empty(0, 3), x_init=torch.empty(0, 2))
    empty["noise"] = torch.empty(6, 0, 2)
    assert sample(cuda, denoiser, **empty).shape == (0, 2)


def test_nan_stays_in_its_row(way: str, cuda: str) -> None:
    table = rounded(schedule("linear").solver("ddpm"))
    denoiser, arguments = problem((3, 2, 16, 2), "mish", 9, table)
    clean = sample(cuda, denoiser, **arguments)
    arguments["state"][4, 1] = math.nan
    ours = sample(cuda, denoiser, **arguments)
    assert ours[4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(ours[others], clean[others])


def test_gradients_flow_through_the_kernel(cuda: str) -> None:
    """Its trajectory feeds the backward pass that all backends share."""
    table = rounded(schedule("linear").solver("ddpm"))
    denoiser, arguments = problem((3, 2, 16, 2), "mish", 8, table)
    grads = []
    for backend in ("cuda", "reference"):
        denoiser.to(cuda).zero_grad()
        inputs = {
            name: value.to(cuda) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        ops.reverse_diffusion(denoiser, **inputs, backend=backend).square().sum().backward()
        grads.append([p.grad.cpu().clone() for p in denoiser.parameters()])
    for ours, reference in zip(*grads, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_opcheck(cuda: str) -> None:
    denoiser = nn.Denoiser(3, 2, 8, 1).to(cuda)
    table = schedule("linear").solver("ddim", steps=2)
    arguments = (
        torch.randn(4, 3, device=cuda),
        None,
        None,
        torch.tensor(3),
        [p.detach() for p in denoiser.weights_and_biases()],
        table.coefficients.float().to(cuda),
        nn.time_embedding(table.timesteps, 32).float().to(cuda),
        *(1.0, 1.0, "mish", "float32", True, "cuda"),
    )
    torch.library.opcheck(native.chain.overload, arguments)


# -- the plan --------------------------------------------------------------------------------------


def plan(module: Any, hidden: int, layers: int, precision: str, batch: int) -> Any:
    shapes = [(32, hidden), (hidden, 32), (6 + 32 + 17, hidden)]
    shapes += [(hidden, hidden)] * (layers - 1) + [(hidden, 6)]
    pointers = [(0, 0, *shape) for shape in shapes]
    return module.reverse_diffusion_plan(
        pointers, 6, 17, getattr(module.Precision, precision), 100, batch
    )


@pytest.mark.skipif(ON_GPU, reason="plans for devices that this one is not")
def test_plans_for_an_h100(cuda_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the arithmetic at the top of reverse_diffusion.cu comes to."""
    monkeypatch.setenv("CUDA_ON_CPU_DEVICE", "132,232448,9")
    few = plan(cuda_module, 256, 3, "float32", 1)
    assert (few["blocks_a_tile"], few["rows_a_tile"], few["resident_layers"]) == (8, 4, 4)
    some = plan(cuda_module, 256, 3, "float32", 256)
    assert (some["blocks_a_tile"], some["rows_a_tile"], some["resident_layers"]) == (4, 16, 4)
    expected = {
        ("float32", 1): 0.27,
        ("float32", 256): 0.78,
        ("float32", 4096): 3.0,
        ("bfloat16", 256): 0.39,
        ("bfloat16", 4096): 1.14,
    }
    for (precision, batch), milliseconds in expected.items():
        clocks = plan(cuda_module, 256, 3, precision, batch)["clocks"]
        assert clocks / 1.7e6 == pytest.approx(milliseconds, rel=0.03)
    # On an A100 no clusters, and less shared memory.
    monkeypatch.setenv("CUDA_ON_CPU_DEVICE", "108,166912,8")
    for hidden in (256, 512, 1024):
        assert plan(cuda_module, hidden, 3, "float32", 4096)["shared_bytes"] <= 166912


@pytest.mark.skipif(ON_GPU, reason="the device says how many clusters it runs")
def test_fewer_clusters_than_there_is_room_for(
    cuda: str, cuda_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cluster that waits for the others' chains doubles the time: wider tiles are taken then, or
    groups of fewer blocks; none leaves blocks alone."""
    for clusters, rows in ((16, 16), (15, 32)):
        monkeypatch.setenv("CUDA_ON_CPU_DEVICE", f"128,232448,9,8,{clusters}")
        assert plan(cuda_module, 256, 3, "float32", 256)["rows_a_tile"] == rows
    table = rounded(schedule("linear").solver("ddpm"))
    denoiser, arguments = problem((3, 2, 33, 2), "mish", 21, table)
    exact = eager(denoiser, arguments, torch.float64)
    for group_size, clusters in ((4, 3), (4, 1), (0, 0)):
        monkeypatch.setenv("CUDA_ON_CPU_DEVICE", f"16,232448,9,{group_size},{clusters}")
        assert (sample(cuda, denoiser, **arguments) - exact).abs().max() <= 1e-5


@pytest.mark.skipif(ON_GPU, reason="plans for devices that this one is not")
def test_the_tests_take_every_way(cuda_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone or in groups, all weights resident or not, and every number of rows."""
    seen = set()
    for device in emulated.DEVICES.values():
        monkeypatch.setenv("CUDA_ON_CPU_DEVICE", device)
        for hidden in (16, 70, 200):
            for rows in (1, 9, 21, 70):
                for precision in PRECISIONS:
                    p = plan(cuda_module, hidden, 2, precision, rows)
                    seen |= {("blocks", p["blocks_a_tile"]), ("rows", p["rows_a_tile"])}
                    seen.add(("all resident", p["resident_layers"] == 3))
    assert {("blocks", 1), ("blocks", 8)} <= seen
    monkeypatch.setenv("CUDA_ON_CPU_DEVICE", emulated.DEVICES["grid"])  # as in the golden test
    assert plan(cuda_module, 256, 3, "float32", 5)["blocks_a_tile"] == 8
    assert {("rows", 4), ("rows", 16), ("rows", 32)} <= seen
    assert {("all resident", True), ("all resident", False)} <= seen


def test_a_workspace_that_is_too_small_is_refused(
    cuda: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it were if launch and workspace were planned differently."""
    denoiser, arguments = problem((3, 2, 16, 2), "mish", 9, schedule("linear").solver("ddpm"))
    make = _native.workspace
    monkeypatch.setattr(_native, "workspace", lambda size, like: make(size - 1, like))
    with pytest.raises(RuntimeError, match="the workspace is smaller than the plan needs"):
        sample(cuda, denoiser, **arguments)


@pytest.mark.parametrize("replaced", [False, True])
def test_too_wide_is_refused_with_a_reason(cuda: str, replaced: bool) -> None:
    denoiser = of_widths(8, 1040) if replaced else nn.Denoiser(5, 3, 1040, 2)
    with pytest.raises(ValueError, match="wider than 1024, which the CUDA kernel doesn't take"):
        sample(cuda, denoiser, schedule=schedule("linear"), state=torch.randn(2, 5))


def test_narrower_layers_than_the_denoiser_was_made_with(cuda: str) -> None:
    denoiser = nn.Denoiser(5, 3, 1040, 2, activation="tanh")
    narrow = of_widths(8, 16)
    denoiser.time_mlp.layers, denoiser.trunk.layers = narrow.time_mlp.layers, narrow.trunk.layers
    settings = {"schedule": schedule("linear"), "noise_scale": 0.0}
    tensors = {"state": torch.randn(2, 5), "x_init": torch.randn(2, 3)}
    with torch.no_grad():
        expected = ops.reverse_diffusion(denoiser, **settings, **tensors, backend="reference")
    ours = sample(cuda, denoiser, **settings, **tensors)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


# -- one step --------------------------------------------------------------------------------------


@given(rows=st.integers(1, 700), columns=st.sampled_from([1, 2, 3, 4]), given_noise=st.booleans())
@example(rows=1025, columns=3, given_noise=False)
@example(rows=1025, columns=3, given_noise=True)
def test_reverse_step(cuda: str, lanes: str, rows: int, columns: int, given_noise: bool) -> None:
    table = schedule("cosine").solver("dpmpp_2m")
    # Each on 16 bytes, so that numbers are taken by fours.
    x, eps, z, before = (torch.randn(rows, columns) for _ in range(4))
    coefficients = table.coefficients[2].float()
    coefficients[5] = 0.3
    more = {"noise": z, "noise_scale": 0.7} if given_noise else {"x0_previous": before}
    on_device = {n: v.to(cuda) if isinstance(v, Tensor) else v for n, v in more.items()}
    ours = ops.reverse_step(x.to(cuda), eps.to(cuda), coefficients, **on_device, backend="cuda")
    doubles = {n: v.double() if isinstance(v, Tensor) else v for n, v in more.items()}
    exact = ops.reverse_step(
        x.double(), eps.double(), coefficients.double(), **doubles, backend="reference"
    )
    for value, reference in zip(ours, exact, strict=True):
        torch.testing.assert_close(value.cpu().double(), reference, rtol=1e-6, atol=1e-6)
    # Coefficients on the device, and arrays that don't begin on 16 bytes.
    inputs = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t).to(cuda) for t in (x, eps)]
    shifted = ops.reverse_step(*inputs, coefficients.to(cuda), **on_device, backend="cuda")
    for value, same in zip(shifted, ours, strict=True):
        assert torch.equal(value, same)


def test_reverse_step_of_nothing(cuda: str) -> None:
    empty = torch.empty(0, 3, device=cuda)
    coefficients = schedule("cosine").solver("ddpm").coefficients[0]
    x, x0 = ops.reverse_step(empty, empty, coefficients, backend="cuda")
    assert x.shape == x0.shape == (0, 3)
