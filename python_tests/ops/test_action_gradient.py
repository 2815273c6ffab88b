"""The ascent of actions on min(Q1, Q2)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    AMX_EDGES,
    BATCHES,
    assert_error_at_most_twice_eager,
    golden_critic,
    load_golden,
    plain_critic,
    root_mean_square,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import diffcore
from diffcore import nn, ops
from diffcore.ops import _native

RECORDED = ("halfcheetah", "pendulum")

#: One plain step without bounds moves an action by its gradient times lr.
ONE_STEP = {"steps": 1, "optimizer": "ascent", "low": -math.inf, "high": math.inf}


def gradient(critic: Any, state: Tensor, action: Tensor, **options: Any) -> Tensor:
    """d min(Q1, Q2) / d action; a power of two so large that adding the action rounds nothing."""
    lr = 2.0**24
    return ops.action_gradient(critic, state, action, lr=lr, **ONE_STEP, **options) / lr


# -- against the released code ---------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDED)
def test_golden_actions(backend: str, name: str) -> None:
    g = load_golden(f"dipo_action_gradient_{name}")
    options = {"lr": g["lr"], "max_norm": g["max_norm"], "eps": g["adam_eps"], "backend": backend}
    action = ops.action_gradient(
        golden_critic(g), g["state"], g["action"], steps=g["steps"], **options
    )
    torch.testing.assert_close(action, g["action_out"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", RECORDED)
def test_golden_gradients(backend: str, name: str) -> None:
    """The first gradient, of -min(Q1, Q2), and the norms of some steps'."""
    g = load_golden(f"dipo_action_gradient_{name}")
    critic, state = golden_critic(g), g["state"]
    options = {"lr": g["lr"], "max_norm": g["max_norm"], "eps": g["adam_eps"], "backend": backend}
    first = -gradient(critic, state, g["action"], backend=backend)
    torch.testing.assert_close(first, g["first_grad"], rtol=1e-4, atol=1e-6)
    for steps in (0, 1, 5, g["steps"] - 1):
        action = ops.action_gradient(critic, state, g["action"], steps=steps, **options)
        here = gradient(critic, state, action, backend=backend).norm().item()
        assert here == pytest.approx(g["grad_norms"][steps].item(), rel=1e-3, abs=1e-4)


def test_golden_critic_values() -> None:
    for name in RECORDED:
        g = load_golden(f"dipo_action_gradient_{name}")
        q1, q2 = golden_critic(g)(g["state"], g["action"])
        torch.testing.assert_close(q1, g["q1"], rtol=0, atol=1e-5)
        torch.testing.assert_close(q2, g["q2"], rtol=0, atol=1e-5)


# -- the algorithm ---------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "ascent"])
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_against_torch_s_own_optimizers(optimizer: str, max_norm: float | None) -> None:
    """As the released code does it: an optimiser over the batch of actions, clip_grad_norm_, clamp.
    In float64, where nothing but a different algorithm could make a difference."""
    critic = nn.TwinCritic(5, 3, 16).double()
    state, action = torch.randn(40, 5).double(), torch.rand(40, 3).double() * 2 - 1
    leaf = action.clone().requires_grad_()
    kind = {
        "adam": functools.partial(torch.optim.Adam, lr=0.05, eps=1e-4),
        "ascent": functools.partial(torch.optim.SGD, lr=0.05),
    }
    optim = kind[optimizer]([leaf])
    for _ in range(30):
        optim.zero_grad()
        (-torch.min(*critic(state, leaf))).sum().backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_([leaf], max_norm)
        optim.step()
        with torch.no_grad():
            leaf.clamp_(-0.9, 0.8)
    improved = ops.action_gradient(
        critic,
        state,
        action,
        steps=30,
        lr=0.05,
        eps=1e-4,
        max_norm=max_norm,
        optimizer=optimizer,
        low=-0.9,
        high=0.8,
    )
    torch.testing.assert_close(improved, leaf.detach(), rtol=1e-10, atol=1e-10)


