"""MLPs on the Triton kernels: one or several, forward and backward."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import ACTIVATIONS, load_golden, root_mean_square
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffcore import explain, ops
from diffcore.ops.mlp import native


def make_networks(
    widths: list[int], activation: str = "mish", networks: int = 1
) -> tuple[list[list[Tensor]], list[str]]:
    """Parameters of networks with a linear output, and its activations."""
    pairs = list(itertools.pairwise(widths))
    parameters = [
        [t for i, o in pairs for t in (torch.randn(o, i) / max(1, i) ** 0.5, 0.1 * torch.randn(o))]
        for _ in range(networks)
    ]
    return parameters, [activation] * (len(pairs) - 1) + ["identity"]


def run(
    x: Tensor,
    networks: list[list[Tensor]],
    activations: list[str],
    grad_y: Tensor,
    backend: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """[y, gradient of x, gradients of all parameters], everything computed in `dtype`."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, dtype).requires_grad_()

    leaf_x, leaves = leaf(x), [[leaf(p) for p in network] for network in networks]
    y = ops.mlp_ensemble(leaf_x, leaves, activations, backend=backend)
    every = [leaf_x, *itertools.chain(*leaves)]
    grads = torch.autograd.grad(y, every, grad_y.to(device, dtype))
    return [t.detach().cpu() for t in (y, *grads)]


def assert_close_to_exact(
    x: Tensor, networks: list[list[Tensor]], activations: list[str], device: str
) -> None:
    grad_y = torch.randn(len(networks), len(x), len(networks[0][-1]))
    ours = run(x, networks, activations, grad_y, "triton", device)
    exact = run(x, networks, activations, grad_y, "reference", dtype=torch.float64)
    for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
        assert a.shape == b.shape
        # What is rounded are the partial sums: of order 1 for y and the input's gradient, of order
        # sqrt(batch) for the parameters', which sum over the batch and may cancel.
        partial_sums = 1.0 if i < 2 else max(1, len(x)) ** 0.5
        largest = b.abs().max().item() if b.numel() else 0.0
        assert not a.numel() or (a - b).abs().max() <= 2e-6 * max(partial_sums, largest)


# -- right values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(device: str, activation: str) -> None:
    networks, activations = make_networks([5, 20, 20, 3], activation)
    assert_close_to_exact(torch.randn(17, 5), networks, activations, device)


@pytest.mark.parametrize("batch", [0, 1, 7, 33])
@pytest.mark.parametrize("widths", [[1, 1, 1], [7, 3], [17, 31, 33, 1], [5, 130, 40]])
def test_awkward_sizes(device: str, batch: int, widths: list[int]) -> None:
    networks, activations = make_networks(widths)
    assert_close_to_exact(torch.randn(batch, widths[0]), networks, activations, device)


def test_layers_of_no_width(device: str) -> None:
    for widths in ([0, 4, 2], [3, 0, 2], [3, 4, 0]):
        networks, activations = make_networks(widths)
        assert_close_to_exact(torch.randn(5, widths[0]), networks, activations, device)


@pytest.mark.parametrize("networks", [2, 3])
def test_networks_of_an_ensemble(device: str, networks: int) -> None:
    parameters, activations = make_networks([6, 20, 9, 2], "elu", networks)
    assert_close_to_exact(torch.randn(19, 6), parameters, activations, device)


