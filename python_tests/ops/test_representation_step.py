"""A step of Adam on Diff-SR's loss in one call: as by loss, backward and the optimiser's step."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import root_mean_square
from torch import Tensor, nn

from diffcore import explain, ops
from diffcore.nn import MLP
from diffcore.ops import _native
from diffcore.ops._adam import FusedAdam

STEPS = 5
NAMES = ("x", "perturbed", "offset", "score_weight")
LR, EPS = 0.01, 1e-8
needs_kernels = pytest.mark.skipif(_native._core is None, reason="needs the compiled module")


class Learner:
    """Networks with their optimiser."""

    def __init__(
        self,
        hidden: int = 7,
        features: int = 6,
        state: int = 3,
        *,
        kind: Callable[..., torch.optim.Adam] = torch.optim.Adam,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **options: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.psi = MLP(5, hidden + 1, features, 1, "elu", "uniform")
        self.zeta = MLP(4, hidden, features * state, 2, ("mish", "elu"), "uniform")
        self.state_dim, self.dtype = state, dtype
        self.psi, self.zeta = self.psi.to(dtype), self.zeta.to(dtype)
        self.optimizer = kind(self.parameters, **{"lr": LR, "eps": EPS, **options})

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.psi.parameters(), *self.zeta.parameters()]

    def batch(self, rows: int, seed: int = 0) -> tuple[Tensor, ...]:
        """x, perturbed, offset and score_weight."""
        generator = torch.Generator().manual_seed(seed)
        draws = [
            torch.randn(rows, 5, generator=generator),
            torch.randn(rows, 4, generator=generator),
            torch.randn(rows, self.state_dim, generator=generator),
            torch.rand(rows, generator=generator),
        ]
        return tuple(draw.to(self.dtype) for draw in draws)

    def unfused(
        self, batch: tuple[Tensor, ...], compute_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        loss = ops.representation_loss(self.psi, self.zeta, *batch, compute_dtype=compute_dtype)
        loss.backward()
        gradients = [p.grad.double().flatten() for p in self.parameters]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach(), torch.cat(gradients).norm()

    def step(self, batch: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, Tensor]:
        return ops.representation_step(self.psi, self.zeta, *batch, self.optimizer, **options)

    def why_not(self, batch: tuple[Tensor, ...]) -> str:
        arguments = (self.psi, self.zeta, *batch, self.optimizer)
        answer = explain("representation_step", *arguments)
        assert answer.backend == "reference"
        return answer.passed_over["cpu"]

    def take_over(self, other: Learner) -> None:
        """All that a step changes, from another learner of the same sizes."""
        self.psi.load_state_dict(other.psi.state_dict())
        self.zeta.load_state_dict(other.zeta.state_dict())
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))

    def everything(self) -> list[Tensor]:
        """All that a step changes."""
        names = ("step", "exp_avg", "exp_avg_sq")
        states = [self.optimizer.state[p] for p in self.parameters]
        moments = [state[name] for state in states for name in names]
        return [*(p.detach() for p in self.parameters), *moments]


def assert_same(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_close(ours: Learner, other: Learner) -> None:
    """Equal but for the rounding of a few operations, which a moment's cancellation may magnify."""
    for a, b in zip(ours.everything(), other.everything(), strict=True):
        scale = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-7 * scale)


# -- right values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 9, 70, 300])  # 300: gradients in two parts
@pytest.mark.parametrize(
    ("hidden", "features", "state"), [(7, 6, 3), (43, 35, 1), (64, 130, 2)]
)
def test_the_same_as_loss_backward_and_step(
    isa: str, hidden: int, features: int, state: int, batch: int, compute_dtype: Any
) -> None:
    """Step by step: weights that differ in rounding have gradients that differ in more, in bf16."""
    sizes = hidden, features, state
    ours, other = Learner(*sizes, fused=True), Learner(*sizes, fused=True)
    for i in range(STEPS):
        other.take_over(ours)
        rows = ours.batch(batch, i)
        loss, norm = ours.step(rows, compute_dtype=compute_dtype, backend="cpu")
        expected_loss, expected_norm = other.unfused(rows, compute_dtype)
        assert torch.equal(loss, expected_loss)
        torch.testing.assert_close(norm.double(), expected_norm, rtol=1e-6, atol=0.0)
        assert_close(ours, other)
        assert all(p.grad is None for p in ours.parameters)