def test_row_clip_is_batch_clip_of_single_rows(backend: str) -> None:
    critic, state, action = nn.TwinCritic(5, 3, 16), torch.randn(9, 5), torch.rand(9, 3)
    options = {"steps": 4, "max_norm": 0.01, "optimizer": "ascent", "backend": backend}
    rows = ops.action_gradient(critic, state, action, clip_mode="row", **options)
    batch = ops.action_gradient(critic, state, action, clip_mode="batch", **options)
    alone = [
        ops.action_gradient(critic, state[i : i + 1], action[i : i + 1], **options)
        for i in range(9)
    ]
    torch.testing.assert_close(rows, torch.cat(alone), rtol=0, atol=1e-7)
    assert not torch.allclose(rows, batch, rtol=0, atol=1e-5)


@pytest.mark.parametrize("clip_mode", ["batch", "row"])
def test_a_limit_out_of_reach_changes_nothing(backend: str, clip_mode: str) -> None:
    critic, state, action = nn.TwinCritic(5, 3, 16), torch.randn(9, 5), torch.rand(9, 3)
    options = {"clip_mode": clip_mode, "backend": backend}
    free = ops.action_gradient(critic, state, action, **options)
    assert torch.equal(ops.action_gradient(critic, state, action, max_norm=1e30, **options), free)


def test_equal_critics_share_the_gradient(backend: str) -> None:
    """At a tie torch gives each half, which is the gradient of either."""
    critic, state, action = nn.TwinCritic(5, 3, 16), torch.randn(9, 5), torch.rand(9, 3)
    critic.q2.load_state_dict(critic.q1.state_dict())
    leaf = action.clone().requires_grad_()
    (expected,) = torch.autograd.grad(critic.q1(torch.cat([state, leaf], dim=1)).sum(), leaf)
    torch.testing.assert_close(gradient(critic, state, action, backend=backend), expected)


def test_zero_steps_give_a_copy(backend: str) -> None:
    critic, state, action = nn.TwinCritic(5, 3, 16), torch.randn(9, 5), torch.randn(9, 3)
    copy = ops.action_gradient(critic, state, action, steps=0, backend=backend)
    assert torch.equal(copy, action)
    assert copy.data_ptr() != action.data_ptr()


def test_bounds_and_inputs(backend: str) -> None:
    """Results are detached and within bounds; what comes in, and the critic, stay as they were."""
    critic, state, action = nn.TwinCritic(5, 3, 16), torch.randn(9, 5), torch.randn(9, 3)
    before = action.clone()
    action.requires_grad_()
    improved = ops.action_gradient(
        critic, state, action, lr=1.0, low=-0.25, high=0.5, backend=backend
    )
    assert not improved.requires_grad
    assert improved.min() == -0.25
    assert improved.max() == 0.5
    assert torch.equal(action, before)
    assert action.grad is None
    assert all(p.grad is None for p in critic.parameters())


# -- against float64 -------------------------------------------------------------------------------


@functools.cache
def problem(
    sizes: tuple[int, int, int, int], activation: str, networks: int, rows: int
) -> tuple[list[tuple[nn.TwinCritic, Tensor, Tensor]], dict[str, tuple[Tensor, Tensor]]]:
    """Critics with inputs; and of their gradients and of a whole ascent what eager PyTorch makes in
    float32 and float64. Several critics, since the error of a small one is drawn with its weights.
    """
    torch.manual_seed(0)
    state_dim, action_dim, hidden_dim, hidden_layers = sizes
    runs, results = [], {"gradient": [], "ascent": []}
    for _ in range(networks):
        critic = nn.TwinCritic(
            state_dim, action_dim, hidden_dim, hidden_layers, activation=activation
        )
        state, action = torch.randn(rows, state_dim), torch.rand(rows, action_dim) * 2 - 1
        runs.append((critic, state, action))
        for name, op in OPERATIONS.items():
            results[name].append(
                [
                    op(plain_critic(critic, dtype), state.to(dtype), action.to(dtype))
                    for dtype in (torch.float32, torch.float64)
                ]
            )
    expected = {
        name: tuple(torch.cat(column) for column in zip(*rows, strict=True))
        for name, rows in results.items()
    }
    return runs, expected


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "gradient": gradient,
    "ascent": functools.partial(ops.action_gradient, max_norm=0.1, clip_mode="row"),
}

