"""Diff-SR's loss: with its gradients in one call, and without zeta in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    assert_error_at_most_twice_eager,
    load_golden,
    plain_mlp,
    quantile,
    root_mean_square,
    run_script,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from diffcore import explain, ops
from diffcore.ops import _native
from diffcore.ops.score_matching_loss import native

NAMES = ("psi", "hidden", "weight", "bias", "offset", "score_weight")
needs_kernels = pytest.mark.skipif(_native._core is None, reason="needs the compiled module")


def make_inputs(
    batch: int, features: int, state: int, hidden: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """psi, hidden, weight, bias, offset and score_weight, with scores of order 1."""
    outputs = features * state
    return [
        torch.randn(batch, features, dtype=dtype),
        torch.randn(batch, hidden, dtype=dtype),
        torch.randn(outputs, hidden, dtype=dtype) / (hidden * features) ** 0.5,
        torch.randn(outputs, dtype=dtype) / (features + 1) ** 0.5,
        torch.randn(batch, state, dtype=dtype),
        torch.rand(batch, dtype=dtype),
    ]


def run(
    inputs: list[Tensor], backend: str, dtype: torch.dtype = torch.float32, **options: Any
) -> list[Tensor]:
    """[loss, gradients of psi, hidden, weight and bias], everything computed in `dtype`."""
    tensors = [t.detach().to(dtype) for t in inputs]
    leaves = [t.requires_grad_() for t in tensors[:4]]
    loss = ops.score_matching_loss(*tensors, backend=backend, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- right values ----------------------------------------------------------------------------------


def psi_and_zeta(golden: dict[str, Any]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return tuple(
        [nn.Parameter(value) for key, value in golden.items() if key.startswith(prefix)]
        for prefix in ("psi__", "zeta__")
    )


@pytest.mark.parametrize("name", ["pendulum", "halfcheetah"])
def test_golden_representation_step(backend: str, name: str) -> None:
    """Loss, gradients and one Adam step of both networks, as the released code recorded them."""
    g = load_golden(f"diffsr_score_step_{name}")
    psi, zeta = psi_and_zeta(g)
    abar = g["alphabars"][g["noise_level"]][:, None]
    perturbed = abar.sqrt() * g["next_state"] + (1 - abar).sqrt() * g["noise_scaled"]
    loss = ops.score_matching_loss(
        plain_mlp(torch.cat([g["state"], g["action"]], dim=1), psi, "elu"),
        nn.functional.elu(nn.functional.linear(torch.cat([perturbed, abar], dim=1), *zeta[:2])),
        *zeta[2:],
        offset=-(1 - abar).sqrt() * g["noise_scaled"],
        score_weight=-(1 - abar[:, 0]) * g["sigma_scale"],
        backend=backend,
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


@pytest.mark.parametrize(
    "sizes",
    [(300, 100, 7, 200), (64, 40, 376, 60), (700, 65, 3, 300), (64, 20, 2, 2048)],
)
def test_error_at_most_twice_eager(isa: str, sizes: tuple[int, int, int, int]) -> None:
    inputs = make_inputs(*sizes)
    ours, eager = run(inputs, "cpu"), run(inputs, "reference")
    exact = run(inputs, "reference", torch.float64)
    assert abs(ours[0] - exact[0]) <= 2e-7 * exact[0]
    for a, b, c in zip(ours[1:], eager[1:], exact[1:], strict=True):
        if c.numel() >= 1000:
            assert_error_at_most_twice_eager(a, b, c)
        else:  # too few values for statistics, so the largest error against a known bound
            assert (a - c).abs().max() <= 1e-6 * c.abs().max()


@pytest.mark.parametrize("batch", [1, 2, 7, 8, 9, 16, 17, 33, 128, 257])
@pytest.mark.parametrize(
    ("features", "state", "hidden"),
    [(1, 1, 1), (3, 2, 5), (7, 17, 33), (48, 3, 16), (49, 1, 15), (20, 5, 530), (300, 2, 9)],
)
def test_awkward_sizes(isa: str, batch: int, features: int, state: int, hidden: int) -> None:
    inputs = make_inputs(batch, features, state, hidden)
    exact = run(inputs, "reference", torch.float64)
    for a, b in zip(run(inputs, "cpu"), exact, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 2e-6 * max(b.abs().max().item(), batch**-0.5)


def test_gradient_of_the_reference() -> None:
    inputs = [t.requires_grad_() for t in make_inputs(4, 3, 2, 5, torch.float64)]
    assert torch.autograd.gradcheck(ops.score_matching_loss, inputs)
    assert torch.autograd.gradgradcheck(ops.score_matching_loss, inputs)


def test_errors_do_not_grow_along_the_batch() -> None:
    """A weight's gradient over 8,192 rows stays as exact, relative to its size, as over 256."""
    errors = []
    for batch in (256, 8_192):
        inputs = make_inputs(batch, 20, 2, 30)
        ours, exact = run(inputs, "cpu")[3], run(inputs, "reference", torch.float64)[3]
        errors.append(quantile(ours - exact, 0.99) / root_mean_square(exact))
    assert errors[1] <= 4 * errors[0]