@pytest.mark.parametrize("batch", [9, 300])
def test_close_to_exact(backend: str, batch: int) -> None:
    """With an epsilon that doesn't make a full step of a gradient's rounding."""
    ours, exact = Learner(43, 35, eps=1e-2), Learner(43, 35, eps=1e-2, dtype=torch.float64)
    assert root_mean_square(ours.parameters[-2] - exact.parameters[-2]) < 1e-6
    for i in range(STEPS):
        loss, norm = ours.step(ours.batch(batch, i), backend=backend)
        exact_loss, exact_norm = exact.unfused(tuple(t.double() for t in ours.batch(batch, i)))
        torch.testing.assert_close(loss.double(), exact_loss, rtol=2e-5, atol=0.0)
        torch.testing.assert_close(norm.double(), exact_norm, rtol=2e-5, atol=0.0)
    for a, b in zip(ours.everything(), exact.everything(), strict=True):
        assert root_mean_square(a - b) <= 2e-5 * root_mean_square(b)


@needs_kernels
@pytest.mark.parametrize("batch", [40, 300])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_threads_do_not_matter(
    isa: str, batch: int, compute_dtype: Any, set_threads: Callable[[int], None]
) -> None:
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        learner = Learner(43, 130)
        for i in range(2):
            numbers = learner.step(learner.batch(batch, i), compute_dtype=compute_dtype)
        results.append([*learner.everything(), *numbers])
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@needs_kernels
def test_hyper_parameters_and_counts_are_the_optimisers() -> None:
    """After a schedule changed the rate, and with parameters that were stepped more often."""
    options = {"betas": (0.8, 0.95), "eps": 0.1, "fused": True}
    ours, other = Learner(**options), Learner(**options)
    for learner in (ours, other):
        learner.unfused(learner.batch(11))
        learner.parameters[1].grad = torch.ones_like(learner.parameters[1])
        learner.optimizer.step()
        learner.optimizer.param_groups[0]["lr"] = 0.5
    ours.step(ours.batch(9), backend="cpu")
    other.unfused(other.batch(9))
    assert_close(ours, other)
    assert {int(state["step"]) for state in ours.optimizer.state.values()} == {2, 3}


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 9, 300])
def test_minibatches_are_stepped_on_one_after_the_other(
    backend: str, batch: int, compute_dtype: Any
) -> None:
    together, alone = Learner(43, 35), Learner(43, 35)
    several = [together.batch(batch, i) for i in range(STEPS)]
    options = {"backend": backend, "compute_dtype": compute_dtype}
    stacked = tuple(map(torch.stack, zip(*several, strict=True)))
    losses, norms = together.step(stacked, **options)
    expected = [alone.step(one, **options) for one in several]
    expected_losses, expected_norms = zip(*expected, strict=True)
    assert_same([*losses, *norms], [*expected_losses, *expected_norms])
    assert_same(together.everything(), alone.everything())
    assert {int(state["step"]) for state in together.optimizer.state.values()} == {STEPS}


def test_results_are_tensors_of_their_own(backend: str) -> None:
    learner, weight = Learner(), torch.ones((), requires_grad=True)
    loss, norm = learner.step(learner.batch(9), backend=backend)
    scaled = weight * loss
    norm.zero_()
    scaled.backward()
    assert torch.equal(weight.grad, loss)  # type: ignore[arg-type]
    loss += weight
    assert loss.requires_grad


# -- as a part of PyTorch --------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("kind", [torch.optim.Adam, FusedAdam])
def test_a_saved_optimiser_goes_on_as_it_was(kind: Callable[..., torch.optim.Adam]) -> None:
    learner = Learner(kind=kind, fused=True)
    learner.step(learner.batch(9), backend="cpu")
    assert {*learner.optimizer.state_dict()["state"][0]} == {"step", "exp_avg", "exp_avg_sq"}
    again = Learner(kind=kind, fused=True, seed=1)
    again.take_over(learner)
    for _ in range(2):
        for one in (learner, again):
            one.step(one.batch(9), backend="cpu")
            one.unfused(one.batch(9))  # by turns
    assert_same(learner.everything(), again.everything())