#: (state, action, hidden, layers), activation, networks, rows
SIZES = [
    ((1, 1, 1, 1), "mish", 64, 16),
    ((1, 1, 3, 2), "tanh", 64, 16),
    ((2, 1, 17, 1), "elu", 16, 64),
    ((17, 6, 31, 2), "silu", 4, 65),
    ((17, 6, 32, 2), "relu", 4, 65),
    ((17, 6, 33, 2), "identity", 4, 65),
    ((11, 3, 100, 3), "mish", 4, 130),
    ((376, 17, 64, 2), "silu", 1, 130),
    ((376, 17, 48, 1), "elu", 1, 130),
    ((11, 33, 3, 4), "relu", 8, 65),
    ((3, 33, 16, 4), "tanh", 4, 65),
    ((17, 6, 256, 3), "mish", 1, 257),
]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_accuracy(isa: str, case: tuple[Any, ...], operation: str) -> None:
    runs, expected = problem(*case)
    native = torch.cat([OPERATIONS[operation](*run, backend="cpu") for run in runs])
    # Adam divides by the gradient's size: where it is near 0 its rounding decides.
    amplified = operation == "ascent"
    assert_error_at_most_twice_eager(native, *expected[operation], amplified=amplified)


@pytest.mark.parametrize("optimizer", ["adam", "ascent"])
@pytest.mark.parametrize("clip_mode", ["batch", "row"])
def test_accuracy_of_every_variant(isa: str, optimizer: str, clip_mode: str) -> None:
    critic = nn.TwinCritic(17, 6, 64, 2)
    state, action = torch.randn(257, 17), torch.rand(257, 6) * 2 - 1
    options = {"max_norm": 0.1, "clip_mode": clip_mode, "optimizer": optimizer, "lr": 0.1}
    native = ops.action_gradient(critic, state, action, **options)
    eager, exact = (
        ops.action_gradient(
            plain_critic(critic, dtype), state.to(dtype), action.to(dtype), **options
        )
        for dtype in (torch.float32, torch.float64)
    )
    assert_error_at_most_twice_eager(native, eager, exact, amplified=True)


def test_slopes_over_the_whole_range(isa: str) -> None:
    """A critic of width one is its activation, and its gradient at action 0 f'(state)."""
    tiny, huge = torch.logspace(-30, 0, 500), torch.logspace(0, 30, 500)
    z = torch.cat([torch.linspace(-30, 30, 5000), tiny, -tiny, huge, -huge])
    for activation, function in ACTIVATIONS.items():
        critic = nn.TwinCritic(1, 1, 1, 1, activation=activation)
        for q in (critic.q1, critic.q2):
            for parameter in q.parameters():
                parameter.data.zero_()
            q.layers[0].weight.data.fill_(1)
            q.layers[1].weight.data.fill_(1)
        slope = gradient(critic, z[:, None], torch.zeros(len(z), 1))[:, 0]
        eager, exact = (
            torch.func.grad(lambda v, f=function: f(v).sum())(z.to(dtype))
            for dtype in (torch.float32, torch.float64)
        )
        assert (slope - exact).abs().max() <= 2 * (eager - exact).abs().max()


# -- bfloat16 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16_gradient(isa: str, activation: str) -> None:
    """The docstring's bound. Operands are off by 2^-9 = 0.2% at most, and so are the slopes where
    they are smooth in them; relu's are 0 or 1, and where rounding crosses the corner all wrong."""
    critic = nn.TwinCritic(17, 6, 256, 3, activation=activation)
    state, action = torch.randn(257, 17), torch.rand(257, 6) * 2 - 1
    # Twins far apart, so that rounding doesn't change which one is the minimum.
    critic.q2.layers[-1].bias.data.fill_(10.0)
    full = gradient(critic, state, action)
    half = gradient(critic, state, action, compute_dtype=torch.bfloat16)
    assert not torch.equal(half, full)
    error = root_mean_square(half - full) / root_mean_square(full)
    assert 1e-4 < error < (0.1 if activation == "relu" else 0.01)


@pytest.mark.parametrize("name", RECORDED)
def test_bfloat16_ascent(isa: str, name: str) -> None:
    """Adam's steps are about lr whatever the gradient's size: most actions end in the same place."""
    g = load_golden(f"dipo_action_gradient_{name}")
    options = {"lr": g["lr"], "max_norm": g["max_norm"], "eps": g["adam_eps"], "steps": g["steps"]}
    arguments = (golden_critic(g), g["state"], g["action"])
    full = ops.action_gradient(*arguments, **options)
    half = ops.action_gradient(*arguments, **options, compute_dtype=torch.bfloat16)
    assert not torch.equal(half, full)
    assert (half - full).abs().mean() < 1e-2
    assert (half - full).abs().max() <= 2 * g["lr"] * g["steps"]


