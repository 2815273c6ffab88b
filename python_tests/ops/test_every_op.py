"""What every op promises, asked of all of them alike. Their own files look closer at each."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ACTIVATIONS, assert_error_at_most_twice_eager, run_script
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from diffcore import DiffusionSchedule, ops
from diffcore.nn import MLP, Denoiser, Psi, SquashedGaussian, TwinCritic, TwinRFFCritic
from diffcore.ops import _native

SCHEDULE = DiffusionSchedule.linear(4)
COEFFICIENTS = torch.tensor([1.5, 0.7, 0.3, 0.9, -0.2, 0.4, -0.6], dtype=torch.float64)


@dataclass(frozen=True)
class Sizes:
    """Of an op's networks and inputs."""

    state: int = 5
    action: int = 3
    hidden: int = 33
    depth: int = 2
    activation: str = "mish"

    @property
    def network(self) -> dict[str, Any]:
        return {
            "hidden_dim": self.hidden,
            "hidden_layers": self.depth,
            "activation": self.activation,
        }


Rows = dict[str, Tensor]
Results = tuple[list[Tensor], list[Tensor]]
"""What has a row for each of the batch's, and what belongs to the batch."""


@dataclass(frozen=True)
class Op:
    """An op as a function of a network and of inputs of which each has the batch's rows."""

    make: Callable[[Sizes], nn.Module]
    rows: Callable[[Sizes, int], Rows]
    call: Callable[..., Results]
    """(network, rows, **options); what requires a gradient is differentiated."""
    differentiable: tuple[str, ...] = ()
    """Rows that the op's kernel has gradients of."""
    is_mean: bool = False
    """A mean over the batch, of which a row's gradient is the larger the fewer rows there are."""
    precisions: tuple[Any, ...] = (None, torch.bfloat16)
    backend: str = "cpu"


def vectors(batch: int, **widths: int) -> Rows:
    return {name: torch.randn(batch, width) for name, width in widths.items()}


def parameters(network: nn.Module) -> list[Tensor]:
    return list(network.parameters())


def sequential(s: Sizes, inputs: int, outputs: int, activation: str | None = None) -> MLP:
    return MLP(inputs, s.hidden, outputs, s.depth, activation or s.activation, "uniform")


def layers(mlp: Any) -> tuple[list[Tensor], list[Tensor], list[str]]:
    own = parameters(mlp)
    return own[::2], own[1::2], mlp.activations


def ensemble(network: Any) -> tuple[list[list[Tensor]], list[str]]:
    return [parameters(mlp) for mlp in network], network[0].activations


def by_rows(results: Tensor) -> Tensor:
    """``[N, B, out]`` -> ``[B, N * out]``"""
    return results.movedim(0, 1).flatten(1)


def soft_value_networks(s: Sizes) -> nn.Module:
    policy, psi = SquashedGaussian(s.state, s.action, s.hidden), Psi(s.state, s.action, 7, s.hidden)
    critics = TwinRFFCritic(7, s.hidden)
    return nn.ModuleList([policy, psi.requires_grad_(False), critics.requires_grad_(False)])


def soft_value(networks: Any, r: Rows, **options: Any) -> Results:
    loss, value, log_prob = ops.soft_value(
        *networks, r["state"], r["noise"], r["state"].new_tensor(0.25), **options
    )
    return [value, log_prob], [loss]


def psi_and_zeta(s: Sizes) -> nn.Module:
    return nn.ModuleList([sequential(s, s.state, 7), sequential(s, s.action, 7 * s.action)])


def representation_step(networks: Any, r: Rows, **options: Any) -> Results:
    # With a large epsilon: a small one makes a full step of a gradient that is all rounding.
    optimizer = torch.optim.Adam(networks.parameters(), lr=0.01, eps=1e-2)
    if not len(r["x"]):  # which has no kernel
        del options["backend"]
    loss, norm = ops.representation_step(*networks, *r.values(), optimizer, **options)
    return [], [loss, norm, *(p.detach() for p in networks.parameters())]


def critic_loss(networks: Any, r: Rows, **options: Any) -> Results:
    loss, q = ops.critic_loss(
        r["x"], *ensemble(networks), r["target"], weight=r.get("weight"), **options
    )
    return [by_rows(q)], [loss]


def denoising_losses(denoiser: Any, r: Rows, **options: Any) -> Results:
    losses = ops.denoising_loss(denoiser, SCHEDULE, **r, reduction="none", **options)
    return [losses[:, None]], []


def representation_rows(s: Sizes, batch: int) -> Rows:
    rows = vectors(batch, x=s.state, perturbed=s.action, offset=s.action, score_weight=1)
    rows["score_weight"] = rows["score_weight"][:, 0]
    return rows


def score_rows(s: Sizes, batch: int) -> Rows:
    rows = vectors(batch, psi=7, hidden=s.hidden, offset=s.action, score_weight=1)
    rows["score_weight"] = rows["score_weight"][:, 0]
    return rows


def leveled(rows: Rows, batch: int) -> Rows:
    return {**rows, "t": torch.arange(batch) % SCHEDULE.K}


