"""The ascent on min(Q1, Q2) on Triton. All sizes are small: without a GPU, kernels run in its
interpreter, where the programs of a launch run one after another."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    assert_error_at_most_twice_eager,
    golden_critic,
    load_golden,
    plain_critic,
    root_mean_square,
)
from torch import Tensor

from diffcore import nn, ops
from diffcore.ops.action_gradient.native import ascend

# NumPy, in which the interpreter computes, reports where infinities and NaN come from.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

#: One plain step without bounds moves an action by its gradient times lr.
ONE_STEP = {"steps": 1, "optimizer": "ascent", "low": -math.inf, "high": math.inf}


def gradient(critic: Any, state: Tensor, action: Tensor, **options: Any) -> Tensor:
    """d min(Q1, Q2) / d action; a power of two so large that adding the action rounds nothing."""
    lr = 2.0**24
    return ops.action_gradient(critic, state, action, lr=lr, **ONE_STEP, **options) / lr


def drawn(device: str, critic: nn.TwinCritic, rows: int) -> tuple[nn.TwinCritic, Tensor, Tensor]:
    """(critic, state, action) on the device, the critic's weights twice as large as at first."""
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.mul_(2)
    state = torch.randn(rows, critic.state_dim)
    action = torch.rand(rows, critic.action_dim) * 2 - 1
    return critic.to(device), state.to(device), action.to(device)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["halfcheetah", "pendulum"])
