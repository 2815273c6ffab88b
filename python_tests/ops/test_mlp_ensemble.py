"""Several MLPs in one call: the same as one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffcore import explain, ops
from diffcore.ops.mlp import native

ACTIVATIONS = ["mish", "sin", "identity"]


def make_networks(count: int, widths: tuple[int, ...] = (23, 100, 65, 3)) -> list[list[Tensor]]:
    def network() -> list[Tensor]:
        layers = [(torch.randn(o, i) / i**0.5, torch.randn(o)) for i, o in itertools.pairwise(widths)]
        return [parameter.requires_grad_() for layer in layers for parameter in layer]

    return [network() for _ in range(count)]


def run(
    x: Tensor,
    networks: list[list[Tensor]],
    grad_y: Tensor,
    backend: str,
    compute_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """[y, gradient of x, gradients of all parameters]."""
    x = x.detach().requires_grad_()
    y = ops.mlp_ensemble(x, networks, ACTIVATIONS, compute_dtype=compute_dtype, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, [x, *itertools.chain(*networks)], grad_y)]


@pytest.mark.parametrize("batch", [1, 7, 8, 65, 257])
@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_same_bits_as_one_after_the_other(
    isa: str, batch: int, count: int, compute_dtype: torch.dtype
) -> None:
    networks = make_networks(count)
    x, grad_y = torch.randn(batch, 23), torch.randn(count, batch, 3)
    y, grad_x, *grads = run(x, networks, grad_y, "cpu", compute_dtype)
    settings = {"compute_dtype": compute_dtype, "backend": "cpu"}
    alone = torch.zeros(batch, 23)
    for i, network in enumerate(networks):
        leaf = x.clone().requires_grad_()
        y_alone = ops.mlp(leaf, network[::2], network[1::2], ACTIVATIONS, **settings)
        leaf_grad, *expected = torch.autograd.grad(y_alone, [leaf, *network], grad_y[i])
        assert torch.equal(y[i], y_alone)
        assert all(map(torch.equal, grads[6 * i : 6 * i + 6], expected))
        alone += leaf_grad
    assert torch.equal(grad_x, alone)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(
    isa: str, set_threads: Callable[[int], None], compute_dtype: torch.dtype
) -> None:
    networks, x, grad_y = make_networks(2), torch.randn(301, 23), torch.randn(2, 301, 3)
    results = []
    for threads in (1, 2, 2):
        set_threads(threads)
        results.append(run(x, networks, grad_y, "cpu", compute_dtype))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_leading_dimensions_and_none_at_all() -> None:
    networks = make_networks(2)
    assert ops.mlp_ensemble(torch.randn(4, 5, 23), networks, ACTIVATIONS).shape == (2, 4, 5, 3)
    assert ops.mlp_ensemble(torch.randn(23), networks, ACTIVATIONS).shape == (2, 3)
    y, grad_x, *grads = run(torch.empty(0, 23), networks, torch.empty(2, 0, 3), "cpu")
    assert y.shape == (2, 0, 3)
    assert grad_x.shape == (0, 23)
    assert not any(grad.any() for grad in grads)


def test_nine_networks_run_on_the_reference() -> None:
    answer = explain("mlp_ensemble", torch.randn(2, 23), make_networks(9), ACTIVATIONS)
    assert answer.backend == "reference"
    assert "9 networks, the CPU kernels take at most 8" in answer.passed_over["cpu"]
    assert ops.mlp_ensemble(torch.randn(2, 23), make_networks(9), ACTIVATIONS).shape == (9, 2, 3)


def test_second_derivative_is_refused() -> None:
    networks = make_networks(2)
    y = ops.mlp_ensemble(torch.randn(4, 23), networks, ACTIVATIONS)
    grads = torch.autograd.grad(y.sum(), networks[1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grads[0].sum().backward()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_opcheck_and_compile(precision: str) -> None:
    networks = [[p.detach() for p in network] for network in make_networks(2)]
    x, flat = torch.randn(5, 23), [*itertools.chain(*networks)]
    arguments = (x, flat, "mish,sin,identity", True, precision, "cpu")
    y, saved = native.forward(*arguments)
    torch.library.opcheck(native.forward.overload, arguments)
    settings = (flat, "mish,sin,identity", True, True, precision, "cpu")
    torch.library.opcheck(native.backward.overload, (torch.randn_like(y), x, saved, *settings))

    dtype = getattr(torch, precision)
    compiled = torch.compile(
        lambda x: ops.mlp_ensemble(x, networks, ACTIVATIONS, compute_dtype=dtype),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(x), y)


def test_vmap_over_rows() -> None:
    networks, x = make_networks(2), torch.randn(3, 4, 23)
    mapped = torch.func.vmap(lambda x: ops.mlp_ensemble(x, networks, ACTIVATIONS))(x)
    assert torch.equal(mapped, ops.mlp_ensemble(x, networks, ACTIVATIONS).movedim(1, 0))


def test_bad_arguments() -> None:
    x, networks = torch.randn(2, 23), make_networks(2)
    with pytest.raises(ValueError, match="networks: expected at least one network, got none"):
        ops.mlp_ensemble(x, [], ACTIVATIONS)
    with pytest.raises(ValueError, match=r"networks\[1\]: expected 6 tensors like networks\[0\]"):
        ops.mlp_ensemble(x, [networks[0], networks[1][:4]], ACTIVATIONS)
    wider = make_networks(1, (23, 101, 65, 3))
    with pytest.raises(ValueError, match=r"networks\[1\]\[0\]: expected shape \[100, 23\]"):
        ops.mlp_ensemble(x, [networks[0], *wider], ACTIVATIONS)
    double = [p.detach().double() for p in networks[1]]
    with pytest.raises(TypeError, match=r"networks\[1\]\[0\]: expected torch.float32"):
        ops.mlp_ensemble(x, [networks[0], double], ACTIVATIONS)
    with pytest.raises(ValueError, match=r"^networks\[0\]\[0\]: expected shape \[out, 22\]"):
        ops.mlp_ensemble(torch.randn(2, 22), networks, ACTIVATIONS)
    with pytest.raises(ValueError, match=r"networks\[0\]: expected a weight and a bias .* got 5"):
        ops.mlp_ensemble(x, [networks[0][:5], networks[1]], ACTIVATIONS)
    module = torch.nn.ModuleList()
    with pytest.raises(TypeError, match="networks: expected a list, one a network, got ModuleList"):
        ops.mlp_ensemble(x, module, ACTIVATIONS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"networks\[0\]: expected a list, .* got Tensor"):
        ops.mlp_ensemble(x, networks[0], ACTIVATIONS)  # type: ignore[arg-type]
