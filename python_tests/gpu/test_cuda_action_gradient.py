"""The CUDA kernel of the action gradient, against the reference and the released code's record."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import emulated
import pytest
import torch
from conftest import ON_GPU
from helpers import (
    ACTIVATIONS,
    assert_error_at_most_twice_eager,
    golden_critic,
    load_golden,
    plain_critic,
    plain_mlp,
    root_mean_square,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffcore import nn, ops
from diffcore.ops import _native
from diffcore.ops.action_gradient import native

#: One plain step without bounds moves an action by its gradient times lr.
ONE_STEP = {"steps": 1, "optimizer": "ascent", "low": -math.inf, "high": math.inf}


def ascend(
    cuda: str, critic: nn.TwinCritic, state: Tensor, action: Tensor, **options: Any
) -> Tensor:
    """The kernel's result, on the CPU; the critic goes to the device and stays there."""
    critic.to(cuda)
    result = ops.action_gradient(critic, state.to(cuda), action.to(cuda), backend="cuda", **options)
    return result.cpu()


def gradient(
    cuda: str, critic: nn.TwinCritic, state: Tensor, action: Tensor, **more: Any
) -> Tensor:
    """d min(Q1, Q2) / d action; a power of two so large that adding the action rounds nothing."""
    lr = 2.0**24
    return ascend(cuda, critic, state, action, lr=lr, **ONE_STEP, **more) / lr


def exact_gradient(
    critic: nn.TwinCritic, state: Tensor, action: Tensor, dtype: torch.dtype
) -> Tensor:
    lr = 2.0**24
    plain = plain_critic(critic, dtype)
    arguments = (plain, state.to(dtype), action.to(dtype))
    return ops.action_gradient(*arguments, lr=lr, **ONE_STEP) / lr


def exact_gradient_of(
    critics: list[list[Tensor]], state: Tensor, action: Tensor, activation: str
) -> Tensor:
    """The same in float64, of critics by their parameters."""
    leaf = action.double().requires_grad_()
    x = torch.cat([state.double(), leaf], dim=1)
    values = [plain_mlp(x, [p.detach().double() for p in q], activation) for q in critics]
    (exact,) = torch.autograd.grad(torch.minimum(*values).sum(), leaf)
    return exact


# -- against the released code ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["halfcheetah", "pendulum"])
def test_golden(way: str, cuda: str, name: str) -> None:
    g = load_golden(f"dipo_action_gradient_{name}")
    critic, options = golden_critic(g), {"max_norm": g["max_norm"], "eps": g["adam_eps"]}
    action = ascend(cuda, critic, g["state"], g["action"], steps=g["steps"], lr=g["lr"], **options)
    torch.testing.assert_close(action, g["action_out"], rtol=0, atol=1e-4)
    first = -gradient(cuda, critic, g["state"], g["action"])
    torch.testing.assert_close(first, g["first_grad"], rtol=1e-4, atol=1e-6)


# -- against float64 -------------------------------------------------------------------------------

#: (state, action, hidden, layers), activation, rows
SIZES = [
    ((1, 1, 1, 1), "mish", 1030),
    ((2, 1, 17, 1), "elu", 1030),
    ((17, 6, 33, 2), "silu", 200),
    ((40, 33, 16, 4), "tanh", 65),
    ((17, 6, 256, 3), "mish", 170),
]


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_error_at_most_twice_eager(cuda: str, case: tuple[Any, ...]) -> None:
    sizes, activation, rows = case
    critic = nn.TwinCritic(*sizes, activation=activation)
    state, action = torch.randn(rows, sizes[0]), torch.rand(rows, sizes[1]) * 2 - 1
    eager, exact = (
        exact_gradient(critic, state, action, dtype) for dtype in (torch.float32, torch.float64)
    )
    ours = gradient(cuda, critic, state, action)
    assert_error_at_most_twice_eager(ours, eager, exact)