@pytest.mark.parametrize("programs", [1, 2])
def test_every_block_of_rows(device: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 rows, and of 32, as large batches have them."""
    from diffcore.ops.mlp import triton

    monkeypatch.setattr(triton, "PROGRAMS", programs)
    rows = triton.row_settings(1, 40, "float32")["ROWS"]
    assert rows == 64 // programs
    networks, activations = make_networks([6, 20, 2])
    assert_close_to_exact(torch.randn(40, 6), networks, activations, device)


def test_gradients_in_parts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of batches so long that their sums are cut."""
    from diffcore.ops.mlp import triton

    monkeypatch.setattr(triton, "MOST_SUMMED_ROWS", 16)
    for parameters in (make_networks([6, 70, 2], "tanh", 2), make_networks([40, 30])):
        networks, activations = parameters
        assert_close_to_exact(
            torch.randn(50, len(networks[0][0][0])), networks, activations, device
        )


def test_errors_do_not_grow_along_the_batch(device: str) -> None:
    from diffcore.ops.mlp import triton

    errors = []
    for batch in (128, 4096):
        deltas, saved = torch.randn(1, batch, 16), torch.randn(1, batch, 16)
        gradients = [torch.empty(9, 5, device=device), torch.empty(9, device=device)]
        kept = triton.Layout((0,), (-1,), 16)
        triton.weight_gradients(
            deltas.to(device), saved.to(device), gradients, (5, 9), kept, "float32"
        )
        exact = deltas[0, :, :9].double().T @ saved[0, :, :5].double()
        errors.append(root_mean_square(gradients[0].cpu() - exact) / root_mean_square(exact))
        sums = deltas[0, :, :9].double().sum(0)
        assert (gradients[1].cpu() - sums).abs().max() <= 1e-6 * batch**0.5
    assert errors[1] <= 4 * errors[0]


@given(
    batch=st.integers(1, 20),
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    activation=st.sampled_from(list(ACTIVATIONS)),
    networks=st.integers(1, 3),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e4]),
    transposed=st.booleans(),
)
@settings(max_examples=8)
def test_any_shape_stride_and_magnitude(
    device: str,
    batch: int,
    widths: list[int],
    activation: str,
    networks: int,
    scale: float,
    transposed: bool,
) -> None:
    parameters, activations = make_networks(widths, activation, networks)
    x = scale * torch.randn(batch, widths[0])
    if transposed:
        x = x.T.contiguous().T
        parameters = [[p.t().contiguous().t() for p in network] for network in parameters]
    ours = ops.mlp_ensemble(
        x.to(device), [[p.to(device) for p in n] for n in parameters], activations, backend="triton"
    )
    doubles = [[p.double() for p in network] for network in parameters]
    exact = ops.mlp_ensemble(x.double(), doubles, activations, backend="reference")
    # Sine and cosine turn the rounding of a large argument into an error of its size.
    bound = 1e-5 * max(1.0, exact.abs().max().item())
    if activation in ("sin", "cos"):
        bound *= max(1.0, scale)
    assert (ours.cpu() - exact).abs().max() <= bound


def test_float16_is_within_a_percent(device: str) -> None:
    networks, activations = make_networks([23, 64, 64, 3], networks=2)
    parameters = [p.to(device) for p in itertools.chain(*networks)]
    x, grad_y = torch.randn(50, 23), torch.randn(2, 50, 3)
    names, settings = ",".join(activations), ("float16", "triton")
    y, saved = native.forward(x.to(device), parameters, names, True, *settings)
    arguments = (grad_y.to(device), x.to(device), saved, parameters, names, True, True)
    grads = native.backward(*arguments, *settings)
    exact = run(x, networks, activations, grad_y, "reference", dtype=torch.float64)
    for a, b in zip((y, *grads), exact, strict=True):
        assert root_mean_square(a.cpu() - b) <= 0.01 * root_mean_square(b)
    assert root_mean_square(y.cpu() - exact[0]) >= 1e-5  # it isn't float32 after all


def test_golden_critic(device: str) -> None:
    """Twin critics of Diff-SR's released code: sin, ELU, linear."""
    g = load_golden("diffsr_rff_critic")
    x = g["x"].to(device).requires_grad_()
    names = [f"l{i}_{kind}" for i in range(1, 7) for kind in ("weight", "bias")]
    layers = {name: g[f"critic__{name}"].to(device).requires_grad_() for name in names}
    parameters = list(layers.values())
    networks = [parameters[:6], parameters[6:]]
    q1, q2 = ops.mlp_ensemble(x, networks, ["sin", "elu", "identity"], backend="triton")
    torch.testing.assert_close(q1.cpu(), g["q1"], rtol=0, atol=1e-5)
    torch.testing.assert_close(q2.cpu(), g["q2"], rtol=0, atol=1e-5)
    (q1.square().sum() + q2.sum()).backward()
    torch.testing.assert_close(x.grad.cpu(), g["grad_x"], rtol=0, atol=1e-5)
    for name, parameter in layers.items():
        recorded = g[f"grad__{name}"]  # of large tensors the first rows only
        ours = parameter.grad[: len(recorded)].cpu()
        torch.testing.assert_close(ours, recorded, rtol=1e-5, atol=1e-5)