@needs_kernels
def test_autograd_notices_the_change() -> None:
    learner = Learner()
    kept = learner.zeta.layers[2].weight.square().sum()  # type: ignore[operator, union-attr]
    learner.step(learner.batch(9), backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@needs_kernels
def test_autocast_hands_over_in_float32() -> None:
    ours, other = Learner(), Learner()
    x, perturbed, *rest = ours.batch(9)
    lower = (x.bfloat16(), perturbed.bfloat16(), *rest)
    with torch.autocast("cpu", torch.bfloat16):
        ours.step(lower, backend="cpu")
    other.step((lower[0].float(), lower[1].float(), *rest), backend="cpu")
    assert_same(ours.everything(), other.everything())


@needs_kernels
def test_compiled_code_takes_the_reference() -> None:
    ours, other = Learner(fused=True), Learner(fused=True)
    torch.compile(ours.step)(ours.batch(9))
    other.unfused(other.batch(9))
    assert_close(ours, other)


def hook(*_: Any) -> None: ...


def on_the_gradient(learner: Learner) -> None:
    learner.parameters[0].register_post_accumulate_grad_hook(hook)


def tensor_hook(learner: Learner) -> None:
    learner.parameters[0].register_hook(hook)


def two_groups(learner: Learner) -> None:
    group = learner.optimizer.param_groups[0]
    rest = group["params"][3:]
    del group["params"][3:]
    learner.optimizer.add_param_group({"params": rest})


def not_all(learner: Learner) -> None:
    del learner.optimizer.param_groups[0]["params"][3:]


def not_contiguous(learner: Learner) -> None:
    weight = learner.zeta.layers[0].weight
    weight.data = weight.data.t().contiguous().t()  # type: ignore[operator, union-attr]


def shared(learner: Learner) -> None:
    first, second = learner.zeta.layers[0].bias, learner.psi.layers[0].bias
    first.data = second.data[1:]  # type: ignore[operator, union-attr]


def one_moment_for_two(learner: Learner) -> None:
    learner.unfused(learner.batch(9))
    first, second = (learner.optimizer.state[learner.parameters[i]] for i in (1, 5))
    second["exp_avg_sq"] = first["exp_avg_sq"][1:]


def of_another_shape(learner: Learner) -> None:
    """As ``load_state_dict`` takes it over without a word; what torch broadcasts, though."""
    learner.unfused(learner.batch(9))
    state = learner.optimizer.state[learner.parameters[0]]
    state["exp_avg"] = state["exp_avg"][:1].clone()
    state["exp_avg_sq"] = state["exp_avg_sq"][:1].clone()


def negated(learner: Learner) -> None:
    weight = learner.zeta.layers[0].weight
    weight.data = torch._neg_view(weight.data)  # type: ignore[arg-type, union-attr]


def option(name: str, value: Any) -> Callable[[Learner], None]:
    def change(learner: Learner) -> None:
        learner.optimizer.param_groups[0][name] = value

    return change


@needs_kernels
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (two_groups, "the optimizer has several groups of parameters"),
        (not_all, "the optimizer doesn't hold exactly the networks' parameters"),
        (not_contiguous, "a parameter isn't contiguous float32 on the CPU"),
        (shared, "parameters or moments share memory"),
        (one_moment_for_two, "parameters or moments share memory"),
        (of_another_shape, "a moment isn't its parameter's like"),
        (negated, "a compiler, a mode or a transform follows"),
        (on_the_gradient, "a hook waits for a parameter's gradient"),
        (tensor_hook, "a hook waits for a parameter's gradient"),
        (lambda a: a.optimizer.register_step_post_hook(hook), "a hook or the profiler waits"),
        (lambda a: setattr(a.optimizer, "grad_scale", torch.ones(())), "a GradScaler scales"),
        (lambda a: setattr(a.optimizer, "step", a.optimizer.step), "the optimizer's step isn't"),
        (option("weight_decay", 0.1), "the optimizer has weight_decay, which the kernel doesn't"),
        (option("maximize", True), "the optimizer has maximize, which the kernel doesn't"),
        (option("lr", torch.tensor(0.1)), "the optimizer's lr, betas or eps are no numbers"),
        (option("betas", (0.5, 0.9)), "the optimizer's first beta isn't above 0.5"),
    ],
)
def test_what_only_the_optimiser_can_do(change: Callable[[Learner], object], why: str) -> None:
    """It is done, too: the step is that of the optimiser."""
    ours, other = Learner(), Learner()
    for learner in (ours, other):
        change(learner)
    assert ours.why_not(ours.batch(9)).startswith(why)
    if hasattr(ours.optimizer, "grad_scale") or change is of_another_shape:
        return  # a real GradScaler takes it away again; torch's step raises
    ours.step(ours.batch(9))
    other.unfused(other.batch(9))
    assert_same([p.detach() for p in ours.parameters], [p.detach() for p in other.parameters])