# -- guarantees ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip_mode", ["batch", "row"])
def test_threads_and_repeats_don_t_matter(
    isa: str, set_threads: Callable[[int], None], clip_mode: str, compute_dtype: torch.dtype
) -> None:
    critic = nn.TwinCritic(17, 6, 33, 2)
    for rows in (1, 9, 65, 257):
        state, action = torch.randn(rows, 17), torch.rand(rows, 6) * 2 - 1
        results = []
        for threads in (1, 2, 3, 2, 1):
            set_threads(threads)
            results.append(
                ops.action_gradient(
                    critic,
                    state,
                    action,
                    max_norm=0.1,
                    clip_mode=clip_mode,
                    compute_dtype=compute_dtype,
                )
            )
        for other in results[1:]:
            assert torch.equal(results[0], other)


#: (hidden, layers): one wide layer or several, none at all, fewer panels than threads, a narrow last
#: panel, panels that don't come out even.
TEAM_SIZES = [(3, 2), (20, 1), (33, 3), (100, 2), (160, 4), (256, 3)]


@pytest.mark.parametrize("activation", ["mish", "relu"])
@pytest.mark.parametrize("clip_mode", ["batch", "row"])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "layers"), TEAM_SIZES)
def test_a_team_s_size_doesn_t_matter(
    isa: str,
    teams: None,
    set_threads: Callable[[int], None],
    hidden: int,
    layers: int,
    compute_dtype: torch.dtype,
    clip_mode: str,
    activation: str,
) -> None:
    """Fewer than 8 rows are run by all threads together, rows of either critic and of both."""
    critic = nn.TwinCritic(17, 6, hidden, layers, activation)
    options = {"steps": 5, "max_norm": 0.1, "clip_mode": clip_mode, "compute_dtype": compute_dtype}
    for alike in (False, True):
        if alike:
            critic.q2.load_state_dict(critic.q1.state_dict())
        for rows in range(1, 10):
            state, action = torch.randn(rows, 17), torch.rand(rows, 6) * 2 - 1
            set_threads(1)
            expected = ops.action_gradient(critic, state, action, **options)
            assert not torch.equal(expected, action)
            for threads in (2, 3, 4, 2):
                set_threads(threads)
                before = _native._core.teams_run()
                result = ops.action_gradient(critic, state, action, **options)
                assert _native._core.teams_run() - before == (rows < 8 and layers > 1)
                assert torch.equal(result, expected)