def test_transposed_copies(device: str) -> None:
    from diffcore.ops import _triton  # only now it's clear what Triton is (conftest.py)

    shapes = [(1, 3), (70, 130), (64, 64), (129, 1), (5, 0)]
    weights = [torch.randn(shape, device=device) for shape in shapes]
    copies = _triton.transposed(weights, 64)
    for weight, copy in zip(weights, copies, strict=True):
        outputs, inputs = weight.shape
        assert copy.shape == (inputs, -(-outputs // 64) * 64)
        assert torch.equal(copy[:, :outputs], weight.T)
        assert not copy[:, outputs:].any()


# -- guarantees ------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_in_its_row(device: str, activation: str) -> None:
    networks, activations = make_networks([4, 20, 3], activation)
    x = torch.randn(9, 4)
    x[5, 2] = float("nan")
    y, grad_x = run(x, networks, activations, torch.ones(1, 9, 3), "triton", device)[:2]
    rows = torch.isnan(y[0]).any(1)
    assert rows.tolist() == [i == 5 for i in range(9)]
    assert not torch.isnan(grad_x[~rows]).any()


def test_same_bits_on_repeat_and_without_gradients(device: str) -> None:
    networks, activations = make_networks([6, 20, 2])
    x, grad_y = torch.randn(20, 6), torch.randn(1, 20, 2)
    first, second = (run(x, networks, activations, grad_y, "triton", device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    on_device = [[p.to(device) for p in n] for n in networks]
    y = ops.mlp_ensemble(x.to(device), on_device, activations, backend="triton")
    assert torch.equal(y.cpu(), first[0])


def test_only_wanted_gradients(device: str) -> None:
    networks, activations = make_networks([6, 20, 2])
    x, grad_y = torch.randn(20, 6), torch.randn(1, 20, 2)
    _, grad_x, *grads = run(x, networks, activations, grad_y, "triton", device)
    x, weight = x.to(device), networks[0][0].to(device)
    [parameters] = [[p.to(device) for p in network] for network in networks]
    for leaf, expected in ((x, grad_x), (weight, grads[0])):
        leaf.requires_grad_()
        y = ops.mlp_ensemble(x, [[weight, *parameters[1:]]], activations, backend="triton")
        (grad,) = torch.autograd.grad(y, leaf, grad_y.to(device))
        assert torch.equal(grad.cpu(), expected)
        leaf.requires_grad_(False)


def test_second_derivative_is_refused(device: str) -> None:
    networks, activations = make_networks([3, 4, 2])
    x = torch.randn(5, 3, device=device, requires_grad=True)
    parameters = [p.to(device) for p in networks[0]]
    y = ops.mlp(x, parameters[::2], parameters[1::2], activations, backend="triton")
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*backend='reference'"):
        slope.sum().backward()


# -- as a part of PyTorch --------------------------------------------------------------------------


def test_opcheck(device: str) -> None:
    networks, _ = make_networks([4, 8, 3], networks=2)
    parameters = [p.to(device) for p in itertools.chain(*networks)]
    x, settings = torch.randn(5, 4, device=device), ("float32", "triton")
    for keep in (True, False):
        arguments: Any = (x, parameters, "mish,identity", keep, *settings)
        torch.library.opcheck(native.forward.overload, arguments)
    y, saved = native.forward(x, parameters, "mish,identity", True, *settings)
    arguments = (torch.randn_like(y), x, saved, parameters, "mish,identity", True, True)
    torch.library.opcheck(native.backward.overload, (*arguments, *settings))


def test_compiles_whole_and_maps(device: str) -> None:
    networks, activations = make_networks([4, 8, 3])
    parameters = [p.to(device).requires_grad_() for p in networks[0]]

    def loss(x: Tensor) -> Tensor:
        y = ops.mlp(x, parameters[::2], parameters[1::2], activations, backend="triton")
        return y.square().sum()

    x = torch.randn(6, 4, device=device, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(x), x)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(grad, expected)
    rows = torch.func.vmap(torch.func.grad(loss))(x.detach())
    torch.testing.assert_close(rows, expected)


def test_explains_itself(device: str) -> None:
    networks, activations = make_networks([4, 8, 3])
    weights, biases = ([p.to(device) for p in networks[0][i::2]] for i in (0, 1))
    x = torch.randn(6, 4, device=device)
    answer = explain("mlp", x, weights, biases, activations, backend="triton")
    assert answer.backend == "triton"
    with pytest.raises(ValueError, match="'triton' here: a tensor is torch.float64"):
        ops.mlp(x.double(), [w.double() for w in weights], [b.double() for b in biases],
                activations, backend="triton")  # fmt: skip


@pytest.mark.parametrize("wants_gradients", [False, True])
def test_squashed_gaussian_on_the_networks_kernel(device: str, wants_gradients: bool) -> None:
    [parameters], activations = make_networks([5, 20, 4], networks=1)
    leaves = [p.detach().to(device).requires_grad_(wants_gradients) for p in parameters]
    arguments = torch.randn(9, 5, device=device), leaves[::2], leaves[1::2], activations
    noise = torch.randn(9, 2, device=device)
    results = []
    for backend in ("triton", "reference"):
        action, log_prob = ops.squashed_gaussian(*arguments, noise, backend=backend)
        value = action.sum() + log_prob.sum()
        grads = torch.autograd.grad(value, leaves) if wants_gradients else ()
        results.append([action, log_prob, *grads])
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5)