@given(
    batch=st.integers(0, 40),
    features=st.integers(0, 60),
    state=st.integers(0, 6),
    hidden=st.integers(0, 40),
    scale=st.sampled_from([0.0, 1e-20, 1.0, 1e4]),
    transposed=st.booleans(),
)
def test_any_shape_stride_and_magnitude(
    batch: int, features: int, state: int, hidden: int, scale: float, transposed: bool
) -> None:
    psi, *rest = make_inputs(batch, features, state, hidden)
    inputs = [scale * psi, *rest]
    if transposed:
        inputs = [t.T.contiguous().T for t in inputs]
    # Sizes of zero have no kernel and go to the reference.
    ours = run(inputs, None)
    exact = run(inputs, "reference", torch.float64)
    size = [1.0, 1.0, scale, scale, scale]  # of what is summed up, with a score of order `scale`
    for a, b, s in zip(ours, exact, size, strict=True):
        assert a.shape == b.shape
        bound = 1e-5 * s * max(1.0, scale)
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=bound, equal_nan=batch == 0)


@pytest.mark.parametrize("sizes", [(256, 256, 5, 300), (33, 17, 3, 15), (9, 1, 1, 1)])
def test_bfloat16_is_within_its_bound(isa: str, sizes: tuple[int, int, int, int]) -> None:
    inputs = make_inputs(*sizes)
    ours = run(inputs, "cpu", compute_dtype=torch.bfloat16)
    exact = run(inputs, "reference", torch.float64)
    assert abs(ours[0] - exact[0]) <= 0.01 * exact[0]
    for a, b in zip(ours[1:], exact[1:], strict=True):
        assert root_mean_square(a - b) <= 0.01 * root_mean_square(b)
    if sizes[0] > 9:  # it isn't float32 after all
        assert root_mean_square(ours[3] - exact[3]) >= 1e-4 * root_mean_square(exact[3])


@pytest.mark.parametrize("hidden", [1, 15, 16, 31, 33, 300, 1100])
def test_bfloat16_score_is_that_of_rounded_values(isa: str, hidden: int) -> None:
    """Weights are rounded while earlier ones are multiplied: here every one of them counts."""
    psi, activation, weight, *others = make_inputs(37, 29, 3, hidden)
    rounded = [t.bfloat16().float() for t in (activation, weight)]
    loss, grad_psi, *_ = run([psi, activation, weight, *others], "cpu", compute_dtype=torch.bfloat16)
    exact_loss, exact_psi, *_ = run([psi, *rounded, *others], "reference", torch.float64)
    assert abs(loss - exact_loss) <= 1e-5 * exact_loss
    assert (grad_psi - exact_psi).abs().max() <= 1e-5 * exact_psi.abs().max()


def test_empty_batch_gives_what_a_mean_over_nothing_is(backend: str) -> None:
    loss, *gradients = run(make_inputs(0, 3, 2, 4), backend)
    assert loss.isnan()
    assert [list(g.shape) for g in gradients] == [[0, 3], [0, 4], [6, 4], [6]]
    assert not any(g.any() for g in gradients)