def test_critics_of_different_depths_are_no_team_s(
    teams: None, set_threads: Callable[[int], None]
) -> None:
    critic = nn.TwinCritic(5, 3, 40, 2)
    critic.q2 = nn.MLP(8, 40, 1, 3)
    state, action = torch.randn(2, 5), torch.rand(2, 3) * 2 - 1
    set_threads(2)
    result = ops.action_gradient(critic, state, action, backend="cpu")

    def values(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([state, action], dim=1)
        return critic.q1(x, backend="reference"), critic.q2(x, backend="reference")

    expected = ops.action_gradient(values, state, action)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", AMX_EDGES)
def test_a_row_doesn_t_depend_on_its_batch(
    isa: str,
    set_threads: Callable[[int], None],
    hidden: int,
    compute_dtype: torch.dtype,
    max_norm: float | None,
    threads: int,
) -> None:
    set_threads(threads)
    critic = nn.TwinCritic(17, 6, hidden, 2)
    state, action = torch.randn(257, 17), torch.rand(257, 6) * 2 - 1
    options = {"max_norm": max_norm, "clip_mode": "row", "compute_dtype": compute_dtype}
    whole = ops.action_gradient(critic, state, action, **options)
    for rows in BATCHES:
        for first in (0, 257 - rows):
            part = slice(first, first + rows)
            alone = ops.action_gradient(critic, state[part], action[part], **options)
            assert torch.equal(alone, whole[part])


@pytest.mark.parametrize("name", ["state", "action"])
@pytest.mark.parametrize("optimizer", ["adam", "ascent"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_in_its_row(backend: str, activation: str, optimizer: str, name: str) -> None:
    """Even where an activation's slope is a constant: an unknown value has no direction to rise."""
    critic = nn.TwinCritic(5, 3, 33, 2, activation=activation)
    tensors = {"state": torch.randn(70, 5), "action": torch.rand(70, 3)}
    for row in (0, 66):
        tensors[name][row, 1] = math.nan
    for max_norm in (None, 0.1):
        improved = ops.action_gradient(
            critic,
            **tensors,
            steps=3,
            max_norm=max_norm,
            clip_mode="row",
            optimizer=optimizer,
            backend=backend,
        )
        rows_with_nan = torch.nonzero(improved.isnan().any(dim=1)).flatten().tolist()
        assert rows_with_nan == [0, 66]


def test_nan_reaches_all_rows_through_the_batch_s_norm(backend: str) -> None:
    critic, state, action = nn.TwinCritic(5, 3, 16), torch.randn(9, 5), torch.rand(9, 3)
    state[4, 0] = math.nan
    improved = ops.action_gradient(critic, state, action, max_norm=0.1, backend=backend)
    assert improved.isnan().all()


@given(
    rows=st.integers(0, 9),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(1, 3)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    clip_mode=st.sampled_from(["batch", "row"]),
    layout=st.sampled_from(["transposed", "every second", "shifted", "expanded"]),
)
def test_any_shape_and_stride(
    isa: str,
    rows: int,
    sizes: tuple[int, int, int, int],
    activation: str,
    clip_mode: str,
    layout: str,
) -> None:
    state_dim, action_dim, hidden_dim, hidden_layers = sizes
    critic = nn.TwinCritic(state_dim, action_dim, hidden_dim, hidden_layers, activation=activation)

    def draw(columns: int) -> Tensor:
        if layout == "transposed":
            return torch.rand(columns, rows).T
        if layout == "every second":
            return torch.rand(rows, 2 * columns)[:, ::2]
        if layout == "shifted":  # contiguous, but not aligned
            return torch.rand(rows * columns + 1)[1:].view(rows, columns)
        return torch.rand(columns).expand(rows, columns)

    state, action = draw(state_dim), draw(action_dim)
    options = {"steps": 3, "max_norm": 0.02, "clip_mode": clip_mode, "optimizer": "ascent"}
    before = state.clone(), action.clone()
    native = ops.action_gradient(critic, state, action, **options)
    assert native.shape == (rows, action_dim)
    assert native.is_contiguous()
    assert torch.equal(native, ops.action_gradient(critic, *before, **options))
    assert torch.equal(state, before[0])
    assert torch.equal(action, before[1])
    reference = ops.action_gradient(critic, state, action, **options, backend="reference")
    # Plain steps of at most lr * max_norm = 6e-4, whose direction relu may turn at its corner.
    torch.testing.assert_close(native, reference, rtol=0, atol=2e-5)


@given(magnitude=st.integers(-40, 15), activation=st.sampled_from(sorted(ACTIVATIONS)))
def test_finite_input_gives_actions_in_range(isa: str, magnitude: int, activation: str) -> None:
    critic = nn.TwinCritic(3, 2, 9, 2, activation=activation)
    state, action = torch.randn(7, 3) * 10.0**magnitude, torch.randn(7, 2) * 10.0**magnitude
    improved = ops.action_gradient(critic, state, action, low=-0.5, high=2.0)
    assert ((improved >= -0.5) & (improved <= 2.0)).all()


# -- as part of other programs ---------------------------------------------------------------------


def test_opcheck(isa: str) -> None:
    critic = nn.TwinCritic(5, 3, 8)
    q1, q2 = ([p.detach() for p in q.parameters()] for q in (critic.q1, critic.q2))
    settings = ("mish", "float32", 3, 0.03, 0.1, "batch", "adam", 1e-5, -1.0, 1.0, "cpu")
    arguments = (torch.randn(4, 5), torch.rand(4, 3), q1, q2, *settings)
    torch.library.opcheck(torch.ops.diffcore.action_gradient.default, arguments)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compile_and_vmap(backend: str) -> None:
    critic = nn.TwinCritic(5, 3, 8)

    def improve(state: Tensor, action: Tensor) -> Tensor:
        options = {"steps": 3, "lr": 1.0, "max_norm": 0.01, "optimizer": "ascent", "backend": backend}
        return ops.action_gradient(critic, state, action, **options)

    compiled = torch.compile(improve, fullgraph=True, backend="aot_eager")
    for rows in (4, 9):
        state, action = torch.randn(rows, 5), torch.rand(rows, 3)
        torch.testing.assert_close(compiled(state, action), improve(state, action))
    states, actions = torch.randn(6, 4, 5), torch.rand(4, 6, 3)
    torch.testing.assert_close(
        torch.vmap(improve, in_dims=(0, 1))(states, actions),
        torch.stack([improve(states[i], actions[:, i]) for i in range(6)]),
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_gradient_flows_through(backend: str) -> None:
    """Under torch.func too: the result is a constant."""
    critic, state, action = nn.TwinCritic(5, 3, 8), torch.randn(4, 5), torch.rand(4, 3)

    def value(action: Tensor) -> Tensor:
        return ops.action_gradient(critic, state, action, backend=backend).sum()

    assert torch.equal(torch.func.grad(value)(action), torch.zeros(4, 3))
    leaf = action.clone().requires_grad_()
    improved = ops.action_gradient(critic, state, leaf, backend=backend)
    assert not improved.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_modes_don_t_matter(backend: str, mode: Callable[[], Any]) -> None:
    critic, state, action = nn.TwinCritic(5, 3, 8), torch.randn(4, 5), torch.rand(4, 3)
    expected = ops.action_gradient(critic, state, action, backend=backend)
    with mode():
        assert torch.equal(ops.action_gradient(critic, state, action, backend=backend), expected)


def test_autocast() -> None:
    critic, state, action = nn.TwinCritic(5, 3, 8), torch.randn(4, 5), torch.rand(4, 3)
    expected = ops.action_gradient(critic, state.bfloat16().float(), action)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        improved = ops.action_gradient(critic, state.bfloat16(), action)
    assert torch.equal(improved, expected)


# -- what runs where -------------------------------------------------------------------------------


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
    critic = nn.TwinCritic(5, 3, **{"hidden_dim": 8, **options}).to(dtype)
    arguments = (critic, torch.randn(6, 5).to(dtype), torch.rand(6, 3).to(dtype))
    answer = diffcore.explain("action_gradient", *arguments)
    assert answer.backend == ("cpu" if reason is None else "reference")
    improved = ops.action_gradient(*arguments)
    assert improved.dtype == dtype
    assert not torch.equal(improved, arguments[2])
    if reason is None:
        assert answer.passed_over == {}
    else:
        assert reason in answer.passed_over["cpu"]
        with pytest.raises(ValueError, match="^backend: action_gradient can't run on 'cpu'"):
            ops.action_gradient(*arguments, backend="cpu")


def test_any_callable_is_a_critic() -> None:
    """Two parabolas: where they cross their minimum is largest."""

    def critic(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        return -((action - state) ** 2), -((action + 1 - state) ** 2)

    state = torch.linspace(-1, 1, 9)[:, None]
    improved = ops.action_gradient(
        critic, state, torch.zeros(9, 1), steps=500, lr=0.01, low=-3.0, high=3.0
    )
    torch.testing.assert_close(improved, state - 0.5, rtol=0, atol=0.02)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"critic": None}, TypeError, "^critic: expected a TwinCritic or a callable, got NoneType"),
        ({"state": [[0.0]]}, TypeError, "^state: expected a tensor, got list"),
        ({"state": torch.ones(2, 5).long()}, TypeError, "^state: .* got torch.int64"),
        ({"state": torch.ones(5)}, ValueError, r"^state: expected shape \[B, 5\], got \[5\]"),
        ({"state": torch.ones(2, 4)}, ValueError, r"^state: expected shape \[B, 5\], got \[2, 4\]"),
        (
            {"state": torch.ones(2, 5).double(), "action": torch.ones(2, 3).double()},
            TypeError,
            "^state: expected torch.float32 like the critic, got torch.float64",
        ),
        (
            {
                "state": torch.ones(2, 5, device="meta"),
                "action": torch.ones(2, 3, device="meta"),
            },
            ValueError,
            "^state: expected to be on cpu like the critic, is on meta",
        ),
        ({"action": 1.0}, TypeError, "^action: expected a tensor, got float"),
        ({"action": torch.ones(3, 3)}, ValueError, r"^action: .* \[2, 3\], got \[3, 3\]"),
        ({"action": torch.ones(2, 2)}, ValueError, r"^action: .* \[2, 3\], got \[2, 2\]"),
        ({"action": torch.ones(2, 3).double()}, TypeError, "^action: expected torch.float32 like"),
        ({"action": torch.ones(2, 3, device="meta")}, ValueError, "^action: .* is on meta"),
        ({"steps": -1}, ValueError, "^steps: expected at least 0, got -1"),
        ({"steps": 2.0}, TypeError, "^steps: expected an integer, got float"),
        ({"steps": True}, TypeError, "^steps: expected an integer, got bool"),
        ({"lr": -0.1}, ValueError, "^lr: expected at least 0.0, got -0.1"),
        ({"lr": math.nan}, ValueError, "^lr: expected a finite number, got nan"),
        ({"lr": 10**400}, ValueError, "^lr: expected a finite number, got 1000"),
        ({"steps": 2**31}, ValueError, "^steps: expected at most 2147483647, got 2147483648"),
        ({"lr": "0.1"}, TypeError, "^lr: expected a number, got str"),
        ({"eps": -1e-5}, ValueError, "^eps: "),
        ({"eps": math.inf}, ValueError, "^eps: "),
        ({"max_norm": 0.0}, ValueError, "^max_norm: expected more than 0.0, got 0.0"),
        ({"max_norm": -1.0}, ValueError, "^max_norm: "),
        ({"max_norm": math.nan}, ValueError, "^max_norm: "),
        ({"low": math.nan}, ValueError, "^low: "),
        ({"low": 1.0}, ValueError, "^high: expected more than 1.0, got 1.0"),
        ({"high": -2.0}, ValueError, "^high: expected more than -1.0, got -2.0"),
        ({"optimizer": "sgd"}, ValueError, "^optimizer: expected one of adam, ascent, got 'sgd'"),
        ({"clip_mode": "all"}, ValueError, "^clip_mode: expected one of batch, row, got 'all'"),
        ({"compute_dtype": torch.float64}, ValueError, "^compute_dtype: "),
        ({"backend": "gpu"}, ValueError, "^backend: expected one of .*got 'gpu'"),
        ({"critic": lambda s, a: a.sum(1, keepdim=True)}, TypeError, "^critic: .*, got Tensor"),
        ({"critic": lambda s, a: (a.sum(1),) * 2}, ValueError, r"^critic: .*, got shape \[2\]"),
        ({"critic": lambda s, a: (None, None)}, TypeError, r"^critic: .*\[2, 1\], got NoneType"),
        ({"critic": lambda s, a: ()}, TypeError, "^critic: expected it to return one or more"),
        (
            {"critic": torch.no_grad()(lambda s, a: (a.sum(1, keepdim=True),) * 2)},
            ValueError,
            "^critic: expected values that can be differentiated",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "critic": nn.TwinCritic(5, 3, 8),
        "state": torch.ones(2, 5),
        "action": torch.ones(2, 3),
    }
    with pytest.raises(error, match=message):
        ops.action_gradient(**{**arguments, **change})


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_values(count: int) -> None:
    """The least of them is climbed, row by row."""
    offsets, tops = torch.tensor([0.0, 9.0, 0.0]), torch.tensor([0.5, 0.0, -0.5])

    def critic(state: Tensor, action: Tensor) -> list[Tensor]:
        return [
            offsets[i] - (action - tops[i]).square().sum(1, keepdim=True) for i in range(count)
        ]

    action = torch.tensor([[-0.6, -0.6], [0.6, 0.6]])
    improved = ops.action_gradient(critic, torch.ones(2, 1), action, steps=5, optimizer="ascent")
    towards = [[0.5], [-0.5]] if count == 3 else [[0.5], [0.5]]
    assert torch.equal((improved - action).sign(), (torch.tensor(towards) - action).sign())


def test_a_value_may_be_a_cap() -> None:
    state, action = torch.ones(3, 1), torch.zeros(3, 2)

    def capped(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        return action.sum(1, keepdim=True), torch.full((3, 1), 10.0)

    assert (ops.action_gradient(capped, state, action, steps=2) > 0).all()
