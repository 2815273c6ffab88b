"""Plain calls go to the kernels directly; torch's dispatcher is used where it has something to do."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from helpers import run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._vmap_internals import _vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffcore import DiffusionSchedule, ops
from diffcore.nn import Denoiser, TwinCritic
from diffcore.ops import _dispatch, _native
from diffcore.ops.rff_features import native

pytestmark = pytest.mark.skipif(_native._core is None, reason="needs the compiled module")


def features(x: Tensor) -> Tensor:
    y: Tensor = native.forward(x, torch.eye(3), None, "sin", 1.0, False, "float32", "cpu")[0]
    return y


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class FunctionRecorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Plain(Tensor):
    pass


class Logged(Tensor):
    """A subclass that keeps a list of the ops it met."""

    seen: list[str]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func.name())
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_op() -> None:
    with Recorder() as mode:
        features(torch.ones(2, 3))
    assert "diffcore::rff_features" in mode.seen


def test_a_function_mode_sees_the_op() -> None:
    with FunctionRecorder() as mode:
        features(torch.ones(2, 3))
    assert any("diffcore" in name and "rff_features" in name for name in mode.seen)


def test_a_subclass_of_tensor_sees_the_op() -> None:
    Logged.seen = []
    features(torch.ones(2, 3).as_subclass(Logged))
    assert "diffcore::rff_features" in Logged.seen


def test_the_profiler_sees_the_op() -> None:
    with torch.profiler.profile() as profile:
        features(torch.ones(2, 3))
    assert "diffcore::rff_features" in {event.key for event in profile.key_averages()}


def test_a_traced_call_becomes_part_of_the_graph() -> None:
    traced = torch.jit.trace(features, torch.ones(2, 3))
    assert "diffcore::rff_features" in str(traced.graph)
    x = torch.rand(2, 3)
    assert torch.equal(traced(x), features(x))


@pytest.mark.parametrize(
    "context", [nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")]
)
def test_plain_calls_skip_the_dispatcher(
    context: Callable[[], AbstractContextManager[Any]],
) -> None:
    parameters = [torch.nn.Parameter(torch.ones(1)), torch.ones(1)]
    with context():
        assert not _native._dispatching((torch.ones(1), parameters, None, "mish", 1.0, 2, True))


def test_a_call_in_a_subclass_s_list_is_dispatched() -> None:
    Logged.seen = []
    assert _native._dispatching((torch.ones(1), [torch.ones(1).as_subclass(Logged)]))


# -- calls that don't ask what the backends can take -------------------------------------------------

CRITIC, DENOISER, SCHEDULE = TwinCritic(5, 2, 8), Denoiser(5, 2, 8), DiffusionSchedule.linear(3)
LINEAR = torch.nn.Linear(5, 4)

CALLS: dict[str, Callable[..., Tensor]] = {
    "action_gradient": lambda x, **options: ops.action_gradient(
        CRITIC, x, torch.zeros(*x.shape[:1], 2), steps=2, **options
    ),
    "reverse_diffusion": lambda x, **options: ops.reverse_diffusion(
        DENOISER, SCHEDULE, x, generator=torch.Generator().manual_seed(0), **options
    ),
    "mlp": lambda x, **options: ops.mlp(x, [LINEAR.weight], [LINEAR.bias], ["mish"], **options),
    "mlp_ensemble": lambda x, **options: ops.mlp_ensemble(
        x, [[LINEAR.weight, LINEAR.bias]] * 2, ["mish"], **options
    ),
    "rff_features": lambda x, **options: ops.rff_features(x, LINEAR.weight, LINEAR.bias, **options),
}


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops for which a backend was chosen, in order."""
    seen: list[str] = []
    choose = _dispatch.choose

    def record(op: str, *rest: Any) -> str:
        seen.append(op)
        return choose(op, *rest)

    monkeypatch.setattr(_dispatch, "choose", record)
    return seen