def test_golden(device: str, large_tiles: None, name: str) -> None:
    """All steps of the released code's ascent, and its first gradient."""
    g = load_golden(f"dipo_action_gradient_{name}")
    critic, state, action = golden_critic(g).to(device), g["state"].to(device), g["action"].to(device)
    options = {"lr": g["lr"], "max_norm": g["max_norm"], "eps": g["adam_eps"], "steps": g["steps"]}
    improved = ops.action_gradient(critic, state, action, **options, backend="triton")
    torch.testing.assert_close(improved.cpu(), g["action_out"], rtol=0, atol=1e-4)
    first = -gradient(critic, state, action, backend="triton")
    torch.testing.assert_close(first.cpu(), g["first_grad"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_accuracy(device: str, activation: str) -> None:
    critic, state, action = drawn(device, nn.TwinCritic(5, 8, 33, 2, activation=activation), 130)
    native, eager = (
        gradient(critic, state, action, backend=backend).cpu()
        for backend in ("triton", "reference")
    )
    exact_critic = plain_critic(critic.cpu(), torch.float64)
    exact = gradient(exact_critic, state.cpu().double(), action.cpu().double())
    assert_error_at_most_twice_eager(native, eager, exact)


@pytest.mark.parametrize("optimizer", ["adam", "ascent"])
@pytest.mark.parametrize(
    ("max_norm", "clip_mode"), [(None, "batch"), (0.05, "batch"), (0.05, "row")]
)
def test_optimizers_and_limits(
    device: str, optimizer: str, max_norm: float | None, clip_mode: str
) -> None:
    """Several blocks of rows, of which one program takes all where there is but one."""
    critic, state, action = drawn(device, nn.TwinCritic(5, 3, 16, 2), 70)
    options: dict[str, Any] = {"steps": 4, "lr": 0.1, "max_norm": max_norm, "eps": 1e-3}
    options |= {"optimizer": optimizer, "clip_mode": clip_mode, "low": -0.9, "high": 0.8}
    improved = ops.action_gradient(critic, state, action, **options, backend="triton")
    exact = ops.action_gradient(
        plain_critic(critic.cpu(), torch.float64),
        state.cpu().double(),
        action.cpu().double(),
        **options,
    )
    torch.testing.assert_close(improved.cpu().double(), exact, rtol=0, atol=2e-5)
    assert not torch.allclose(improved, action, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("rows", "state_dim", "action_dim", "hidden_dim", "hidden_layers"),
    [
        (0, 5, 3, 16, 2),
        (1, 1, 1, 1, 1),
        (7, 3, 2, 7, 4),
        (33, 11, 33, 20, 1),  # actions in several blocks
        (5, 17, 6, 130, 2),  # several blocks of inputs and outputs
    ],
)
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_sizes(
    device: str,
    rows: int,
    state_dim: int,
    action_dim: int,
    hidden_dim: int,
    hidden_layers: int,
    max_norm: float | None,
) -> None:
    """Sizes that are multiples of nothing."""
    sizes = (state_dim, action_dim, hidden_dim, hidden_layers)
    critic, state, action = drawn(device, nn.TwinCritic(*sizes), rows)
    action = action.T.contiguous().T  # another order in memory
    options: dict[str, Any] = {"steps": 2, "max_norm": max_norm, "optimizer": "ascent"}
    before = action.clone()
    improved, expected = (
        ops.action_gradient(critic, state, action, **options, backend=backend)
        for backend in ("triton", "reference")
    )
    assert improved.shape == (rows, action_dim)
    assert torch.equal(action, before)
    torch.testing.assert_close(improved, expected, rtol=0, atol=1e-5)


def test_equal_critics_share_the_gradient(device: str) -> None:
    """At a tie each gets half, which is the gradient of either."""
    critic, state, action = drawn(device, nn.TwinCritic(5, 3, 16), 9)
    critic.q2.load_state_dict(critic.q1.state_dict())
    leaf = action.clone().requires_grad_()
    (expected,) = torch.autograd.grad(critic.q1(torch.cat([state, leaf], dim=1)).sum(), leaf)
    torch.testing.assert_close(gradient(critic, state, action, backend="triton"), expected)


def test_a_critic_that_is_never_the_minimum(device: str) -> None:
    """Whose way back is left out."""
    critic, state, action = drawn(device, nn.TwinCritic(5, 3, 16), 40)
    for q, sign in ((critic.q1, 1), (critic.q2, -1)):
        for shift in (100, -100):
            with torch.no_grad():
                q.weights_and_biases()[-1].fill_(shift * sign)
            first, second = (
                gradient(critic, state, action, backend=b) for b in ("triton", "reference")
            )
            torch.testing.assert_close(first, second)
        with torch.no_grad():
            q.weights_and_biases()[-1].zero_()


@pytest.mark.parametrize(("hidden_dim", "hidden_layers"), [(16, 1), (16, 3), (32, 2)])
def test_critics_of_unequal_shapes_are_refused(
    device: str, hidden_dim: int, hidden_layers: int
) -> None:
    critic, state, action = drawn(device, nn.TwinCritic(5, 3, 16, 2), 9)
    critic.q2 = nn.MLP(8, hidden_dim, 1, hidden_layers).to(device)
    with pytest.raises(ValueError, match="'triton' here: the critics' layers differ in number or"):
        ops.action_gradient(critic, state, action, backend="triton")


@pytest.mark.parametrize("hidden", [(12, 16), (16, 12)])
def test_hidden_layers_of_unequal_widths_are_refused(device: str, hidden: tuple[int, int]) -> None:
    critic, state, action = drawn(device, nn.TwinCritic(5, 3, 16, 2), 9)
    for q in (critic.q1, critic.q2):
        q.layers = torch.nn.ModuleList(
            torch.nn.Linear(k, n, device=device) for k, n in itertools.pairwise([8, *hidden, 1])
        )
    with pytest.raises(ValueError, match="'triton' here: a critic's hidden layers differ in width"):
        ops.action_gradient(critic, state, action, backend="triton")


def test_zero_steps_give_a_copy(device: str) -> None:
    critic, state, action = drawn(device, nn.TwinCritic(5, 3, 16), 9)
    copy = ops.action_gradient(critic, state, action, steps=0, backend="triton")
    assert torch.equal(copy, action)
    assert copy.data_ptr() != action.data_ptr()


def test_float16(device: str) -> None:
    critic, state, action = drawn(device, nn.TwinCritic(5, 3, 48, 3), 70)
    full, half = (
        gradient(critic, state, action, compute_dtype=dtype, backend="triton")
        for dtype in (None, torch.float16)
    )
    error = root_mean_square(half - full) / root_mean_square(full)
    assert 1e-5 < error < 1e-2


@pytest.mark.parametrize("name", ["state", "action"])
@pytest.mark.parametrize("activation", ["relu", "mish"])
def test_nan_stays_in_its_row(device: str, activation: str, name: str) -> None:
    critic, state, action = drawn(device, nn.TwinCritic(5, 3, 16, 2, activation=activation), 40)
    {"state": state, "action": action}[name][[0, 35], 1] = math.nan
    for max_norm in (None, 0.1):
        options: dict[str, Any] = {"steps": 2, "max_norm": max_norm, "clip_mode": "row"}
        improved = ops.action_gradient(critic, state, action, **options, backend="triton")
        assert improved.isnan().any(dim=1).nonzero().flatten().tolist() == [0, 35]
    improved = ops.action_gradient(critic, state, action, max_norm=0.1, steps=1, backend="triton")
    assert improved.isnan().all()


# -- programs that wait for one another ------------------------------------------------------------


def test_programs_add_up_each_other_s_norms(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs with several blocks each, of which none can wait here: they run in turns.

    So the first launch is told that all have arrived and leaves every program's part behind, which
    the second finds. Plain steps, since the first has moved nothing that the second reads.
    """
    from diffcore.ops import _triton

    critic, state, action = drawn(device, nn.TwinCritic(5, 3, 16, 2), 170)
    options: dict[str, Any] = {"steps": 1, "max_norm": 0.5, "optimizer": "ascent", "lr": 1.0}
    options |= {"low": -math.inf, "high": math.inf}
    expected = ops.action_gradient(critic, state, action, **options, backend="reference")
    launch, programs_launched = _triton.launch, []

    def launch_twice(kernel: Any, programs: int, *args: Any, **settings: Any) -> None:
        (arrived,) = (a for a in args if isinstance(a, Tensor) and a.dtype == torch.int32)
        programs_launched.append(programs)
        for _ in range(2):
            arrived.fill_(1000)
            launch(kernel, programs, *args, **settings)
        assert arrived.item() == 1000 + programs

    monkeypatch.setattr(_triton, "processors", lambda device: 3)
    monkeypatch.setattr(_triton, "launch", launch_twice)
    improved = ops.action_gradient(critic, state, action, **options, backend="triton")
    assert programs_launched == [3]
    torch.testing.assert_close(improved, expected, rtol=0, atol=1e-6)


def test_as_many_programs_wait_as_run_at_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcore.ops import _triton

    launched = []

    def note(kernel: Any, programs: int, *args: Any, **settings: Any) -> None:
        launched.append((programs, settings["ROWS"], settings["NORM_CLIP"]))

    monkeypatch.setattr(_triton, "processors", lambda device: 132)
    monkeypatch.setattr(_triton, "launch", note)
    critic = nn.TwinCritic(5, 3, 16).to(device)
    for rows, max_norm in ((1, 0.1), (256, 0.1), (4096, 0.1), (100_000, 0.1), (100_000, None)):
        state, action = torch.zeros(rows, 5, device=device), torch.zeros(rows, 3, device=device)
        ops.action_gradient(critic, state, action, max_norm=max_norm, backend="triton")
    assert launched == [
        (1, 8, "batch"),
        (32, 8, "batch"),
        (128, 32, "batch"),
        (132, 32, "batch"),
        (3125, 32, "none"),
    ]


# -- as part of other programs ---------------------------------------------------------------------


def test_opcheck_and_vmap(device: str) -> None:
    critic, state, action = drawn(device, nn.TwinCritic(5, 3, 16, 1), 4)
    q1, q2 = ([p.detach() for p in q.weights_and_biases()] for q in (critic.q1, critic.q2))
    settings = ("mish", "float32", 2, 0.03, 0.1, "batch", "adam", 1e-5, -1.0, 1.0, "triton")
    torch.library.opcheck(ascend.overload, (state, action, q1, q2, *settings))

    def improve(action: Tensor) -> Tensor:
        options: dict[str, Any] = {"steps": 2, "max_norm": 0.05, "backend": "triton"}
        return ops.action_gradient(critic, state, action, **options)

    actions = torch.rand(3, 4, 3, device=device)
    one_by_one = torch.stack([improve(a) for a in actions])
    torch.testing.assert_close(torch.vmap(improve)(actions), one_by_one)