OPS: dict[str, Op] = {
    "action_gradient": Op(
        lambda s: TwinCritic(s.state, s.action, **s.network),
        lambda s, batch: vectors(batch, state=s.state, action=s.action),
        # Plain steps of at most 2e-3, so that a kink doesn't turn a rounding into a whole step.
        lambda critic, r, **options: (
            [
                ops.action_gradient(
                    critic,
                    **r,
                    steps=2,
                    lr=0.1,
                    max_norm=0.01,
                    optimizer="ascent",
                    clip_mode="row",
                    **options,
                )
            ],
            [],
        ),
    ),
    "critic_loss": Op(
        lambda s: nn.ModuleList([sequential(s, s.state, 1) for _ in range(2)]),
        lambda s, batch: vectors(batch, x=s.state, target=1),
        critic_loss,
        ("x",),
        is_mean=True,
    ),
    "critic_loss, weighted": Op(
        lambda s: nn.ModuleList([sequential(s, s.state, 1) for _ in range(2)]),
        lambda s, batch: {**vectors(batch, x=s.state, target=1), "weight": torch.randn(batch)},
        critic_loss,
        ("x",),
        is_mean=True,
    ),
    "denoising_loss": Op(
        lambda s: Denoiser(s.state, s.action, **s.network),
        lambda s, batch: leveled(
            vectors(batch, state=s.state, action=s.action, noise=s.action), batch
        ),
        lambda denoiser, r, **options: (
            [],
            [ops.denoising_loss(denoiser, SCHEDULE, **r, **options)],
        ),
        ("state", "action"),
        is_mean=True,
    ),
    "denoising_loss, by row": Op(
        lambda s: Denoiser(s.state, s.action, **s.network),
        lambda s, batch: leveled(
            {
                **vectors(batch, state=s.state, action=s.action, noise=s.action),
                "weight": torch.randn(batch),
            },
            batch,
        ),
        denoising_losses,
        ("state", "action"),
    ),
    "mlp": Op(
        lambda s: sequential(s, s.state, s.action),
        lambda s, batch: vectors(batch, x=s.state),
        lambda mlp, r, **options: ([ops.mlp(r["x"], *layers(mlp), **options)], []),
        ("x",),
    ),
    "mlp_ensemble": Op(
        lambda s: nn.ModuleList([sequential(s, s.state, s.action) for _ in range(3)]),
        lambda s, batch: vectors(batch, x=s.state),
        lambda networks, r, **options: (
            [by_rows(ops.mlp_ensemble(r["x"], *ensemble(networks), **options))],
            [],
        ),
        ("x",),
    ),
    "q_sample": Op(
        lambda s: nn.Identity(),
        lambda s, batch: leveled(vectors(batch, x0=s.action, noise=s.action), batch),
        lambda _, r, **options: ([ops.q_sample(**r, schedule=SCHEDULE, **options)], []),
        ("x0", "noise"),
        precisions=(None,),
        backend="reference",
    ),
    "representation_loss": Op(
        psi_and_zeta,
        representation_rows,
        lambda networks, r, **options: ([], [ops.representation_loss(*networks, **r, **options)]),
        ("x", "perturbed"),
        is_mean=True,
    ),
    "representation_step": Op(psi_and_zeta, representation_rows, representation_step),
    "reverse_diffusion": Op(
        lambda s: Denoiser(s.state, s.action, **s.network),
        lambda s, batch: {
            **vectors(batch, state=s.state, x_init=s.action),
            "noise": torch.randn(batch, SCHEDULE.K, s.action),
        },
        lambda denoiser, r, **options: (
            [
                ops.reverse_diffusion(
                    denoiser, SCHEDULE, **{**r, "noise": r["noise"].transpose(0, 1)}, **options
                )
            ],
            [],
        ),
        ("state", "x_init", "noise"),
    ),
    "reverse_step": Op(
        lambda s: nn.Identity(),
        lambda s, batch: vectors(
            batch, x=s.action, eps=s.action, noise=s.action, x0_previous=s.action
        ),
        lambda _, r, **options: (
            list(ops.reverse_step(**r, coefficients=COEFFICIENTS, **options)),
            [],
        ),
        ("x", "eps", "noise", "x0_previous"),
        precisions=(None,),
    ),
    "rff_features": Op(
        lambda s: nn.Linear(s.state, s.hidden),
        lambda s, batch: vectors(batch, x=s.state),
        lambda layer, r, **options: (
            [ops.rff_features(r["x"], *layer.parameters(), kind="cos_sin", **options)],
            [],
        ),
        ("x",),
        precisions=(None,),
    ),
    "score_matching_loss": Op(
        lambda s: nn.Linear(s.hidden, 7 * s.action),
        score_rows,
        lambda last, r, **options: (
            [],
            [ops.score_matching_loss(**r, weight=last.weight, bias=last.bias, **options)],
        ),
        ("psi", "hidden"),
        is_mean=True,
    ),
    "soft_value": Op(
        soft_value_networks,
        lambda s, batch: vectors(batch, state=s.state, noise=s.action),
        soft_value,
        is_mean=True,
        precisions=(None,),  # its networks say what they multiply in
    ),
    "squashed_gaussian": Op(
        lambda s: sequential(s, s.state, 2 * s.action),
        lambda s, batch: vectors(batch, x=s.state, noise=s.action),
        lambda mlp, r, **options: (
            list(ops.squashed_gaussian(r["x"], *layers(mlp), r["noise"], **options)),
            [],
        ),
        ("x",),
    ),
}

CALLS = [(name, precision) for name, op in OPS.items() for precision in op.precisions]
DIFFERENTIABLE = [*(name for name, op in OPS.items() if op.differentiable), "soft_value"]
WITHOUT_TILES = ("q_sample", "reverse_step")
every_op = pytest.mark.parametrize("name", OPS)
every_call = pytest.mark.parametrize(("name", "precision"), CALLS)