@pytest.mark.parametrize("gradients", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("op", CALLS)
def test_ordinary_calls_go_straight_to_the_kernel(
    op: str, gradients: Callable[[], AbstractContextManager[Any]], chosen: list[str]
) -> None:
    x = torch.randn(4, 5)
    with gradients():
        for same in (x, x.t().contiguous().t(), x[:0], torch.nn.Parameter(x)):
            y = CALLS[op](same)
            assert not chosen
            assert torch.equal(y, CALLS[op](same, backend="cpu"))
            assert not chosen


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu"),
        torch.autograd.forward_ad.dual_level,
        torch.profiler.profile,
        Recorder,
        FunctionRecorder,
    ],
)
@pytest.mark.parametrize("op", CALLS)
def test_whatever_else_has_a_part_in_a_call_is_noticed(
    op: str, context: Callable[[], AbstractContextManager[Any]], chosen: list[str]
) -> None:
    x = torch.randn(4, 5)
    expected = CALLS[op](x)
    with context():
        y = CALLS[op](x)
    assert chosen[0] == op  # and then perhaps for what the reference calls
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.as_subclass(Plain),
        torch._neg_view,
        lambda x: torch._efficientzerotensor(*x.shape),
        lambda x: torch.func.vmap(lambda row: row)(x[None])[0],
    ],
)
@pytest.mark.parametrize("op", CALLS)
def test_unusual_tensors_are_noticed(
    op: str, change: Callable[[Tensor], Tensor], chosen: list[str]
) -> None:
    x = change(torch.randn(4, 5))
    y = CALLS[op](x)
    ordinary = type(x) is Tensor and not x.is_neg() and not x._is_zerotensor()
    assert chosen == ([] if ordinary else [op])
    torch.testing.assert_close(y.as_subclass(Tensor), CALLS[op](torch.empty(4, 5).copy_(x)))


@pytest.mark.parametrize("options", [{"backend": "reference"}, {"compute_dtype": torch.float16}])
@pytest.mark.parametrize("op", CALLS)
def test_what_the_cpu_kernel_isn_t_asked_for(
    op: str, options: dict[str, Any], chosen: list[str]
) -> None:
    if op == "rff_features" and "compute_dtype" in options:
        pytest.skip("it has no compute_dtype")
    CALLS[op](torch.randn(4, 5), **options)
    assert chosen[0] == op