@needs_kernels
def test_inputs_and_surroundings_that_the_kernel_can_not_take() -> None:
    learner = Learner()
    x, *rest = learner.batch(9)
    assert "lead back" in learner.why_not((x.clone().requires_grad_(), *rest))
    assert learner.why_not(learner.batch(0)) == "the batch is empty"
    for off in (torch.no_grad(), torch.inference_mode()):
        with off, pytest.raises(ValueError, match="expected gradients to be on, got them off"):
            learner.step((x, *rest))
    with torch.autograd.detect_anomaly():
        assert "anomalies" in learner.why_not((x, *rest))
    with torch.profiler.profile():
        assert "follows what is called" in learner.why_not((x, *rest))


def test_frozen_and_foreign_parameters_stay_as_they_are() -> None:
    learner = Learner()
    rows = learner.batch(9)
    learner.psi.requires_grad_(False)
    if _native._core is not None:
        assert learner.why_not(rows) == "a parameter doesn't require a gradient"
    before = [p.detach().clone() for p in learner.parameters]
    _, norm = learner.step(rows)
    moved = [not torch.equal(p, q) for p, q in zip(learner.parameters, before, strict=True)]
    assert norm > 0
    assert moved == [False] * 4 + [True] * 6

    learner.zeta.requires_grad_(False)
    before = [p.clone() for p in learner.parameters]
    assert learner.step(rows)[1] == 0
    assert_same(before, learner.parameters)
    stranger = nn.Parameter(torch.ones(2))
    learner.optimizer = torch.optim.Adam([stranger])
    assert learner.step(rows)[1] == 0
    assert torch.equal(stranger, torch.ones(2))