def run(
    op: Op,
    network: nn.Module,
    rows: Rows,
    dtype: torch.dtype = torch.float32,
    precision: torch.dtype | None = None,
    backend: str | None = None,
) -> Results:
    """The op's results, then its gradients of rows and of parameters, everything in ``dtype``."""
    network = copy.deepcopy(network).to(dtype)
    rows = {k: v.to(dtype) if v.is_floating_point() else v for k, v in rows.items()}
    leaves = [rows[name].detach().requires_grad_() for name in op.differentiable]
    rows |= dict(zip(op.differentiable, leaves, strict=True))
    options = {"backend": backend or op.backend}
    by_row, of_all = op.call(network, rows, **options, **_precision(precision))
    values = [r for r in (*by_row, *of_all) if r.requires_grad]
    if values:
        wanted = [*leaves, *(p for p in network.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(sum(map(weighted_sum, values)), wanted)
        by_row, of_all = [*by_row, *gradients[: len(leaves)]], [*of_all, *gradients[len(leaves) :]]
    return [r.detach() for r in by_row], [r.detach() for r in of_all]


def _precision(precision: torch.dtype | None) -> dict[str, Any]:
    return {} if precision is None else {"compute_dtype": precision}


def weighted_sum(values: Tensor) -> Tensor:
    """Of a loss itself; of what has rows every column with a weight of its own."""
    if values.ndim == 0:
        return values
    return (values * torch.arange(1, values.shape[-1] + 1).to(values).cos()).sum()


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.nan_to_num(nan=7.0), y.nan_to_num(nan=7.0))
        assert torch.equal(x.isnan(), y.isnan())


def test_none_is_left_out() -> None:
    assert {name.split(",")[0] for name in OPS} == {*ops.__all__}


@every_op
def test_error_at_most_twice_eager(isa: str, name: str) -> None:
    """Of all results and gradients that are large enough to compare errors by."""
    op, sizes = OPS[name], Sizes(state=11, action=6, hidden=65)
    network, rows = op.make(sizes), op.rows(sizes, 1024)
    ours = run(op, network, rows)
    eager = run(op, network, rows, backend="reference")
    exact = run(op, network, rows, torch.float64, backend="reference")
    compared = 0
    for results in zip(*(by_row + of_all for by_row, of_all in (ours, eager, exact)), strict=True):
        assert torch.isfinite(results[0]).all()
        if results[0].numel() >= 1000:
            assert_error_at_most_twice_eager(*results)
            compared += 1
    assert compared


@every_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_on_the_reference(name: str, dtype: torch.dtype) -> None:
    op = OPS[name]
    network, rows = op.make(Sizes()).to(dtype), op.rows(Sizes(), 3)
    rows = {k: v.to(dtype) if v.is_floating_point() else v for k, v in rows.items()}
    ours = op.call(copy.deepcopy(network), rows)
    expected = op.call(network, rows, backend="reference")
    for a, b in zip(ours[0] + ours[1], expected[0] + expected[1], strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_of_the_reference(name: str) -> None:
    """First and second, in float64, in all rows and parameters that have one."""
    op, sizes = OPS[name], Sizes(2, 2, 3, 1, "tanh")
    network, rows = op.make(sizes).double(), op.rows(sizes, 3)
    rows = {k: v.double() if v.is_floating_point() else v for k, v in rows.items()}
    leaves = [rows[given_].requires_grad_() for given_ in op.differentiable]
    inputs = [*leaves, *(p for p in network.parameters() if p.requires_grad)]

    def values(*_: Tensor) -> tuple[Tensor, ...]:
        by_row, of_all = op.call(network, rows, backend="reference")
        return tuple(r for r in (*by_row, *of_all) if r.requires_grad)

    assert torch.autograd.gradcheck(values, inputs)
    assert torch.autograd.gradgradcheck(values, inputs)


@pytest.mark.parametrize("name", [n for n in DIFFERENTIABLE if OPS[n].make(Sizes()).state_dict()])
def test_a_second_derivative_of_a_kernel_says_that_there_is_none(name: str) -> None:
    """Ops without a network, which have one, are differentiated twice in their own files."""
    op = OPS[name]
    network, rows = op.make(Sizes()), op.rows(Sizes(), 3)
    by_row, of_all = op.call(network, rows, backend="cpu")
    parameters = [p for p in network.parameters() if p.requires_grad]
    value = sum(weighted_sum(r) for r in (*by_row, *of_all) if r.requires_grad)
    slopes = torch.autograd.grad(value, parameters, create_graph=True)
    refusal = "no second derivative.*backend='reference'"
    options = {"is_grads_batched": True, "create_graph": True}
    with pytest.raises(RuntimeError, match=refusal):
        torch.autograd.grad(value, parameters, torch.ones(2), **options)
    with pytest.raises(RuntimeError, match=refusal):
        sum(slope.sum() for slope in slopes).backward()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_a_checkpointed_call(name: str) -> None:
    """torch computes it again where the way back first asks for what it has saved, and once only."""
    op = OPS[name]
    network, rows = op.make(Sizes()), op.rows(Sizes(), 3)
    leaves = [rows[given_].requires_grad_() for given_ in op.differentiable]
    inputs = [*leaves, *(p for p in network.parameters() if p.requires_grad)]

    def value() -> Any:
        by_row, of_all = op.call(network, rows, backend=op.backend)
        return sum(weighted_sum(r) for r in (*by_row, *of_all) if r.requires_grad)

    gradients = torch.autograd.grad(checkpoint(value, use_reentrant=False), inputs)
    assert_same([*gradients], [*torch.autograd.grad(value(), inputs)])


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_traced_with_the_call(name: str, tracing: str) -> None:
    op = OPS[name]
    network = op.make(Sizes())
    parameters = [p for p in network.parameters() if p.requires_grad]

    def gradients(rows: Rows) -> tuple[Tensor, ...]:
        leaves = {given_: rows[given_].detach().requires_grad_() for given_ in op.differentiable}
        by_row, of_all = op.call(network, {**rows, **leaves}, backend=op.backend)
        value: Any = sum(weighted_sum(r) for r in (*by_row, *of_all) if r.requires_grad)
        return torch.autograd.grad(value, [*leaves.values(), *parameters])

    traced = make_fx(gradients, tracing_mode=tracing, _allow_non_fake_inputs=True)(
        op.rows(Sizes(), 3)
    )
    rows = op.rows(Sizes(), 3)
    assert_same([*traced(rows)], [*gradients(rows)])


@pytest.mark.parametrize("way", ["is_grads_batched", "torch.vmap"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_several_gradients_at_once(name: str, way: str) -> None:
    """By either of torch's vmaps, what a loop over them gives."""
    op = OPS[name]
    network, rows = op.make(Sizes()), op.rows(Sizes(), 3)
    leaves = [rows[given_].requires_grad_() for given_ in op.differentiable]
    inputs = [*leaves, *(p for p in network.parameters() if p.requires_grad)]
    by_row, of_all = op.call(network, rows, backend=op.backend)
    values = [r for r in (*by_row, *of_all) if r.requires_grad]
    weights = [torch.randn(4, *value.shape) for value in values]

    def gradients(*of_values: Tensor, **options: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(values, inputs, of_values, retain_graph=True, **options)

    by_loop = [gradients(*of_values) for of_values in zip(*weights, strict=True)]
    at_once = (
        torch.vmap(gradients)(*weights)
        if way == "torch.vmap"
        else gradients(*weights, is_grads_batched=True)
    )
    assert_same([*map(torch.stack, zip(*by_loop, strict=True))], [*at_once])


@pytest.mark.parametrize("name", [n for n in DIFFERENTIABLE if OPS[n].differentiable])
def test_jacobian(name: str) -> None:
    op = OPS[name]
    network, rows = op.make(Sizes()), op.rows(Sizes(), 3)

    def values(*leaves: Tensor) -> tuple[Tensor, ...]:
        given_ = dict(zip(op.differentiable, leaves, strict=True))
        by_row, of_all = op.call(network, {**rows, **given_}, backend=op.backend)
        return (*by_row, *of_all)

    leaves = tuple(rows[given_] for given_ in op.differentiable)
    jacobian = torch.func.jacrev(values, argnums=tuple(range(len(leaves))))(*leaves)
    by_loop = torch.autograd.functional.jacobian(values, leaves)
    for ours, expected in zip(jacobian, by_loop, strict=True):
        assert_same([*ours], [*expected])


@every_call
def test_same_bits_for_any_number_of_threads_and_on_repeat(
    isa: str, name: str, precision: Any, set_threads: Callable[[int], None]
) -> None:
    op = OPS[name]
    for batch in (5, 2100):  # large enough for torch to share its own sums, where it makes some
        network, rows = op.make(Sizes()), op.rows(Sizes(), batch)
        results = []
        for threads in (1, 2, 3, 2):
            set_threads(threads)
            results.append(run(op, network, rows, precision=precision))
        for other in results[1:]:
            assert_same(results[0][0], other[0])
            assert_same(results[0][1], other[1])


@pytest.mark.parametrize(
    ("name", "precision"), [call for call in CALLS if call[0] != "representation_step"]
)
def test_a_row_does_not_know_its_batch(isa: str, name: str, precision: Any) -> None:
    """Nor its place in it. Parts are powers of two, by which a mean's gradient scales exactly."""
    op = OPS[name]
    network, rows = op.make(Sizes()), op.rows(Sizes(), 256)
    whole, _ = run(op, network, rows, precision=precision)
    values = len(whole) - len(op.differentiable)
    assert whole  # but of a step, which has no results with rows
    for part in (slice(0, 1), slice(101, 102), slice(40, 42), slice(99, 163)):
        alone, _ = run(op, network, {k: v[part] for k, v in rows.items()}, precision=precision)
        share = (part.stop - part.start) / 256 if op.is_mean else 1.0
        for i, (own, of_whole) in enumerate(zip(alone, whole, strict=True)):
            assert torch.equal(own * (1.0 if i < values else share), of_whole[part])


NAN_INPUTS = [
    (name, precision, given_)
    for name, precision in CALLS
    for given_, values in OPS[name].rows(Sizes(), 1).items()
    if values.is_floating_point()
]


@pytest.mark.parametrize(("name", "precision", "where"), NAN_INPUTS)
def test_nan_stays_in_its_row(isa: str, name: str, precision: Any, where: str) -> None:
    """What has rows is NaN in that one and in all others what it is without; a loss is NaN."""
    op = OPS[name]
    network, rows = op.make(Sizes()), op.rows(Sizes(), 21)
    before, _ = run(op, network, rows, precision=precision)
    values = rows[where][5].view(-1)
    values[len(values) // 2] = torch.nan
    by_row, of_all = run(op, network, rows, precision=precision)
    others = torch.arange(21) != 5
    for after, without in zip(by_row, before, strict=True):
        assert torch.equal(after[others], without[others])
    if by_row:
        assert any(result[5].isnan().any() for result in by_row)
    if of_all:
        assert any(result.isnan().any() for result in of_all)


@pytest.mark.parametrize(("name", "precision"), [c for c in CALLS if c[0] != "representation_step"])
def test_results_do_not_know_which_gradients_are_wanted(
    isa: str, name: str, precision: Any
) -> None:
    """Whether a batch's rows are kept for the weights' gradients or a tile's alone, at a time."""
    op = OPS[name]
    network, rows = op.make(Sizes()), op.rows(Sizes(), 201)
    all_by_row, all_of_all = run(op, network, rows, precision=precision)
    with torch.no_grad():
        options = {"backend": op.backend, **_precision(precision)}
        by_row, of_all = op.call(copy.deepcopy(network), rows, **options)
    assert_same(by_row, all_by_row[: len(by_row)])
    assert_same(of_all, all_of_all[: len(of_all)])
    by_row, of_all = run(op, network.requires_grad_(False), rows, precision=precision)
    assert_same(by_row, all_by_row)
    assert_same(of_all, all_of_all[: len(of_all)])


LARGE_BATCH = """
import torch
from diffcore import DiffusionSchedule, nn, ops

def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) / 1024

critic, denoiser = nn.TwinCritic(17, 6), nn.Denoiser(17, 6)
schedule = DiffusionSchedule.cosine(20)

def inputs(rows):
    return torch.randn(rows, 17), torch.randn(rows, 6)

def losses(rows, state, action):
    yield critic.loss(state, action, torch.zeros(rows, 1), backend="cpu")[0]
    yield ops.denoising_loss(denoiser, schedule, state, action, backend="cpu")

def grown(wants_parameters, wants_rows):
    for network in (critic, denoiser):
        network.requires_grad_(wants_parameters)
    state, action = inputs(ROWS)
    action.requires_grad_(wants_rows)
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    for loss in losses(ROWS, state, action):
        if loss.requires_grad:
            loss.backward()
        del loss
    return status("VmHWM") - before, status("VmRSS") - before

ROWS = 300
grown(True, True)  # packs, threads, gradients
ROWS = 30_000
print(*grown(False, False), *grown(False, True), *grown(True, True))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_of_large_batches() -> None:
    """Layers of all rows are kept for weight gradients alone, and no longer than the call."""
    result = run_script(LARGE_BATCH)
    assert result.returncode == 0, result.stderr
    peak, left, peak_to_rows, left_to_rows, peak_to_weights, left_to_weights = map(
        float, result.stdout.split()
    )
    assert max(peak, left, peak_to_rows, left_to_rows) < 24
    assert peak_to_weights > 200  # the measurement sees them
    assert left_to_weights < 64 + 24


WIDE_LAYER = """
import torch
from diffcore import ops
from diffcore.ops import _native

def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

def call(width):
    weights = [torch.zeros(width, 1), torch.zeros(1, width)]
    biases, kinds = [torch.zeros(width), torch.zeros(1)], ["relu", "identity"]
    for _ in range(3):
        ops.mlp(torch.zeros(1024, 1), weights, biases, kinds, backend="cpu")

torch.set_num_threads(2)
_native._core.set_pack_budget(0)
call(16)
before = resident()
call(300_000)  # 64 rows of it are 73 MiB
call(16)  # and drops the large pack
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_no_thread_keeps_large_memory() -> None:
    result = run_script(WIDE_LAYER)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 24


@pytest.mark.parametrize(("name", "precision"), [c for c in CALLS if c[0] not in WITHOUT_TILES])
@pytest.mark.parametrize("batch", [3, 20])
@pytest.mark.parametrize("one_has_memory", [False, True])
def test_running_out_of_memory_is_an_error(
    isa: str,
    teams: None,
    set_threads: Callable[[int], None],
    name: str,
    precision: Any,
    batch: int,
    one_has_memory: bool,
) -> None:
    """Whichever of a call's threads finds none; the next call finds everything as it was."""
    op, core = OPS[name], _native._core
    network, rows = op.make(Sizes(hidden=200)), op.rows(Sizes(hidden=200), batch)
    set_threads(1)
    expected = run(op, network, rows, precision=precision)
    # Few rows have one thread, unless a team shares them.
    fails = batch == 20 or not one_has_memory or name in ("action_gradient", "reverse_diffusion")

    def with_new_threads() -> Results:
        if one_has_memory:
            torch.set_num_threads(1)
            run(op, network, rows, precision=precision)
        torch.set_num_threads(2)
        core.deny_tile_memory(True)
        try:
            with pytest.raises(MemoryError) if fails else contextlib.nullcontext():
                run(op, network, rows, precision=precision)
        finally:
            core.deny_tile_memory(False)
        return run(op, network, rows, precision=precision)

    with ThreadPoolExecutor(1) as new:
        results = new.submit(with_new_threads).result()
    for ours, theirs in zip(results, expected, strict=True):
        assert_same(ours, theirs)


FULL_MEMORY = """
import resource, torch
from diffcore import ops
torch.set_num_threads(2)
width = 65536
x, weights = torch.randn(256, 8), [torch.randn(width, 8), torch.randn(4, width)]
biases, activations = [torch.zeros(width), torch.zeros(4)], ["relu", "identity"]
ops.mlp(x[:8], weights, biases, activations, backend="cpu")
torch.mm(torch.randn(300, 300), torch.randn(300, 300))  # its threads are there
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
_, most = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (size + 2**20, most))
try:
    ops.mlp(x, weights, biases, activations, backend="cpu")
except MemoryError:
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    y = ops.mlp(x, weights, biases, activations, backend="cpu")
    print(torch.equal(y[:8], ops.mlp(x[:8], weights, biases, activations, backend="cpu")))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_process_goes_on_when_memory_has_run_out(isa: str) -> None:
    result = run_script(FULL_MEMORY, DIFFCORE_ISA=isa)
    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr


def layouts(values: Tensor, layout: str) -> Tensor:
    """The same values, elsewhere in memory."""
    if layout == "shifted":  # contiguous, but not aligned
        moved = values.new_empty(values.numel() + 1)[1:].view(values.shape)
    elif layout == "transposed":
        moved = values.new_empty(values.shape[::-1]).permute(*reversed(range(values.ndim)))
    else:
        moved = values.new_empty(*values.shape, 2)[..., 0]
    return moved.copy_(values)


NUMBERS: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "action_gradient": (
        {"steps": 3},
        {"lr": 0.5, "max_norm": 0.25, "eps": 0.125, "low": -2.0, "high": 2.0},
    ),
    "reverse_diffusion": ({}, {"noise_scale": 0.5, "clip": 2.0}),
    "reverse_step": ({}, {"noise_scale": 0.5, "clip": 2.0}),
    "rff_features": ({}, {"scale": 0.5}),
    "squashed_gaussian": ({}, {"low": -2.0, "high": 1.0}),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_numbers_of_numpy(name: str, backend: str) -> None:
    """Are those that they stand for; and truth values are none."""
    integers, reals = NUMBERS[name]
    network, state, other = OPS[name].make(Sizes()), torch.randn(4, 5), torch.randn(4, 3)

    def call(**given: Any) -> Tensor:
        options = {**given, "backend": backend}
        if name == "action_gradient":
            return ops.action_gradient(network, state, other, **options)
        if name == "reverse_diffusion":
            noise = torch.ones(SCHEDULE.K, 4, 3)
            return ops.reverse_diffusion(
                network, SCHEDULE, state, x_init=other, noise=noise, **options
            )
        if name == "reverse_step":
            return ops.reverse_step(other, other, COEFFICIENTS, noise=other, **options)[0]
        if name == "rff_features":
            return ops.rff_features(state, *network.parameters(), **options)
        bounds = options.pop("low"), options.pop("high")
        arguments = (state, *layers(network), other)
        return ops.squashed_gaussian(*arguments, log_std_bounds=bounds, **options)[0]

    expected = call(**integers, **reals)
    for integer, real in ((np.int64, np.float32), (np.uint8, np.float64), (np.int32, np.float16)):
        given = {k: integer(v) for k, v in integers.items()} | {k: real(v) for k, v in reals.items()}
        assert torch.equal(call(**given), expected)
    for number in (True, np.bool_(True)):
        for wrong in (*integers, *reals):
            with pytest.raises(TypeError, match="expected a"):
                call(**{**integers, **reals, wrong: number})


@every_op
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_takes_what_autocast_s_layers_hand_it(name: str, backend: str) -> None:
    """Each input by itself may come from one: the network, or else the rest, says in what it is."""
    op = OPS[name]
    network, rows = op.make(Sizes()), op.rows(Sizes(), 3)
    options = {} if op.backend == "reference" else {"backend": backend}
    for given_, values in rows.items():
        if not values.is_floating_point():
            continue
        rounded = rows | {given_: values.bfloat16()}
        expected = op.call(copy.deepcopy(network), rows | {given_: values.bfloat16().float()})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = op.call(copy.deepcopy(network), rounded, **options)
        for a, b in zip(ours[0] + ours[1], expected[0] + expected[1], strict=True):
            if backend == "cpu":
                assert torch.equal(a, b)
            else:  # whose products are autocast's
                assert torch.allclose(a.float(), b, rtol=0.2, atol=0.2)


@pytest.mark.parametrize("name", ["denoising_loss", "reverse_diffusion", "action_gradient"])
def test_so_does_one_of_a_callable(name: str) -> None:
    op = OPS[name]
    rows = op.rows(Sizes(), 3)

    class Function(nn.Module):
        def forward(self, x: Tensor, y: Tensor, *_: Any) -> Any:
            return (y.square().sum(1, keepdim=True),) if name == "action_gradient" else 0.5 * x

    for given_, values in rows.items():
        if values.is_floating_point():
            expected = op.call(Function(), rows | {given_: values.bfloat16().float()})
            with torch.autocast("cpu", dtype=torch.bfloat16):
                ours = op.call(Function(), rows | {given_: values.bfloat16()})
            for a, b in zip(ours[0] + ours[1], expected[0] + expected[1], strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "layout"),
    [
        (lambda tensor: tensor.to_sparse(), "sparse_coo"),
        (lambda tensor: torch.nested.nested_tensor([*tensor], layout=torch.jagged), "jagged"),
    ],
)
@every_op
def test_tensors_that_are_not_dense_are_refused(
    name: str, change: Callable[[Tensor], Tensor], layout: str
) -> None:
    op = OPS[name]
    network, rows = op.make(Sizes()), op.rows(Sizes(), 3)
    first = next(iter(rows))
    got = f"^{first}: expected a dense tensor, got one in torch.{layout}"
    with pytest.raises(TypeError, match=got):
        op.call(network, {**rows, first: change(rows[first])})


class Call(nn.Module):
    """An op as a module of its network."""

    def __init__(self, op: Op, network: nn.Module, names: list[str], backend: str) -> None:
        super().__init__()
        self.op, self.network, self.names, self.backend = op, network, names, backend

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        rows = dict(zip(self.names, tensors, strict=True))
        by_row, of_all = self.op.call(self.network, rows, backend=self.backend)
        return [*by_row, *of_all]


# A step of an optimiser changes its parameters in place.
VMAPPED = [(n, "rows") for n in OPS if n != "representation_step"]
VMAPPED += [(n, "parameters") for n, _ in VMAPPED if OPS[n].make(Sizes()).state_dict()]


@pytest.mark.parametrize(("name", "batched"), VMAPPED)
@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("around", [(), (2,)])
def test_vmap_over_an_empty_batch(
    name: str, batched: str, backend: str, around: tuple[int, ...]
) -> None:
    """Gives results and gradients like those over one element, but for their number."""
    op = OPS[name]
    network, rows = op.make(Sizes()), op.rows(Sizes(), 3)
    call = Call(op, network, list(rows), op.backend if backend == "kernel" else backend)
    weights = {k: p.detach() for k, p in call.named_parameters() if p.requires_grad}
    batch = weights if batched == "parameters" else rows
    leaves = [k for k in batch if k in weights or k in op.differentiable]

    def results(tensors: Rows) -> Any:
        given_ = {k: tensors[k] for k in weights}, tuple(tensors[k] for k in rows)
        return torch.func.functional_call(call, *given_)

    def gradients(tensors: Rows) -> Any:
        def total(of: Rows) -> Any:
            return torch.stack([*map(weighted_sum, results(tensors | of))]).sum()

        return [*torch.func.grad(total)({k: tensors[k] for k in leaves}).values()]

    def shapes(function: Callable[[Rows], Any], size: int) -> list[tuple[int, ...]]:
        sizes = (*around, size)
        dims = {k: 0 if k in batch else None for k in rows | weights}
        tensors = {k: v.expand(*sizes, *v.shape) for k, v in batch.items()}
        for _ in sizes:
            function = torch.func.vmap(function, (dims,))
        return [tuple(r.shape) for r in function(rows | weights | tensors)]

    differentiates = name in DIFFERENTIABLE and leaves
    for function in (results, gradients) if differentiates else (results,):
        one = shapes(function, 1)
        at = len(around)
        assert one
        assert shapes(function, 0) == [(*s[:at], 0, *s[at + 1 :]) for s in one]


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("elements", [0, 2])
def test_vmap_of_a_loss_that_draws_its_noise(randomness: str, elements: int) -> None:
    denoiser = Denoiser(5, 3, 8)
    rows = torch.randn(elements, 4, 5), torch.randn(elements, 4, 3)

    def loss(state: Tensor, action: Tensor) -> Tensor:
        return ops.denoising_loss(denoiser, SCHEDULE, state, action)

    assert torch.func.vmap(loss, randomness=randomness)(*rows).shape == (elements,)


def test_compiles_with_numbers_left_open() -> None:
    """``dynamic=True`` leaves Python's floats open too, defaults among them."""
    denoiser, critic, omega = Denoiser(5, 3, 8), TwinCritic(5, 3, 8), torch.randn(4, 5)
    action = torch.rand(2, 3)

    def call(state: Tensor, lr: float, scale: float) -> list[Tensor]:
        start = action[: len(state)]
        return [
            ops.reverse_diffusion(denoiser, SCHEDULE, state, x_init=start, noise_scale=0.0),
            ops.action_gradient(critic, state, start, steps=2, lr=lr),
            ops.rff_features(state, omega, scale=scale),
        ]

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    for lr, scale in ((0.1, 2.0), (0.2, 0.5)):
        state = torch.randn(2, 5)
        for ours, expected in zip(compiled(state, lr, scale), call(state, lr, scale), strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", ["mlp", "mlp_ensemble", "rff_features"])
@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_vmap_over_an_empty_batch_of_other_than_rows(name: str, leading: tuple[int, ...]) -> None:
    op = OPS[name]
    network = op.make(Sizes())

    def call(x: Tensor) -> Tensor:
        if name == "mlp":
            return ops.mlp(x, *layers(network), backend="cpu")
        if name == "mlp_ensemble":
            return ops.mlp_ensemble(x, *ensemble(network), backend="cpu")
        return ops.rff_features(x, *network.parameters(), backend="cpu")

    x = torch.randn(4, *leading, 5)
    assert torch.func.vmap(call)(x[:0]).shape == (0, *call(x[0]).shape)


# Not action_gradient's reference: torch doesn't export gradients that are taken inside.
EXPORTED = [(n, op.backend) for n, op in OPS.items() if n != "representation_step"]
EXPORTED += [(n, "reference") for n, backend in EXPORTED if backend == "cpu"]
EXPORTED.remove(("action_gradient", "reference"))


@pytest.mark.parametrize(("name", "backend"), EXPORTED)
@torch.no_grad()
def test_exported_for_any_batch(name: str, backend: str) -> None:
    op = OPS[name]
    rows = op.rows(Sizes(), 5)
    call = Call(op, op.make(Sizes()), list(rows), backend)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(
        call, tuple(rows.values()), dynamic_shapes={"tensors": tuple({0: batch} for _ in rows)}
    ).module()
    for size in (5, 2, 9):
        rows = op.rows(Sizes(), size)
        for a, b in zip(exported(*rows.values()), call(*rows.values()), strict=True):
            torch.testing.assert_close(a, b)


class Recorder(TorchDispatchMode):
    """Keeps what diffcore's ops are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "diffcore":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


class Counter(Recorder):
    """Counts by torch's formulas, without the hooks by which its counter follows modules."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = FlopCounterMode(display=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        return self.counter._count_flops(func._overloadpacket, out, args, kwargs or {})


@pytest.mark.parametrize("name", [n for n in OPS if n != "representation_step"])
@pytest.mark.parametrize("frozen", [False, True])
def test_counted_operations_are_the_reference_s(name: str, frozen: bool) -> None:
    if frozen and name == "reverse_diffusion":
        pytest.skip("its way back computes the gradients of frozen parameters as well")
    if name == "denoising_loss, by row":
        pytest.skip("its way back goes forward once more")
    op = OPS[name]
    network, rows = op.make(Sizes()), op.rows(Sizes(), 5)
    network.requires_grad_(not frozen and name != "soft_value")
    if name == "soft_value":
        network[0].requires_grad_(not frozen)
    counts = []
    for backend in dict.fromkeys((op.backend, "reference")):
        leaves = {k: v.requires_grad_() for k, v in rows.items() if k in op.differentiable}
        with Counter() as mode:
            by_row, of_all = op.call(network, {**rows, **leaves}, backend=backend)
            values = [r for r in (*by_row, *of_all) if r.requires_grad]
            if values:
                sum(map(weighted_sum, values)).backward()
        counts.append(mode.counter.get_total_flops())
        assert backend == "reference" or mode.calls
    with FlopCounterMode(display=False) as counter:  # whose hooks for all modules change nothing
        by_row, of_all = op.call(network, {**rows, **leaves}, backend=op.backend)
        values = [r for r in (*by_row, *of_all) if r.requires_grad]
        if values:
            sum(map(weighted_sum, values)).backward()
    counts.append(counter.get_total_flops())
    assert len({*counts}) == 1
    assert counts[0] or not list(network.parameters())


def test_torch_s_counter_counts_the_ops() -> None:
    """Also one that was made before the first of them was called."""
    script = """
import torch, sys
from diffcore import ops
print("torch.utils.flop_counter" in sys.modules)
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    ops.rff_features(torch.ones(4, 3), torch.ones(5, 3), backend="cpu")
print(counter.get_total_flops())
"""
    assert run_script(script).stdout == f"False\n{2 * 4 * 3 * 5}\n"


@pytest.mark.parametrize("name", [n for n in OPS if n not in ("q_sample", "representation_step")])
def test_fakes_of_what_lies_column_by_column(name: str) -> None:
    """Weights, inputs and gradients that come back: results lie as the compiler is told."""
    op = OPS[name]
    network, rows = op.make(Sizes()), op.rows(Sizes(), 3)
    for parameter in network.parameters():
        parameter.data = layouts(parameter.data, "transposed")
    rows = {k: layouts(v, "transposed") for k, v in rows.items()}
    for differentiable in op.differentiable:
        rows[differentiable].requires_grad_()
    with Recorder() as recorder:
        by_row, of_all = op.call(network, rows, backend="cpu")
        for result in (*by_row, *of_all):
            if result.requires_grad:
                layout = "transposed" if result.ndim == 2 else "shifted"
                result.backward(layouts(torch.randn(result.shape), layout), retain_graph=True)
    assert recorder.calls
    for overload, arguments in recorder.calls:
        torch.library.opcheck(overload, arguments, test_utils="test_faketensor")


@every_op
@given(
    batch=st.integers(0, 20),
    sizes=st.builds(
        Sizes,
        state=st.integers(1, 20),
        action=st.integers(1, 9),
        hidden=st.integers(1, 40),
        depth=st.integers(1, 3),
        activation=st.sampled_from(list(ACTIVATIONS)),
    ),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e3, 1e15, 1e30]),
    layout=st.sampled_from(["shifted", "transposed", "every second"]),
)
def test_any_shape_stride_and_magnitude(
    isa: str, name: str, batch: int, sizes: Sizes, scale: float, layout: str
) -> None:
    """Results don't know where inputs lie, leave them alone, and are those of float64.

    Beyond 1e3 errors are too large to compare (beyond 1 those of a sine, whose argument's error
    counts by its own size); there, what float32 can hold is finite.
    """
    op = OPS[name]
    network, rows = op.make(sizes), op.rows(sizes, batch)
    rows = {k: scale * v if v.is_floating_point() else v for k, v in rows.items()}
    moved = {k: layouts(v, layout) for k, v in rows.items()}
    ours, elsewhere = run(op, network, rows), run(op, network, moved)
    for name_, values in rows.items():
        assert torch.equal(moved[name_], values)
    eager = run(op, network, rows, backend="reference")
    exact = run(op, network, rows, torch.float64, backend="reference")
    overflows = not all(torch.isfinite(result).all() for result in eager[0] + eager[1])
    for a, b, x in zip(*(r + o for r, o in (ours, elsewhere, exact)), strict=True):
        assert_same([a], [b])
        assert a.shape == x.shape
        if scale <= (1.0 if sizes.activation in ("sin", "cos") else 1e3):
            bound = 3e-5 * max(1.0, scale) * max([1.0, *x.nan_to_num().abs().flatten().tolist()])
            torch.testing.assert_close(a.double(), x, rtol=0, atol=bound, equal_nan=True)
        elif not overflows:
            assert torch.isfinite(a).all()