@pytest.mark.parametrize("layers", [16, 17])
def test_networks_too_deep_for_the_kernels(layers: int, chosen: list[str]) -> None:
    x, action = torch.randn(4, 5), torch.zeros(4, 2)
    x_init = torch.zeros(4, 2)
    ops.action_gradient(TwinCritic(5, 2, 4, layers - 1), x, action, steps=1)
    ops.reverse_diffusion(Denoiser(5, 2, 4, layers - 1), SCHEDULE, x, x_init=x_init)
    ops.mlp(x, [torch.eye(5)] * layers, [torch.zeros(5)] * layers, ["relu"] * layers)
    asked = {"action_gradient", "reverse_diffusion", "mlp"}
    assert asked.isdisjoint(chosen) if layers == 16 else asked <= {*chosen}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x: x[:, :4], "shape"),
        (lambda x: x[0, 0], "shape"),
        (lambda x: x.double(), "torch.float32|torch.float64"),
        (lambda x: x.numpy(), "tensor"),
    ],
)
@pytest.mark.parametrize("op", CALLS)
def test_no_check_is_passed_by(op: str, change: Callable[[Tensor], Any], named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^(x|state|weights|networks|omega).*{named}"):
        CALLS[op](change(torch.randn(4, 5)))


@st.composite
def networks_and_rows(draw: st.DrawFn) -> tuple[Tensor, list[list[Tensor]], list[str]]:
    """An input of any number of dimensions, two networks on it, and their activations."""
    widths = draw(st.lists(st.integers(1, 40), min_size=2, max_size=4))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    layers = [*itertools.pairwise(widths)]

    def tensor(*size: int) -> Tensor:
        value = torch.randn(*size, generator=random)
        return value.mT.contiguous().mT if len(size) > 1 and draw(st.booleans()) else value

    networks = [[p for n, m in layers for p in (tensor(m, n), tensor(m))] for _ in range(2)]
    kinds = [draw(st.sampled_from(_native.NATIVE_ACTIVATIONS)) for _ in layers]
    return tensor(*shape, widths[0]), networks, kinds


@pytest.mark.parametrize("kind", [list, tuple])
@settings(max_examples=150, deadline=None)
@given(drawn=networks_and_rows(), dtype=st.sampled_from([None, torch.float32, torch.bfloat16]))
def test_a_call_that_goes_straight_has_the_dispatched_one_s_result(
    kind: Callable[..., Any], drawn: tuple[Any, Any, Any], dtype: torch.dtype | None
) -> None:
    x, networks, activations = drawn
    weights, biases = networks[0][::2], networks[0][1::2]
    calls = [
        lambda: ops.mlp(x, kind(weights), kind(biases), kind(activations), compute_dtype=dtype),
        lambda: ops.mlp_ensemble(x, kind(map(kind, networks)), activations, compute_dtype=dtype),
        lambda: ops.rff_features(x, weights[0], biases[0], kind="cos_sin", scale=0.7),
        lambda: ops.rff_features(x, weights[0], kind="cos"),
    ]
    for call in calls:
        y = call()
        with Recorder() as mode:  # which the call notices
            expected = call()
        assert any("diffcore::" in name for name in mode.seen)
        assert y.shape == expected.shape
        assert torch.equal(y, expected)


def test_lists_that_change_during_a_call_harm_nobody() -> None:
    x, weights, biases = torch.randn(64, 512), [torch.randn(512, 512)], [torch.randn(512)]
    expected = ops.mlp(x, weights, biases, ["mish"])
    done = threading.Event()

    def replace() -> None:
        while not done.is_set():
            weights[0], biases[0] = weights[0].clone(), biases[0].clone()

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        assert all(torch.equal(ops.mlp(x, weights, biases, ["mish"]), expected) for _ in range(200))
    finally:
        done.set()
        thread.join()


# -- tensors that don't hold in memory what they stand for -------------------------------------------


def identity(x: Tensor, weight: Tensor | None = None) -> Tensor:
    weight = torch.eye(x.shape[-1]) if weight is None else weight
    return ops.mlp(x, [weight], [torch.zeros(len(weight))], ["identity"], backend="cpu")


def test_negated_tensors_are_read_negated() -> None:
    x, weight = torch.randn(4, 3), torch.randn(3, 3)
    assert torch.equal(identity(torch._neg_view(x)), -x)
    assert torch.equal(identity(x, torch._neg_view(weight)), identity(x, -weight))
    z = torch.view_as_complex(torch.randn(1, 1, 2)).conj()
    assert z.imag.is_neg()
    assert torch.equal(identity(z.imag), z.imag.clone())
    x.requires_grad_()
    [grad] = torch.autograd.grad(identity(x), x, torch._neg_view(torch.ones(4, 3)))
    assert torch.equal(grad, -torch.ones(4, 3))


def test_a_tensor_of_zeros_without_memory() -> None:
    assert torch.equal(identity(torch._efficientzerotensor(4, 3)), torch.zeros(4, 3))


def test_a_tensor_that_outlived_its_transform() -> None:
    leaked: list[Tensor] = []

    def loss(x: Tensor) -> Tensor:
        leaked.append(x)
        return x.sum()

    x = torch.randn(4, 3)
    torch.func.grad(loss)(x)
    with torch.no_grad():
        assert torch.equal(identity(leaked[0]), x)


def test_diffcore_may_be_imported_in_a_mode() -> None:
    script = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

class Recorder(TorchDispatchMode):
    seen = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))

with Recorder() as mode:
    from diffcore import ops
    from diffcore.ops import _native
    ops.rff_features(torch.ones(2, 3), torch.eye(3), backend="cpu")