@needs_kernels
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("of", ["parameter", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("which", [0, 5, -2])
@pytest.mark.parametrize("name", ["x", "perturbed", "offset", "score_weight"])
def test_inputs_in_the_memory_of_what_is_stepped(
    name: str, which: int, of: str, steps: int
) -> None:
    """The kernel, which would read what it has just written, leaves them to the reference."""
    ours, other, unshared = (Learner(20) for _ in range(3))

    def rows(learner: Learner) -> list[Tensor]:
        learner.unfused(learner.batch(9))
        several = [learner.batch(1, i) for i in range(steps)]
        values = dict(zip(NAMES, map(torch.stack, zip(*several, strict=True)), strict=True))
        parameter = learner.parameters[which]
        memory = parameter.detach() if of == "parameter" else learner.optimizer.state[parameter][of]
        given = values[name]
        values[name] = memory.flatten()[-given.numel() :].view(given.shape)
        return [v[0] for v in values.values()] if steps == 1 else [*values.values()]

    shared = rows(ours)
    assert ours.why_not(tuple(shared)).startswith(f"{name} shares memory with a parameter or")
    with pytest.raises(ValueError, match=f"^backend: .* 'cpu' here: {name} shares memory"):
        ours.step(tuple(shared), backend="cpu")
    ours.step(tuple(shared))
    for minibatch in [rows(other)] if steps == 1 else zip(*rows(other), strict=True):
        other.unfused(tuple(minibatch))
    assert_same(ours.everything(), other.everything())
    unshared.step(tuple(v.clone() for v in rows(unshared)), backend="cpu")


@needs_kernels
def test_a_failed_step_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where it fails within the kernel, autograd knows that weights may have changed."""
    learner = Learner()
    rows = learner.batch(9)
    learner.step(rows, backend="cpu")
    before = [t.clone() for t in learner.everything()]
    version = learner.parameters[-2]._version
    with monkeypatch.context() as patch:
        patch.setattr(_native._core, "representation_step", out_of_memory)
        with pytest.raises(MemoryError):
            learner.step(rows, backend="cpu")
    assert_same(before, learner.everything())
    assert learner.parameters[-2]._version > version


def out_of_memory(*_: Any) -> None:
    raise MemoryError


@needs_kernels
def test_the_kernel_refuses_moments_of_other_sizes() -> None:
    learner = Learner()
    learner.step(learner.batch(9), backend="cpu")
    other = Learner(hidden=3)
    other.step(other.batch(9), backend="cpu")
    learner.optimizer.load_state_dict(other.optimizer.state_dict())
    assert learner.why_not(learner.batch(9)).startswith("a moment isn't its parameter's like")
    with pytest.raises(RuntimeError, match="must match"):
        learner.step(learner.batch(9))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_counts_begin_as_torch_begins_them(dtype: torch.dtype, fused: bool) -> None:
    ours, other = Learner(fused=fused), Learner(fused=fused)
    rows = ours.batch(9)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        ours.step(rows, backend="cpu")
        other.unfused(rows)
    finally:
        torch.set_default_dtype(before)
    for p, q in zip(ours.parameters, other.parameters, strict=True):
        count, expected = ours.optimizer.state[p]["step"], other.optimizer.state[q]["step"]
        assert count.dtype is expected.dtype
        assert count == expected == 1


@needs_kernels
def test_a_scheduler_sets_the_rate_of_the_kernel_s_steps() -> None:
    ours, other = Learner(fused=True), Learner(fused=True)
    schedules = [
        torch.optim.lr_scheduler.StepLR(learner.optimizer, 1, 0.5) for learner in (ours, other)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, of a scheduler that steps before the optimiser
        for i in range(3):
            ours.step(ours.batch(9, i), backend="cpu")
            other.unfused(other.batch(9, i))
            for schedule in schedules:
                schedule.step()
    assert ours.optimizer.param_groups[0]["lr"] == LR / 8
    for a, b in zip(ours.parameters, other.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * LR)


class Derived(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Wrapping(torch.optim.Adam):
    @functools.wraps(torch.optim.Adam.step)
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Grouping(torch.optim.Adam):
    def _init_group(self, *args: Any, **kwargs: Any) -> Any:
        return super()._init_group(*args, **kwargs)


@needs_kernels
@pytest.mark.parametrize("kind", [Derived, Wrapping, Grouping])
def test_a_subclass_of_adam_makes_its_own_step(kind: type[torch.optim.Adam]) -> None:
    learner = Learner(kind=kind)
    assert learner.why_not(learner.batch(9)) == "the optimizer's step isn't torch.optim.Adam's"


@needs_kernels
def test_a_patched_step_is_the_patch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, calls = Learner(), []
    own = torch.optim.Adam.step

    @functools.wraps(own)
    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", patched)
    learner.step(learner.batch(9))
    assert calls == [1]


@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        (0, torch.zeros(0, 9, 5), r"^x: expected a minibatch at least, got shape \[0, 9, 5\]"),
        (0, torch.zeros(2, 9, 4), r"^x: expected shape \[B, 5\], got \[9, 4\]"),
        (1, torch.zeros(9, 4), r"^perturbed: expected shape \[2, 9, in\], got \[9, 4\]"),
        (2, torch.zeros(2, 8, 3), r"^offset: expected shape \[2, 9, S\], got \[2, 8, 3\]"),
        (3, torch.zeros(2, 9, 1), r"^score_weight: expected shape \[2, 9\], got \[2, 9, 1\]"),
        (1, torch.zeros(2, 9, 4, requires_grad=True), "^perturbed: expected no gradient through"),
    ],
)
def test_bad_minibatches_are_named(changed: int, value: Tensor, message: str) -> None:
    learner = Learner()
    rows = [torch.stack([one, one]) for one in learner.batch(9)]
    rows[changed] = value
    if changed == 0 and not len(value):
        rows = [one[:0] for one in rows]
    with pytest.raises(ValueError, match=message):
        learner.step(tuple(rows))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"optimizer": None}, TypeError, "^optimizer: expected a torch.optim.Adam, got NoneType"),
        ({"psi": nn.Linear(5, 6)}, TypeError, "^psi: expected a diffcore.nn.MLP, got Linear"),
        ({"x": torch.zeros(9, 4)}, ValueError, r"^x: expected shape \[B, 5\], got \[9, 4\]"),
        ({"compute_dtype": torch.float64}, ValueError, "^compute_dtype: expected None"),
        ({"backend": "triton"}, ValueError, "^backend: expected one of cpu, reference, got"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    learner = Learner()
    names = ("psi", "zeta", "x", "perturbed", "offset", "score_weight", "optimizer")
    values = (learner.psi, learner.zeta, *learner.batch(9), learner.optimizer)
    with pytest.raises(error, match=message):
        ops.representation_step(**{**dict(zip(names, values, strict=True)), **change})
