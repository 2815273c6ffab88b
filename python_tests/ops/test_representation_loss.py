"""Diff-SR's loss with both networks in one call: the same as its parts one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import root_mean_square
from torch import Tensor, nn
from torch.func import functional_call

from diffcore import explain, ops
from diffcore.nn import MLP
from diffcore.ops import _native
from diffcore.ops.representation_loss import native

FEATURES, STATE = 6, 3
needs_kernels = pytest.mark.skipif(_native._core is None, reason="needs the compiled module")


def make_networks(
    hidden_layers: int = 1, hidden: int = 7, features: int = FEATURES
) -> tuple[MLP, MLP]:
    """psi on 5 numbers, zeta on 4, of different widths and depths."""
    psi = MLP(5, hidden + 1, features, hidden_layers, "elu", "uniform")
    deeper = ("mish", "elu", "sin")[: hidden_layers + 1]
    return psi, MLP(4, hidden, features * STATE, hidden_layers + 1, deeper, "uniform")


def make_inputs(batch: int = 9) -> list[Tensor]:
    """x, perturbed, offset and score_weight."""
    return [
        torch.randn(batch, 5),
        torch.randn(batch, 4),
        torch.randn(batch, STATE),
        torch.rand(batch),
    ]


def in_parts(
    psi: MLP, zeta: MLP, x: Tensor, perturbed: Tensor, *rest: Tensor, **options: Any
) -> Tensor:
    *parameters, weight, bias = zeta.weights_and_biases()
    kinds = zeta.activations[:-1]
    hidden = ops.mlp(perturbed, parameters[::2], parameters[1::2], kinds, **options)
    parameters = psi.weights_and_biases()
    features = ops.mlp(x, parameters[::2], parameters[1::2], psi.activations, **options)
    return ops.score_matching_loss(features, hidden, weight, bias, *rest, **options)


def with_gradients(
    loss: Callable[..., Tensor], networks: tuple[MLP, MLP], inputs: list[Tensor], **options: Any
) -> list[Tensor]:
    """[loss, gradients of x, of perturbed and of all parameters]."""
    leaves = [t.detach().requires_grad_(i < 2) for i, t in enumerate(inputs)]
    value = loss(*networks, *leaves, **options)
    parameters = [p for network in networks for p in network.parameters()]
    return [value.detach(), *torch.autograd.grad(value, [*leaves[:2], *parameters])]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- right values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden_layers", [1, 2])
@pytest.mark.parametrize("batch", [1, 9, 70])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "features"), [(7, FEATURES), (43, 35)])  # above 32: AMX
def test_the_same_bits_as_its_parts(
    isa: str,
    hidden_layers: int,
    batch: int,
    compute_dtype: torch.dtype | None,
    hidden: int,
    features: int,
) -> None:
    networks, inputs = make_networks(hidden_layers, hidden, features), make_inputs(batch)
    options = {"compute_dtype": compute_dtype}
    ours = with_gradients(ops.representation_loss, networks, inputs, **options)
    assert_same(ours, with_gradients(in_parts, networks, inputs, **options))


def test_close_to_exact(backend: str) -> None:
    (psi, zeta), inputs = make_networks(), make_inputs()
    ours = with_gradients(ops.representation_loss, (psi, zeta), inputs, backend=backend)
    networks, inputs = (psi.double(), zeta.double()), [t.double() for t in inputs]
    exact = with_gradients(ops.representation_loss, networks, inputs, backend="reference")
    for a, b in zip(ours, exact, strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_within_its_bound(isa: str) -> None:
    networks, inputs = make_networks(1, 100, 70), make_inputs(256)
    ours = with_gradients(
        ops.representation_loss, networks, inputs, compute_dtype=torch.bfloat16, backend="cpu"
    )
    double = tuple(copy.deepcopy(network).double() for network in networks)
    exact = with_gradients(ops.representation_loss, double, [t.double() for t in inputs])
    for a, b in zip(ours, exact, strict=True):
        assert root_mean_square(a - b) <= 0.02 * root_mean_square(b)
    # It isn't float32 after all, in no layer's gradient.
    for a, b in zip(ours[1:], exact[1:], strict=True):
        assert root_mean_square(a - b) >= 1e-4 * root_mean_square(b)


def test_gradient_of_the_reference() -> None:
    psi, zeta = (network.double() for network in make_networks())
    inputs = [t.double().requires_grad_() for t in make_inputs(3)]

    def loss(*inputs: Tensor) -> Tensor:
        return ops.representation_loss(psi, zeta, *inputs)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_empty_batch_gives_what_a_mean_over_nothing_is(backend: str) -> None:
    networks, inputs = make_networks(), make_inputs(0)
    loss, *grads = with_gradients(ops.representation_loss, networks, inputs, backend=backend)
    assert loss.isnan()
    assert [list(g.shape) for g in grads[:2]] == [[0, 5], [0, 4]]
    assert not any(g.any() for g in grads)


# -- as a part of PyTorch --------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2), (2, 3)])
def test_only_wanted_gradients(wanted: tuple[int, ...]) -> None:
    """Of x, perturbed, psi and zeta."""
    psi, zeta = make_networks()
    inputs = make_inputs()
    expected = with_gradients(ops.representation_loss, (psi, zeta), inputs)
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    for i, network in ((2, psi), (3, zeta)):
        network.requires_grad_(i in wanted)
    leaves[2:] = inputs[2:]
    ops.representation_loss(psi, zeta, *leaves).backward()
    parameters = [list(psi.parameters()), list(zeta.parameters())]
    tensors = [*leaves[:2], *parameters[0], *parameters[1]]
    kinds = [0, 1, *[2] * len(parameters[0]), *[3] * len(parameters[1])]
    for tensor, kind, gradient in zip(tensors, kinds, expected[1:], strict=True):
        if kind in wanted:
            assert torch.equal(tensor.grad, gradient)
        else:
            assert tensor.grad is None


@needs_kernels
def test_without_gradients() -> None:
    networks, inputs = make_networks(), make_inputs()
    with torch.no_grad():
        loss = ops.representation_loss(*networks, *inputs)
    assert not loss.requires_grad
    assert torch.equal(loss, with_gradients(ops.representation_loss, networks, inputs)[0])


@needs_kernels
def test_backward_twice_and_scaled() -> None:
    networks, inputs = make_networks(), make_inputs()
    expected = with_gradients(ops.representation_loss, networks, inputs)[3:]
    parameters = [p for network in networks for p in network.parameters()]
    loss = ops.representation_loss(*networks, *inputs)
    for factor in (1.0, 3.0):
        gradients = torch.autograd.grad(factor * loss, parameters, retain_graph=True)
        assert_same(list(gradients), [factor * g for g in expected])
    loss.backward()
    assert_same([p.grad for p in parameters], expected)  # type: ignore[misc]


@needs_kernels
def test_second_derivative_is_refused() -> None:
    (psi, zeta), inputs = make_networks(), make_inputs()
    loss = ops.representation_loss(psi, zeta, *inputs)
    (slope,) = torch.autograd.grad(loss, psi.layers[0].weight, create_graph=True)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no second derivative.*backend='reference'"):
        slope.sum().backward()


@needs_kernels
def test_torch_func() -> None:
    (psi, zeta), inputs = make_networks(), make_inputs()
    expected = with_gradients(ops.representation_loss, (psi, zeta), inputs)
    both = nn.ModuleDict({"psi": psi, "zeta": zeta})

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.networks = both

        def forward(self, *inputs: Tensor) -> Tensor:
            return ops.representation_loss(psi, zeta, *inputs)

    module = Loss()
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        return functional_call(module, parameters, inputs)  # type: ignore[no-any-return]

    gradients = torch.func.grad(loss)(parameters, *inputs)
    assert_same(list(gradients.values()), expected[3:])

    def of_one_row(parameters: dict[str, Tensor], *row: Tensor) -> Tensor:
        return loss(parameters, *(t[None] for t in row))

    in_dims = (None, 0, 0, 0, 0)
    per_row = torch.func.vmap(torch.func.grad(of_one_row), in_dims)(parameters, *inputs)
    for gradient, whole in zip(per_row.values(), expected[3:], strict=True):
        assert torch.allclose(gradient.mean(0), whole, atol=1e-6)


@needs_kernels
def test_compiles_without_a_graph_break() -> None:
    networks, inputs = make_networks(), make_inputs()

    def twice(*inputs: Tensor) -> Tensor:
        return 2 * ops.representation_loss(*networks, *inputs, backend="cpu")

    parameters = [p for network in networks for p in network.parameters()]
    ours = torch.autograd.grad(torch.compile(twice, fullgraph=True)(*inputs), parameters)
    assert_same(list(ours), list(torch.autograd.grad(twice(*inputs), parameters)))


@needs_kernels
def test_autocast_hands_over_in_float32() -> None:
    networks, inputs = make_networks(), make_inputs()
    lower = [inputs[0].bfloat16(), inputs[1].bfloat16(), *inputs[2:]]
    raised = [t.float() for t in lower]
    with torch.autocast("cpu", torch.bfloat16):
        assert explain("representation_loss", *networks, *lower).backend == "cpu"
        loss = ops.representation_loss(*networks, *lower)
    assert torch.equal(loss, ops.representation_loss(*networks, *raised))


@needs_kernels
@pytest.mark.parametrize("wanted", [[True] * 4, [False] * 4, [True, False, False, True]])
def test_opcheck(wanted: list[bool]) -> None:
    networks = [[p.detach() for p in n.parameters()] for n in make_networks()]
    arguments = (*make_inputs(), *networks, "elu,identity", "mish,elu", wanted)
    for precision in ("float32", "bfloat16"):
        torch.library.opcheck(native.loss_and_gradients.overload, (*arguments, precision, "cpu"))


@needs_kernels
@pytest.mark.parametrize("name", ["offset", "score_weight"])
def test_what_the_kernel_can_not_take(name: str) -> None:
    networks = make_networks()
    inputs = dict(zip(("x", "perturbed", "offset", "score_weight"), make_inputs(), strict=True))
    inputs[name].requires_grad_()
    answer = explain("representation_loss", *networks, **inputs)
    assert answer.backend == "reference"
    assert answer.passed_over["cpu"].startswith(f"{name} requires a gradient")
    ops.representation_loss(*networks, **inputs).backward()
    assert inputs[name].grad is not None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"psi": nn.Linear(5, 6)}, TypeError, "^psi: expected a diffcore.nn.MLP, got Linear"),
        ({"zeta": None}, TypeError, "^zeta: expected a diffcore.nn.MLP, got NoneType"),
        ({"zeta": MLP(4, 7, 17)}, ValueError, "^zeta: expected 18 outputs, psi's 6 times off.* 17"),
        ({"zeta": make_networks()[1].double()}, TypeError, "^zeta: expected torch.float32 like x"),
        ({"x": "x"}, TypeError, "^x: expected a tensor, got str"),
        ({"x": torch.zeros(9, 4)}, ValueError, r"^x: expected shape \[B, 5\], got \[9, 4\]"),
        ({"x": torch.zeros(9, 5).double()}, TypeError, "^x: expected torch.float32 like psi"),
        ({"perturbed": torch.zeros(8, 4)}, ValueError, r"^perturbed: expected shape \[9, 4\], got"),
        ({"offset": torch.zeros(9)}, ValueError, r"^offset: expected shape \[9, S\], got \[9\]"),
        ({"score_weight": torch.zeros(9, 1)}, ValueError, r"^score_weight: expected shape \[9\]"),
        ({"score_weight": torch.zeros(9, device="meta")}, ValueError, "^score_weight: .* on cpu"),
        ({"compute_dtype": torch.float64}, ValueError, "^compute_dtype: expected None"),
        ({"backend": "gpu"}, ValueError, "^backend: expected one of cpu, reference"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    names = ("psi", "zeta", "x", "perturbed", "offset", "score_weight")
    arguments = dict(zip(names, (*make_networks(), *make_inputs()), strict=True))
    with pytest.raises(error, match=message):
        ops.representation_loss(**{**arguments, **change})