print("diffcore::rff_features" in mode.seen, _native._dispatching((torch.ones(1),)))
"""
    assert run_script(script).stdout == "True False\n"


Call = Callable[[Tensor, Tensor], Tensor]


def _vmapped_calls() -> dict[str, Call]:
    """Every differentiable op of an input ``[B, 4]`` and a weight ``[4, 4]``, as a scalar."""
    torch.manual_seed(0)
    bias, target, last = torch.randn(4), torch.randn(3, 4), torch.randn(8, 4)
    noise = torch.randn(3, 2)
    schedule, kinds = DiffusionSchedule.linear(4), ["tanh", "identity"]
    levels = torch.tensor([0, 1, 3])
    table = schedule.solver().coefficients[1]
    return {
        "mlp": lambda x, w: ops.mlp(x, [w, w], [bias, bias], kinds).sum(),
        "mlp_ensemble": lambda x, w: ops.mlp_ensemble(x, [[w, bias, w, bias]] * 2, kinds).sum(),
        "critic_loss": lambda x, w: ops.critic_loss(x, [[w, bias, w, bias]], kinds, target)[0],
        "critic_loss, target": lambda x, w: ops.critic_loss(x, [[w, bias, w, bias]], kinds, x)[0],
        "critic_loss, weights": lambda x, w: (
            ops.critic_loss(x, [[w, bias, w, bias]], kinds, target, weight=x[:, 0])[0]
        ),
        "squashed_gaussian": lambda x, w: (
            ops.squashed_gaussian(x, [w, w], [bias, bias], kinds, noise)[0].sum()
        ),
        "rff_features": lambda x, w: ops.rff_features(x, w, bias).sum(),
        "score_matching_loss": lambda x, w: ops.score_matching_loss(
            x[:, :2], x, last @ w, torch.ones(8), target, torch.ones(3)
        ),
        "q_sample": lambda x, w: ops.q_sample(x @ w, levels, target, schedule).square().sum(),
        "reverse_step": lambda x, w: ops.reverse_step(x, x @ w, table, clip=9.0)[0].sum(),
    }


@pytest.mark.parametrize("name", list(_vmapped_calls()))
@pytest.mark.parametrize("order", ["grad(vmap)", "leaf outside"])
def test_gradients_through_a_vmap_inside(name: str, order: str) -> None:
    """vmap hides from its inside that what it slices requires a gradient."""
    call = _vmapped_calls()[name]
    x, w = torch.randn(2, 3, 4), torch.randn(4, 4)

    def total(x: Tensor, w: Tensor) -> Tensor:
        return torch.func.vmap(call, in_dims=(0, None))(x, w).sum()

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return sum((call(row, w) for row in x), torch.zeros(()))

    def leaves() -> list[Tensor]:
        return [x.clone().requires_grad_(), w.clone().requires_grad_()]

    inputs = leaves()
    expected = torch.autograd.grad(plain(*inputs), inputs)
    if order == "grad(vmap)":
        grads = torch.func.grad(total, argnums=(0, 1))(x, w)
    else:
        inputs = leaves()
        grads = torch.autograd.grad(total(*inputs), inputs)
    for a, b in zip(grads, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_vmap_of_batched_gradients_is_no_other_s() -> None:
    with pytest.raises(RuntimeError, match="^is_grads_batched: expected no other vmap around"):
        _vmap(lambda x: _vmap(lambda _: identity(x))(torch.ones(2)))(torch.ones(5, 4, 3))


def test_fake_calls_leave_nothing_behind() -> None:
    """Tables are kept for all schedules with the same betas, so one fake one would spoil them all."""
    denoiser, state, action = Denoiser(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    given = {"t": torch.tensor([0, 5, 2, 6]), "noise": torch.randn(4, 2)}
    calls: list[Callable[[DiffusionSchedule], Tensor]] = [
        lambda schedule: ops.denoising_loss(denoiser, schedule, state, action, **given),
        lambda schedule: ops.reverse_diffusion(
            denoiser, schedule, state, x_init=action, noise_scale=0.0
        ),
        lambda schedule: ops.q_sample(action, *given.values(), schedule),
    ]
    for steps, call in enumerate(calls, start=7):
        schedule, equal = (DiffusionSchedule.linear(steps, 0.1, 0.3) for _ in range(2))
        with FakeTensorMode(allow_non_fake_inputs=True):
            call(schedule)
        assert type(call(equal)) is Tensor
    schedule = DiffusionSchedule.linear(10, 0.1, 0.3)
    with torch.device("meta"):
        assert calls[0](schedule).is_cpu