@given(
    rows=st.sampled_from([1, 7, 8, 9, 33]),
    state_dim=st.sampled_from([1, 5, 17]),
    action_dim=st.sampled_from([1, 3, 6, 9]),
    hidden_dim=st.sampled_from([1, 7, 16, 33, 70, 200]),
    hidden_layers=st.integers(1, 3),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    device=st.sampled_from([*emulated.DEVICES.values(), *emulated.GROUPS.values()]),
)
@settings(max_examples=60)
def test_awkward_sizes(
    cuda: str,
    lanes: str,
    rows: int,
    state_dim: int,
    action_dim: int,
    hidden_dim: int,
    hidden_layers: int,
    activation: str,
    device: str,
) -> None:
    os.environ["CUDA_ON_CPU_DEVICE"] = device  # as it was, the fixture sees to after all examples
    critic = nn.TwinCritic(state_dim, action_dim, hidden_dim, hidden_layers, activation=activation)
    state, action = torch.randn(rows, state_dim), torch.rand(rows, action_dim) * 2 - 1
    exact = exact_gradient(critic, state, action, torch.float64)
    ours = gradient(cuda, critic, state, action)
    assert (ours - exact).abs().max() <= 2e-6 * max(1.0, exact.abs().max().item())


@pytest.mark.parametrize("hidden", [16, 250])  # on a device each; many blocks a tile
@pytest.mark.parametrize("optimizer", ["adam", "ascent"])
@pytest.mark.parametrize("clip_mode", ["batch", "row"])
def test_every_variant(
    way: str, cuda: str, lanes: str, optimizer: str, clip_mode: str, hidden: int
) -> None:
    critic = nn.TwinCritic(5, 3, hidden, 2)
    state, action = torch.randn(30, 5), torch.rand(30, 3) * 2 - 1
    options = {"steps": 5, "max_norm": 0.1, "clip_mode": clip_mode, "optimizer": optimizer}
    ours = ascend(cuda, critic, state, action, lr=0.05, low=-0.9, high=0.8, **options)
    plain = plain_critic(critic.cpu(), torch.float64)
    exact = ops.action_gradient(
        plain, state.double(), action.double(), lr=0.05, low=-0.9, high=0.8, **options
    )
    assert (ours - exact).abs().max() <= 2e-5
    assert ours.max() == torch.tensor(0.8)


@pytest.mark.parametrize("optimizer", ["adam", "ascent"])
@pytest.mark.parametrize("clip_mode", ["batch", "row"])
def test_every_variant_in_groups(group: str, cuda: str, optimizer: str, clip_mode: str) -> None:
    """Of 8 blocks some have no column of the layers."""
    options = {"steps": 4, "lr": 0.05, "max_norm": 0.1, "low": -0.9, "high": 0.8}
    options |= {"clip_mode": clip_mode, "optimizer": optimizer}
    critic = nn.TwinCritic(5, 3, 70, 2)
    state, action = torch.randn(30, 5), torch.rand(30, 3) * 2 - 1
    ours = ascend(cuda, critic, state, action, **options)
    plain = plain_critic(critic.cpu(), torch.float64)
    exact = ops.action_gradient(plain, state.double(), action.double(), **options)
    assert (ours - exact).abs().max() <= 2e-5
    assert torch.equal(ours, ascend(cuda, critic, state, action, **options))