# -- guarantees ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads_and_on_repeat(
    isa: str, compute_dtype: torch.dtype, set_threads: Callable[[int], None]
) -> None:
    for batch in (5, 100, 301):
        inputs = make_inputs(batch, 70, 3, 100)
        results = []
        for threads in (1, 2, 2, 3):
            set_threads(threads)
            results.append(run(inputs, "cpu", compute_dtype=compute_dtype))
        for other in results[1:]:
            assert_same(results[0], other)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(isa: str, compute_dtype: torch.dtype) -> None:
    """Batches of powers of two, where the mean's 1 / batch changes no digit."""
    inputs = make_inputs(256, 70, 3, 300)
    whole = run(inputs, "cpu", compute_dtype=compute_dtype)
    for first, count in ((0, 1), (17, 1), (40, 2), (128, 128), (101, 32)):
        part = [t[first : first + count] if i in (0, 1, 4, 5) else t for i, t in enumerate(inputs)]
        alone = run(part, "cpu", compute_dtype=compute_dtype)
        for gradient, of_whole in zip(alone[1:3], whole[1:3], strict=True):
            assert torch.equal(gradient * (count / 256), of_whole[first : first + count])


@pytest.mark.parametrize("where", [0, 1, 4, 5])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_row(isa: str, where: int, compute_dtype: torch.dtype) -> None:
    inputs = make_inputs(21, 20, 3, 30)
    inputs[where][5] = float("nan")
    loss, grad_psi, grad_hidden, *rest = run(inputs, "cpu", compute_dtype=compute_dtype)
    assert loss.isnan()
    for gradient in (grad_psi, grad_hidden):
        assert gradient.isnan().all(1).tolist() == [i == 5 for i in range(21)]
        assert not gradient[torch.arange(21) != 5].isnan().any()
    assert all(gradient.isnan().all() for gradient in rest)


PEAK_MEMORY = """
import torch
from diffcore import ops

def status(name):  # of this process, in bytes
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

B, D, S, H = 256, 256, 376, 512
torch.manual_seed(0)
make = lambda *shape: torch.empty(shape).normal_()
inputs = [make(B, D), make(B, H), make(D * S, H), make(D * S), make(B, S), make(B)]
leaves = [t.requires_grad_() for t in inputs[:4]]
small = [t[:2].detach() for t in inputs[:2]], [t[:2] for t in inputs[4:]]
weight, bias = inputs[2][: 2 * S].detach(), inputs[3][: 2 * S].detach()
first = small[0][0][:, :2].clone().requires_grad_()  # whatever a first call sets up
ops.score_matching_loss(first, small[0][1], weight, bias, *small[1], backend=BACKEND).backward()
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here, not from the import
before = status("VmRSS")
loss = ops.score_matching_loss(*inputs, backend=BACKEND)
loss.backward()
peak = status("VmHWM")
gradients = sum(t.grad.numel() * 4 for t in leaves)
print((peak - before - gradients) / 2**20)
"""


@needs_kernels
def test_peak_memory() -> None:
    """Beyond inputs and gradients: no [batch, features, state] tensor, which would take 94 MiB."""

    def mebibytes(backend: str) -> float:
        result = run_script(PEAK_MEMORY.replace("BACKEND", repr(backend)))
        assert result.returncode == 0, result.stderr
        return float(result.stdout)

    assert mebibytes("cpu") < 64
    assert mebibytes("reference") > 94  # the measurement sees such a tensor


# -- as a part of PyTorch ----------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 1), (2, 3), (1, 3)])
def test_only_wanted_gradients(isa: str, wanted: tuple[int, ...]) -> None:
    inputs = make_inputs(20, 50, 3, 40)
    whole = run(inputs, "cpu")
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    loss = ops.score_matching_loss(*leaves, backend="cpu")
    loss.backward()
    assert torch.equal(loss.detach(), whole[0])
    for i, leaf in enumerate(leaves):
        assert leaf.grad is None if i not in wanted else torch.equal(leaf.grad, whole[1 + i])


@needs_kernels
def test_without_gradients() -> None:
    inputs = [t.requires_grad_() for t in make_inputs(20, 50, 3, 40)]
    with torch.no_grad():
        loss = ops.score_matching_loss(*inputs, backend="cpu")
    assert not loss.requires_grad
    assert torch.equal(loss, run(inputs, "cpu")[0])


