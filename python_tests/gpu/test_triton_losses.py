"""The losses on the Triton kernels: value and gradients in one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import ACTIVATIONS, load_golden, plain_mlp, root_mean_square
from torch import Tensor

from diffcore import DiffusionSchedule, nn, ops
from diffcore.ops.denoising_loss import _tables
from diffcore.ops.denoising_loss import native as denoising
from diffcore.ops.score_matching_loss import native as score_matching

SCHEDULE = DiffusionSchedule.cosine(20)


# -- the denoising loss ----------------------------------------------------------------------------


class Data:
    """A denoiser and one batch for it."""

    def __init__(
        self,
        batch: int,
        state_dim: int = 7,
        action_dim: int = 3,
        weighted: bool = False,
        **options: Any,
    ) -> None:
        self.options = {
            "state_dim": state_dim,
            "action_dim": action_dim,
            "hidden_dim": 20,
        } | options
        self.denoiser = nn.Denoiser(**self.options)
        for parameter in self.denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.state, self.action = torch.randn(batch, state_dim), torch.rand(batch, action_dim)
        self.t, self.noise = torch.randint(20, (batch,)), torch.randn(batch, action_dim)
        self.weight = torch.randn(batch) if weighted else None

    def run(
        self,
        backend: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        grad_losses: Tensor | None = None,
    ) -> list[Tensor]:
        """[loss, gradients of state, action and the parameters], everything in `dtype`.

        With `grad_losses` ``[B]`` of the losses of rows, each times its part of that.
        """
        denoiser = nn.Denoiser(**self.options).to(device, dtype)
        denoiser.load_state_dict(self.denoiser.state_dict())
        state, action = (x.to(device, dtype).requires_grad_() for x in (self.state, self.action))
        loss = ops.denoising_loss(
            denoiser,
            SCHEDULE,
            state,
            action,
            t=self.t.to(device),
            noise=self.noise.to(device, dtype),
            weight=None if self.weight is None else self.weight.to(device, dtype),
            reduction="mean" if grad_losses is None else "none",
            backend=backend,
        )
        grad_losses = None if grad_losses is None else grad_losses.to(device, dtype)
        grads = torch.autograd.grad(loss, [state, action, *denoiser.parameters()], grad_losses)
        return [t.detach().cpu() for t in (loss, *grads)]


@pytest.mark.parametrize("batch", [1, 7, 33])
@pytest.mark.parametrize(
    "sizes",
    [
        {"state_dim": 1, "action_dim": 1, "hidden_dim": 1, "hidden_layers": 1, "time_dim": 2},
        {"state_dim": 17, "action_dim": 6, "hidden_dim": 33, "time_dim": 10, "hidden_layers": 2},
        {"state_dim": 3, "action_dim": 17, "hidden_dim": 64, "hidden_layers": 1},
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_denoising_loss(
    device: str, batch: int, sizes: dict[str, int], weighted: bool, by_row: bool
) -> None:
    data, grad_losses = Data(batch, weighted=weighted, **sizes), None
    if by_row:
        grad_losses = torch.randn(batch)
    exact = data.run("reference", dtype=torch.float64, grad_losses=grad_losses)
    for a, b in zip(data.run("triton", device, grad_losses=grad_losses), exact, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 2e-6 * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_denoising_loss_with_every_activation(device: str, activation: str) -> None:
    data = Data(9, activation=activation, hidden_layers=1)
    exact = data.run("reference", dtype=torch.float64)
    for a, b in zip(data.run("triton", device), exact, strict=True):
        assert (a - b).abs().max() <= 2e-6 * max(1.0, b.abs().max().item())


def test_empty_batch_of_denoising(device: str) -> None:
    loss, _, _, *grads = Data(0).run("triton", device)
    assert torch.isnan(loss)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    losses, _, _, *grads = Data(0).run("triton", device, grad_losses=torch.empty(0))
    assert losses.shape == (0,)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_losses_of_rows_do_not_know_their_batch(device: str) -> None:
    data, grad_losses = Data(35, weighted=True), torch.randn(35)
    whole = data.run("triton", device, grad_losses=grad_losses)
    # A program's own rows: elsewhere among 16, the interpreter's products sum in another order.
    rows = slice(16, 23)
    part = Data(1)
    part.denoiser = data.denoiser
    for name in ("state", "action", "t", "noise", "weight"):
        setattr(part, name, getattr(data, name)[rows])
    alone = part.run("triton", device, grad_losses=grad_losses[rows])
    for of_whole, own in zip(whole[:3], alone[:3], strict=True):
        assert torch.equal(of_whole[rows], own)


@pytest.mark.parametrize("level", [20, -1, 2**40, -(2**40)])
def test_a_level_that_does_not_exist_gives_nan(device: str, level: int) -> None:
    """An error would have to wait for the device."""
    data = Data(5)
    data.t[3] = level
    loss, grad_state, *_ = data.run("triton", device)
    assert torch.isnan(loss)
    assert torch.isnan(grad_state).any(1).tolist() == [i == 3 for i in range(5)]
    losses, grad_state, *_ = data.run("triton", device, grad_losses=torch.ones(5))
    assert torch.isnan(losses).tolist() == [i == 3 for i in range(5)]
    assert torch.isnan(grad_state).any(1).tolist() == [i == 3 for i in range(5)]


@pytest.mark.parametrize("weighted", [False, True])
def test_nan_stays_in_its_row_of_denoising(device: str, weighted: bool) -> None:
    data = Data(9, weighted=weighted)
    (data.state[5, 2:3] if data.weight is None else data.weight[5:6]).fill_(float("nan"))
    loss, grad_state, grad_action, *_ = data.run("triton", device)
    assert torch.isnan(loss)
    for grad in (grad_state, grad_action):
        assert torch.isnan(grad).any(1).tolist() == [i == 5 for i in range(9)]


def test_only_wanted_gradients_of_denoising(device: str) -> None:
    data = Data(6, hidden_layers=1)
    full = data.run("triton", device)
    denoiser = data.denoiser.to(device).requires_grad_(False)
    state, action = data.state.to(device), data.action.to(device)
    given = {"t": data.t.to(device), "noise": data.noise.to(device), "backend": "triton"}
    for leaf, expected in ((state, full[1]), (action, full[2])):
        leaf.requires_grad_()
        loss = ops.denoising_loss(denoiser, SCHEDULE, state, action, **given)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert torch.equal(grad.cpu(), expected)
        leaf.requires_grad_(False)
    loss = ops.denoising_loss(denoiser, SCHEDULE, state, action, **given)
    assert not loss.requires_grad
    assert torch.equal(loss.cpu(), full[0])
    parameters = list(denoiser.requires_grad_().parameters())
    loss = ops.denoising_loss(denoiser, SCHEDULE, state, action, **given)
    for grad, expected in zip(torch.autograd.grad(loss, parameters), full[3:], strict=True):
        assert torch.equal(grad.cpu(), expected)


def denoising_arguments(data: Data, device: str) -> tuple[tuple[Any, ...], list[Tensor]]:
    tables = _tables(SCHEDULE, data.denoiser.time_dim, torch.device(device))
    rows = (data.state, data.action, data.noise, data.weight, data.t)
    inputs = [t if t is None else t.to(device) for t in rows]
    parameters = [p.detach().to(device) for p in data.denoiser.parameters()]
    return (*inputs, *tables, "mish"), parameters


@pytest.mark.parametrize("weighted", [False, True])
def test_float16_denoising_is_within_a_percent(device: str, weighted: bool) -> None:
    data = Data(40, weighted=weighted, hidden_dim=40)
    inputs, parameters = denoising_arguments(data, device)
    wanted = [True] * (2 + len(parameters))
    settings = ("mean", wanted, parameters, "float16", "triton")
    loss, grads = denoising.loss_and_gradients(*inputs, *settings)
    for a, b in zip((loss, *grads), data.run("reference", dtype=torch.float64), strict=True):
        assert root_mean_square(a.cpu() - b) <= 0.01 * root_mean_square(b)


@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck_of_denoising(device: str, weighted: bool) -> None:
    data = Data(5, weighted=weighted, hidden_layers=1)
    inputs, parameters = denoising_arguments(data, device)
    wanted = [True] * (2 + len(parameters))
    for reduction in ("mean", "none"):
        arguments = (*inputs, reduction, wanted, parameters, "float32", "triton")
        torch.library.opcheck(denoising.loss_and_gradients.overload, arguments)


@pytest.mark.parametrize("seed", [3, 2**62 + 12345])
def test_normals_are_those_of_every_backend(device: str, seed: int) -> None:
    like, seed_tensor = torch.empty(70, 21), torch.tensor(seed)
    expected = denoising.normals(seed_tensor, like, "cpu")
    for where in {"cpu", device}:  # a seed on the device is read there
        z = denoising.normals(seed_tensor.to(where), like.to(device), "triton")
        assert (z.cpu() - expected).abs().max() <= 1e-6
    torch.library.opcheck(denoising.normals.overload, (seed_tensor, like.to(device), "triton"))


def test_a_weight_of_one_changes_no_bit_of_denoising(device: str) -> None:
    data = Data(9)
    plain = data.run("triton", device)
    data.weight = torch.ones(9)
    for a, b in zip(data.run("triton", device), plain, strict=True):
        assert torch.equal(a, b)


def test_draws_as_on_the_reference(device: str) -> None:
    data = Data(20)
    denoiser, tensors = data.denoiser.to(device), [t.to(device) for t in (data.state, data.action)]
    losses = [
        ops.denoising_loss(
            denoiser,
            SCHEDULE,
            *tensors,
            generator=torch.Generator(device).manual_seed(1),
            backend=backend,
        ).item()
        for backend in ("triton", "reference")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# -- the score matching loss -----------------------------------------------------------------------


def make_inputs(batch: int, features: int, state: int, hidden: int) -> list[Tensor]:
    """psi, hidden, weight, bias, offset and score_weight, with scores of order 1."""
    outputs = features * state
    return [
        torch.randn(batch, features),
        torch.randn(batch, hidden),
        torch.randn(outputs, hidden) / (hidden * features) ** 0.5,
        torch.randn(outputs) / (features + 1) ** 0.5,
        torch.randn(batch, state),
        torch.rand(batch),
    ]


def run(
    inputs: list[Tensor],
    backend: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> list[Tensor]:
    """[loss, gradients of psi, hidden, weight and bias], everything computed in `dtype`."""
    tensors = [t.detach().to(device, dtype) for t in inputs]
    leaves = [t.requires_grad_() for t in tensors[:4]]
    loss = ops.score_matching_loss(*tensors, backend=backend, **options)
    return [t.detach().cpu() for t in (loss, *torch.autograd.grad(loss, leaves))]


def assert_close_to_exact(inputs: list[Tensor], device: str) -> None:
    exact = run(inputs, "reference", dtype=torch.float64)
    for a, b in zip(run(inputs, "triton", device), exact, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 2e-6 * max(b.abs().max().item(), len(inputs[0]) ** -0.5)


@pytest.mark.parametrize("batch", [1, 7, 33])
@pytest.mark.parametrize(
    ("features", "state", "hidden"),
    [(1, 1, 1), (7, 11, 33), (49, 1, 15), (20, 3, 140), (65, 2, 9)],
)
def test_score_matching_loss(
    device: str, batch: int, features: int, state: int, hidden: int
) -> None:
    assert_close_to_exact(make_inputs(batch, features, state, hidden), device)


@pytest.mark.parametrize("features", [40, 31])
def test_more_features_than_one_block(
    device: str, features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffcore.ops.score_matching_loss import triton

    monkeypatch.setattr(triton, "MOST_FEATURES", 16)
    assert_close_to_exact(make_inputs(9, features, 3, 20), device)


def test_long_batches_are_summed_in_parts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcore.ops.score_matching_loss import triton

    monkeypatch.setattr(triton, "MOST_SUMMED_ROWS", 32)
    assert_close_to_exact(make_inputs(70, 9, 2, 20), device)


@pytest.mark.parametrize("name", ["pendulum", "halfcheetah"])
def test_golden_representation_step(device: str, name: str) -> None:
    """Loss, gradients and one Adam step of both networks, as the released code recorded them."""
    g = {
        k: v.to(device) if isinstance(v, Tensor) else v
        for k, v in load_golden(f"diffsr_score_step_{name}").items()
    }
    psi, zeta = (
        [torch.nn.Parameter(value) for key, value in g.items() if key.startswith(prefix)]
        for prefix in ("psi__", "zeta__")
    )
    abar = g["alphabars"][g["noise_level"]][:, None]
    perturbed = abar.sqrt() * g["next_state"] + (1 - abar).sqrt() * g["noise_scaled"]
    inputs = torch.cat([perturbed, abar], dim=1)
    loss = ops.score_matching_loss(
        plain_mlp(torch.cat([g["state"], g["action"]], dim=1), psi, "elu"),
        torch.nn.functional.elu(torch.nn.functional.linear(inputs, *zeta[:2])),
        *zeta[2:],
        offset=-(1 - abar).sqrt() * g["noise_scaled"],
        score_weight=-(1 - abar[:, 0]) * g["sigma_scale"],
        backend="triton",
    )
    assert loss.item() == pytest.approx(g["score_loss"], rel=1e-5)
    parameters = [*psi, *zeta]
    optimizer = torch.optim.Adam(parameters, lr=g["lr"])
    loss.backward()
    optimizer.step()
    recorded = ([value for key, value in g.items() if key.startswith(p)] for p in ("grad", "after"))
    for parameter, gradient, after in zip(parameters, *recorded, strict=True):
        rows = slice(len(gradient))  # of large tensors only the first rows are recorded
        assert torch.allclose(parameter.grad[rows], gradient, atol=1e-4)
        assert torch.allclose(parameter.detach()[rows], after, atol=1e-4)


def test_float16_score_matching_is_within_a_percent(device: str) -> None:
    inputs = make_inputs(40, 33, 3, 40)
    ours = run(inputs, "triton", device, compute_dtype=torch.float16)
    exact = run(inputs, "reference", dtype=torch.float64)
    for a, b in zip(ours, exact, strict=True):
        assert root_mean_square(a - b) <= 0.01 * root_mean_square(b)
    assert root_mean_square(ours[3] - exact[3]) >= 1e-5 * root_mean_square(exact[3])


@pytest.mark.parametrize("where", [0, 1, 4, 5])
def test_nan_stays_in_its_row_of_score_matching(device: str, where: int) -> None:
    inputs = make_inputs(21, 20, 2, 30)
    inputs[where][5] = float("nan")
    loss, grad_psi, grad_hidden, *rest = run(inputs, "triton", device)
    assert loss.isnan()
    for gradient in (grad_psi, grad_hidden):
        assert gradient.isnan().all(1).tolist() == [i == 5 for i in range(21)]
        assert not gradient[torch.arange(21) != 5].isnan().any()
    assert all(gradient.isnan().all() for gradient in rest)


def test_empty_batch_of_score_matching(device: str) -> None:
    loss, *gradients = run(make_inputs(0, 3, 2, 4), "triton", device)
    assert loss.isnan()
    assert [list(g.shape) for g in gradients] == [[0, 3], [0, 4], [6, 4], [6]]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3)])
def test_only_wanted_gradients_of_score_matching(device: str, wanted: tuple[int, ...]) -> None:
    inputs = [t.to(device) for t in make_inputs(9, 20, 3, 10)]
    whole = run(inputs, "triton", device)
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    loss = ops.score_matching_loss(*leaves, backend="triton")
    loss.backward()
    assert torch.equal(loss.detach().cpu(), whole[0])
    for i in wanted:
        assert torch.equal(leaves[i].grad.cpu(), whole[1 + i])


def test_strides_and_opcheck_of_score_matching(device: str) -> None:
    inputs = [t.to(device) for t in make_inputs(9, 6, 3, 5)]
    strided = [t.t().contiguous().t() for t in inputs]
    for a, b in zip(run(strided, "triton", device), run(inputs, "triton", device), strict=True):
        assert torch.equal(a, b)
    arguments = (*inputs, "float32", [True, False, True, True], "triton")
    torch.library.opcheck(score_matching.loss_and_gradients.overload, arguments)


# -- representation loss ---------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(0, 1, 2, 3), (2, 3), (0,)])
def test_representation_loss(device: str, wanted: tuple[int, ...]) -> None:
    """Of x, perturbed, psi's parameters and zeta's those gradients that are wanted."""
    networks = [nn.MLP(5, 20, 6, 1, "elu").to(device), nn.MLP(4, 17, 6 * 3, 1, "elu").to(device)]
    inputs = [torch.randn(9, n, device=device) for n in (5, 4, 3)]
    inputs = [*inputs, torch.rand(9, device=device)]
    for i in range(2):
        inputs[i].requires_grad_(i in wanted)
        networks[i].requires_grad_(i + 2 in wanted)
    tensors = [*inputs[:2], *networks[0].parameters(), *networks[1].parameters()]
    leaves = [t for t in tensors if t.requires_grad]
    results = []
    for backend in ("triton", "reference"):
        loss = ops.representation_loss(*networks, *inputs, backend=backend)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5)


# -- critic loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(0, 1), (0,), (1,), ()])
@pytest.mark.parametrize("weighted", [False, True])
def test_critic_loss(device: str, wanted: tuple[int, ...], weighted: bool) -> None:
    """Of x and the parameters those gradients that are wanted."""
    networks = [list(nn.MLP(5, 20, 2, 1).to(device).parameters()) for _ in range(2)]
    x = torch.randn(9, 5, device=device, requires_grad=0 in wanted)
    parameters = [p.requires_grad_(1 in wanted) for network in networks for p in network]
    leaves = [t for t in (x, *parameters) if t.requires_grad]
    arguments = x, networks, ["mish", "identity"], torch.randn(9, 2, device=device)
    weights = torch.randn(9, device=device) if weighted else None
    results = []
    for backend in ("triton", "reference"):
        loss, q = ops.critic_loss(*arguments, weight=weights, backend=backend)
        assert not q.requires_grad
        results.append([loss, q, *(torch.autograd.grad(loss, leaves) if leaves else ())])
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [torch.ones(9), torch.tensor([1, 1, 1, 1, 1, 0, 1, 1, 1.0])])
def test_weights_of_one_change_no_bit_of_critic_loss(device: str, weights: Tensor) -> None:
    """And one of zero no other row's."""
    networks = [list(nn.MLP(5, 20, 2, 1).to(device).parameters()) for _ in range(2)]
    rows = torch.randn(9, 5), torch.randn(9, 2)
    x, target = (t.to(device) for t in rows)
    results = []
    for given in (None, weights.to(device)):
        leaf, options = x.clone().requires_grad_(), {"weight": given, "backend": "triton"}
        loss, _ = ops.critic_loss(leaf, networks, ["mish", "identity"], target, **options)
        gradients = torch.autograd.grad(loss, [leaf, *networks[0], *networks[1]])
        results.append([loss, *(t.cpu() for t in gradients)])
    plain, weighted = results
    kept = weights != 0
    assert torch.equal(weighted[1][kept], plain[1][kept])
    assert not weighted[1][~kept].any()
    assert kept.all() == all(map(torch.equal, plain, weighted))