@pytest.mark.skipif(ON_GPU, reason="the device says how many clusters it runs")
def test_fewer_clusters_than_there_is_room_for(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three groups two have work, a single one takes both critics, none leaves blocks alone."""
    critic = nn.TwinCritic(5, 3, 33, 2)
    state, action = torch.randn(70, 5), torch.rand(70, 3) * 2 - 1
    exact = exact_gradient(critic, state, action, torch.float64)
    for group_size, clusters in ((4, 3), (4, 2), (4, 1), (0, 0)):
        monkeypatch.setenv("CUDA_ON_CPU_DEVICE", f"16,232448,9,{group_size},{clusters}")
        ours = gradient(cuda, critic, state, action)
        assert (ours - exact).abs().max() <= 2e-6 * max(1.0, exact.abs().max().item())


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16"])
def test_layers_of_different_widths(group: str, cuda: str, precision: str) -> None:
    """What a wide layer left behind a narrow one's columns isn't multiplied."""
    widths = (8, 40, 250, 21, 1)
    critics = [
        [
            t
            for n, k in zip(widths[1:], widths, strict=False)
            for t in (torch.randn(n, k), torch.randn(n))
        ]
        for _ in range(2)
    ]
    state, action = torch.randn(19, 5), torch.rand(19, 3) * 2 - 1
    lr = 2.0**24
    fixed = (1, lr, None, "batch", "ascent", 1e-5, -math.inf, math.inf, "cuda")
    on_device = [[t.to(cuda) for t in parameters] for parameters in critics]
    inputs = (state.to(cuda), action.to(cuda), *on_device)
    ours = native.ascend(*inputs, "tanh", precision, *fixed).cpu() / lr
    exact = exact_gradient_of(critics, state, action, "tanh")
    error = root_mean_square(ours - exact) / root_mean_square(exact)
    assert error <= (1e-5 if precision == "float32" else 0.03)


#: Of both critics: hidden width and layers.
UNEQUAL_CRITICS = [((64, 3), (64, 1)), ((64, 1), (64, 3)), ((64, 2), (32, 2)), ((16, 1), (64, 3))]


@pytest.mark.parametrize("shapes", UNEQUAL_CRITICS, ids=str)
def test_critics_of_unequal_shapes(
    group: str, cuda: str, shapes: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    critic = nn.TwinCritic(5, 3, *shapes[0])
    critic.q2 = nn.MLP(8, shapes[1][0], 1, shapes[1][1])
    state, action = torch.randn(60, 5), torch.rand(60, 3) * 2 - 1
    ours = gradient(cuda, critic, state, action)
    networks = [list(q.cpu().parameters()) for q in (critic.q1, critic.q2)]
    exact = exact_gradient_of(networks, state, action, "mish")
    assert (ours - exact).abs().max() <= 2e-6 * max(1.0, exact.abs().max().item())


# -- tensor cores ----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["mish", "relu", "sin"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(group: str, cuda: str, activation: str, dtype: torch.dtype) -> None:
    """The docstring's bound: 1% of the gradient, 10% for relu, whose slope jumps."""
    critic = nn.TwinCritic(17, 6, 100, 3, activation=activation)
    state, action = torch.randn(150, 17), torch.rand(150, 6) * 2 - 1
    # Twins far apart, so that rounding doesn't change which one is the minimum.
    critic.q2.layers[-1].bias.data.fill_(10.0)
    full = exact_gradient(critic, state, action, torch.float32)
    half = gradient(cuda, critic, state, action, compute_dtype=dtype)
    error = root_mean_square(half - full) / root_mean_square(full)
    assert 1e-5 < error < (0.1 if activation == "relu" else 0.01)


def test_tf32(cuda: str) -> None:
    """As many bits as float16, the range of float32."""
    critic = nn.TwinCritic(17, 6, 100, 3).to(cuda)
    critic.q2.layers[-1].bias.data.fill_(10.0)
    state, action = torch.randn(150, 17), torch.rand(150, 6) * 2 - 1
    full = exact_gradient(critic.cpu(), state, action, torch.float32)
    critic.to(cuda)
    q1, q2 = ([p.detach() for p in q.parameters()] for q in (critic.q1, critic.q2))
    lr = 2.0**24
    fixed = (1, lr, None, "batch", "ascent", 1e-5, -math.inf, math.inf, "cuda")
    arguments = (state.to(cuda), action.to(cuda), q1, q2, "mish", "tf32", *fixed)
    ours = native.ascend(*arguments).cpu() / lr
    error = root_mean_square(ours - full) / root_mean_square(full)
    assert 1e-5 < error < 0.002


# -- guarantees ------------------------------------------------------------------------------------


def test_equal_critics_share_the_gradient(cuda: str) -> None:
    """At a tie torch gives each half, which is the gradient of either."""
    critic, state, action = nn.TwinCritic(5, 3, 16), torch.randn(9, 5), torch.rand(9, 3)
    critic.q2.load_state_dict(critic.q1.state_dict())
    exact = exact_gradient(critic, state, action, torch.float64)
    ours = gradient(cuda, critic, state, action)
    torch.testing.assert_close(ours, exact.float())


@pytest.mark.parametrize("clip_mode", ["batch", "row"])
def test_norms_of_ties(group: str, cuda: str, clip_mode: str) -> None:
    """A limited norm is that of both halves, where critics are alike, and else of the least one's."""
    critic = nn.TwinCritic(5, 3, 16, 1, activation="relu")
    state, action = torch.randn(1100, 5), torch.rand(1100, 3) * 2 - 1
    critic.q2.load_state_dict(critic.q1.state_dict())
    with torch.no_grad():  # rows that use neither of two hidden units tie
        critic.q2.layers[-1].weight[0, :2] += torch.tensor([0.5, -0.5])
    options = {"steps": 2, "lr": 0.05, "max_norm": 0.02, "clip_mode": clip_mode}
    options |= {"optimizer": "ascent"}
    ours = ascend(cuda, critic, state, action, **options)
    plain = plain_critic(critic.cpu(), torch.float64)
    exact = ops.action_gradient(plain, state.double(), action.double(), **options)
    assert (ours - exact).abs().max() <= 2e-6


def test_the_same_bits_however_the_work_is_shared_out(
    cuda: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every call and, by blocks alone, on a device of any size: tiles of 8 or 32 rows, one a block
    or several."""
    critic = nn.TwinCritic(5, 3, 33, 2)
    state, action = torch.randn(70, 5), torch.rand(70, 3) * 2 - 1
    results = []
    for multiprocessors in (1, 3, 20):
        monkeypatch.setenv("CUDA_ON_CPU_DEVICE", f"{multiprocessors},232448,9")
        results.append(ascend(cuda, critic, state, action, steps=4, max_norm=0.1))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("activation", ["mish", "relu"])
@pytest.mark.parametrize("clip_mode", ["batch", "row"])
def test_nan_stays_in_its_row(group: str, cuda: str, clip_mode: str, activation: str) -> None:
    """Unless the norm of the whole batch hands it on."""
    critic = nn.TwinCritic(5, 3, 16, activation=activation)
    state, action = torch.randn(20, 5), torch.rand(20, 3) * 2 - 1
    clean = ascend(cuda, critic, state, action, steps=3, max_norm=0.1, clip_mode=clip_mode)
    state[4, 1] = float("nan")
    spoiled = ascend(cuda, critic, state, action, steps=3, max_norm=0.1, clip_mode=clip_mode)
    assert spoiled[4].isnan().all()
    others = torch.arange(20) != 4
    if clip_mode == "row":
        assert torch.equal(spoiled[others], clean[others])
    else:
        assert spoiled[others].isnan().all()


def test_no_steps_no_rows_and_inputs(cuda: str) -> None:
    critic, state, action = nn.TwinCritic(5, 3, 16), torch.randn(9, 5), torch.randn(9, 3)
    assert torch.equal(ascend(cuda, critic, state, action, steps=0), action)
    assert ascend(cuda, critic, state[:0], action[:0]).shape == (0, 3)
    expected = ascend(cuda, critic, state, action, steps=2)
    strided = (t.T.contiguous().T for t in (state, action))
    assert torch.equal(ascend(cuda, critic, *strided, steps=2), expected)


@pytest.mark.parametrize("hidden", [16, 250])
def test_repeats_are_bitwise_the_same(way: str, cuda: str, lanes: str, hidden: int) -> None:
    critic = nn.TwinCritic(5, 3, hidden, 2)
    state, action = torch.randn(21, 5), torch.rand(21, 3) * 2 - 1
    first, second = (ascend(cuda, critic, state, action, steps=3, max_norm=0.1) for _ in range(2))
    assert torch.equal(first, second)


def test_opcheck(cuda: str) -> None:
    critic = nn.TwinCritic(5, 3, 8).to(cuda)
    q1, q2 = ([p.detach() for p in q.parameters()] for q in (critic.q1, critic.q2))
    state, action = torch.randn(4, 5, device=cuda), torch.rand(4, 3, device=cuda)
    fixed = (2, 0.03, 0.1, "batch", "adam", 1e-5, -1.0, 1.0, "cuda")
    torch.library.opcheck(
        native.ascend.overload, (state, action, q1, q2, "mish", "float32", *fixed)
    )


def test_a_workspace_that_is_too_small_is_refused(
    cuda: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it were if launch and workspace were planned differently."""
    make = _native.workspace
    monkeypatch.setattr(_native, "workspace", lambda size, like: make(size - 1, like))
    with pytest.raises(RuntimeError, match="the workspace is smaller than the plan needs"):
        ascend(cuda, nn.TwinCritic(5, 3, 16), torch.randn(9, 5), torch.randn(9, 3))


def test_a_critic_that_is_too_wide(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_ON_CPU_DEVICE", "3,101376,8")
    wide = nn.TwinCritic(5, 3, 4096, 1).to(cuda)
    mixed = [nn.TwinCritic(5, 3, 16, 1).to(cuda) for _ in range(2)]
    mixed[0].q1, mixed[1].q2 = wide.q1, wide.q2
    state, action = torch.randn(2, 5, device=cuda), torch.rand(2, 3, device=cuda)
    for critic in (wide, *mixed):
        with pytest.raises(ValueError, match="'cuda' here: the critic's layers are too wide"):
            ops.action_gradient(critic, state, action, backend="cuda")
    q1, q2 = ([p.detach() for p in q.parameters()] for q in (wide.q1, wide.q2))
    fixed = (2, 0.03, 0.1, "batch", "adam", 1e-5, -1.0, 1.0, "cuda")
    with pytest.raises(RuntimeError, match="CUDA kernels: the critic's layers are too wide"):
        native.ascend(state, action, q1, q2, "mish", "float32", *fixed)


# -- the plan --------------------------------------------------------------------------------------


def plan(module: Any, hidden: int, precision: str, batch: int) -> Any:
    widths = (17 + 6, hidden, hidden, hidden, 1)
    pointers = [(0, 0, *shape) for shape in itertools.pairwise(widths)]
    kind = getattr(module.Precision, precision)
    return module.action_gradient_plan(pointers, pointers, 6, 17, kind, 20, batch)


@pytest.mark.parametrize("hidden", [8193, 2**24, 2**31 - 1])
@pytest.mark.parametrize("of_state", [False, True])
def test_sizes_beyond_an_int_are_too_wide(cuda_module: Any, hidden: int, of_state: bool) -> None:
    """In bytes of shared memory, which mustn't seem few because they overflowed."""
    state, width = (hidden - 6, 16) if of_state else (17, hidden)
    layers = [(0, 0, state + 6, width), (0, 0, width, width), (0, 0, width, 1)]
    planned = cuda_module.action_gradient_plan(
        layers, layers, 6, state, cuda_module.Precision.float32, 20, 256
    )
    assert planned == "the critic's layers are too wide for shared memory"


@pytest.mark.skipif(ON_GPU, reason="plans for devices that this one is not")
def test_plans_for_an_h100(cuda_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the arithmetic at the top of action_gradient.cu comes to."""
    monkeypatch.setenv("CUDA_ON_CPU_DEVICE", "132,232448,9")
    expected = {
        ("float32", 1): (8, 8, 0.166),
        ("float32", 256): (2, 8, 0.43),
        ("float32", 4096): (1, 32, 2.4),
        ("bfloat16", 1): (8, 16, 0.13),
        ("bfloat16", 256): (2, 16, 0.23),
        ("bfloat16", 4096): (1, 32, 0.93),
    }
    for (precision, batch), (blocks, rows, milliseconds) in expected.items():
        p = plan(cuda_module, 256, precision, batch)
        assert (p["blocks_a_tile"], p["rows_a_tile"]) == (blocks, rows)
        assert p["clocks"] / 1.7e6 == pytest.approx(milliseconds, rel=0.03)
    # One row's layers are spread over a cluster, all weights at rest; those of small critics always.
    assert plan(cuda_module, 256, "float32", 16)["resident_layers"] == 3
    assert plan(cuda_module, 64, "float32", 4096)["resident_layers"] == 3


@pytest.mark.skipif(ON_GPU, reason="plans for devices that this one is not")
def test_the_tests_take_every_way(cuda_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone or in groups, weights at rest or not, and every number of rows."""
    seen = set()
    for way, device in emulated.DEVICES.items():
        monkeypatch.setenv("CUDA_ON_CPU_DEVICE", device)
        for hidden, rows, precision in itertools.product(
            (16, 70, 200, 250), (1, 7, 9, 33, 150), ("float32", "bfloat16")
        ):
            p = plan(cuda_module, hidden, precision, rows)
            seen |= {(way, "group" if p["blocks_a_tile"] > 1 else "alone"), p["rows_a_tile"]}
            seen.add(("resident", p["resident_layers"]))
    assert {("clusters", "group"), ("grid", "group"), ("alone", "alone")} <= seen
    assert {8, 16, 32, ("resident", 0), ("resident", 3)} <= seen