@needs_kernels
def test_backward_twice_and_scaled() -> None:
    """Gradients that the forward pass computed aren't changed by anyone who gets them."""
    inputs = make_inputs(9, 6, 3, 5)
    expected = run(inputs, "cpu")[1:]
    leaves = [t.requires_grad_() for t in inputs[:4]]
    loss = ops.score_matching_loss(*inputs, backend="cpu")
    for _ in range(2):
        for gradient in torch.autograd.grad(loss, leaves, retain_graph=True):
            gradient.zero_()
    for factor in (1.0, 3.0):
        (factor * loss).backward(retain_graph=True)
        for leaf, gradient in zip(leaves, expected, strict=True):
            assert torch.equal(leaf.grad, factor * gradient)
            leaf.grad.zero_()
    loss.backward()
    assert_same([leaf.grad for leaf in leaves], expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@needs_kernels
def test_two_losses_add_up() -> None:
    inputs, others = make_inputs(9, 6, 3, 5), make_inputs(4, 6, 3, 5)
    others[2:4] = inputs[2:4]
    expected = run(inputs, "cpu")[3] + run(others, "cpu")[3]
    weight = inputs[2].requires_grad_()
    total = sum(ops.score_matching_loss(*x, backend="cpu") for x in (inputs, others))
    total.backward()
    assert torch.equal(weight.grad, expected)


@needs_kernels
def test_batched_gradients() -> None:
    inputs = make_inputs(9, 6, 3, 5)
    expected = run(inputs, "cpu")[3]
    weight = inputs[2].requires_grad_()
    loss = ops.score_matching_loss(*inputs, backend="cpu")
    factors = torch.tensor([1.0, -2.0])
    (batched,) = torch.autograd.grad(loss, weight, factors, is_grads_batched=True)
    assert torch.equal(batched, factors[:, None, None] * expected)


@needs_kernels
@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_second_derivative_is_refused(first: int) -> None:
    inputs = make_inputs(9, 6, 3, 5)
    leaf = inputs[first].requires_grad_()
    loss = ops.score_matching_loss(*inputs, backend="cpu")
    (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*backend='reference'"):
        slope.sum().backward()


@needs_kernels
def test_nested_transforms_refuse_a_mixed_second_derivative() -> None:
    psi, hidden, *rest = make_inputs(9, 6, 3, 5)

    def slope_sum(psi: Tensor) -> Tensor:
        def loss(hidden: Tensor) -> Tensor:
            return ops.score_matching_loss(psi, hidden, *rest, backend="cpu")

        return torch.func.grad(loss)(hidden).sum()

    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(slope_sum)(psi)


@needs_kernels
def test_nested_transforms_of_different_arguments() -> None:
    """An outer derivative through the loss itself, where an inner one is taken as well."""
    psi, hidden, *rest = make_inputs(9, 6, 3, 5)
    expected = run([psi, hidden, *rest], "cpu")

    def outer(psi: Tensor) -> tuple[Tensor, Tensor]:
        def inner(hidden: Tensor) -> tuple[Tensor, Tensor]:
            loss = ops.score_matching_loss(psi, hidden, *rest, backend="cpu")
            return loss, loss

        slope, loss = torch.func.grad(inner, has_aux=True)(hidden)
        return loss, slope

    slope_psi, slope_hidden = torch.func.grad(outer, has_aux=True)(psi)
    assert torch.equal(slope_psi, expected[1])
    assert torch.equal(slope_hidden, expected[2])


@needs_kernels
def test_torch_func() -> None:
    inputs = make_inputs(9, 6, 3, 5)
    expected = run(inputs, "cpu")
    gradients = torch.func.grad(ops.score_matching_loss, argnums=(0, 1, 2, 3))(*inputs)
    assert_same(list(gradients), expected[1:])

    def of_one_row(psi: Tensor, hidden: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        rows = [t[None] for t in (psi, hidden)], [t[None] for t in others]
        return ops.score_matching_loss(*rows[0], weight, inputs[3], *rows[1], backend="cpu")

    in_dims = (0, 0, None, 0, 0)
    arguments = [inputs[i] for i in (0, 1, 2, 4, 5)]
    losses = torch.func.vmap(of_one_row, in_dims)(*arguments)
    assert torch.allclose(losses.mean(), expected[0], rtol=1e-6)
    per_row = torch.func.vmap(torch.func.grad(of_one_row, argnums=2), in_dims)(*arguments)
    assert torch.allclose(per_row.mean(0), expected[3], atol=1e-6)


@needs_kernels
def test_vmap_over_an_ensemble() -> None:
    members = [make_inputs(9, 6, 3, 5) for _ in range(3)]
    stacked = [torch.stack(column) for column in zip(*members, strict=True)]
    losses = torch.func.vmap(ops.score_matching_loss)(*stacked)
    assert_same(list(losses), [run(member, "cpu")[0] for member in members])


@needs_kernels
def test_compiles_without_a_graph_break() -> None:
    inputs = make_inputs(9, 6, 3, 5)
    leaves = [t.requires_grad_() for t in inputs[:4]]

    def twice(*arguments: Tensor) -> Tensor:
        return 2 * ops.score_matching_loss(*arguments, backend="cpu")

    compiled = torch.compile(twice, fullgraph=True)
    ours = torch.autograd.grad(compiled(*inputs), leaves)
    eager = torch.autograd.grad(twice(*inputs), leaves)
    assert_same(list(ours), list(eager))


@needs_kernels
def test_autocast_hands_over_in_float32() -> None:
    inputs = make_inputs(9, 6, 3, 5)
    lower = [t.bfloat16() if i in (0, 1) else t for i, t in enumerate(inputs)]
    raised = [t.float() for t in lower]
    with torch.autocast("cpu", torch.bfloat16):
        assert explain("score_matching_loss", *lower).backend == "cpu"
        loss = ops.score_matching_loss(*lower)
    assert torch.equal(loss, run(raised, "cpu")[0])


@needs_kernels
@pytest.mark.parametrize("wanted", [[True] * 4, [False] * 4, [True, False, True, False]])
def test_opcheck(wanted: list[bool]) -> None:
    inputs = make_inputs(5, 4, 3, 6)
    torch.library.opcheck(native.loss_and_gradients.overload, (*inputs, "float32", wanted, "cpu"))


@needs_kernels
def test_what_the_kernel_can_not_take() -> None:
    inputs = make_inputs(5, 4, 3, 6)
    for i in (4, 5):
        arguments = [t.clone().requires_grad_(j == i) for j, t in enumerate(inputs)]
        answer = explain("score_matching_loss", *arguments)
        assert answer.backend == "reference"
        assert answer.passed_over["cpu"].startswith(f"{NAMES[i]} requires a gradient")
        with pytest.raises(ValueError, match=f"backend.*{NAMES[i]} requires a gradient"):
            ops.score_matching_loss(*arguments, backend="cpu")
        ops.score_matching_loss(*arguments).backward()
        assert arguments[i].grad is not None
        with torch.no_grad():
            assert explain("score_matching_loss", *arguments).backend == "cpu"
    in_double = [t.double() for t in inputs]
    assert "float64" in explain("score_matching_loss", *in_double).passed_over["cpu"]
    empty = make_inputs(5, 4, 0, 6)
    assert "no columns" in explain("score_matching_loss", *empty).passed_over["cpu"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"psi": "psi"}, TypeError, "^psi: expected a tensor, got str"),
        ({"psi": torch.zeros(5)}, ValueError, r"^psi: expected shape \[B, D\], got \[5\]"),
        ({"psi": torch.zeros(5, 4, dtype=torch.int64)}, TypeError, "^psi: expected a floating-poin"),
        ({"hidden": torch.zeros(4, 6)}, ValueError, r"^hidden: expected shape \[5, H\], got \[4, 6"),
        ({"weight": torch.zeros(12, 5)}, ValueError, r"^weight: expected shape \[12, 6\], got \[12"),
        ({"weight": torch.zeros(13, 6)}, ValueError, r"^weight: expected shape \[12, 6\], got \[13"),
        ({"bias": torch.zeros(11)}, ValueError, r"^bias: expected shape \[12\], got \[11\]"),
        ({"offset": torch.zeros(5)}, ValueError, r"^offset: expected shape \[5, S\], got \[5\]"),
        ({"offset": torch.zeros(5, 2)}, ValueError, r"^weight: expected shape \[8, 6\], got \[12"),
        ({"score_weight": torch.zeros(5, 1)}, ValueError, r"^score_weight: expected shape \[5\]"),
        ({"bias": torch.zeros(12).double()}, TypeError, "^bias: expected torch.float32 like psi"),
        ({"offset": torch.zeros(5, 3, device="meta")}, ValueError, "^offset: expected to be on cpu"),
        ({"compute_dtype": torch.float64}, ValueError, "^compute_dtype: expected None"),
        ({"backend": "gpu"}, ValueError, "^backend: expected one of cpu, reference"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = dict(zip(NAMES, make_inputs(5, 4, 3, 6), strict=True))
    with pytest.raises(error, match=message):
        ops.score_matching_loss(**{**arguments, **change})
