"""What only a GPU can show: capture in a CUDA graph, streams, and agreement of backends there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import DiffusionSchedule, nn, ops

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

Call = Callable[..., Tensor]


def calls(device: str = "cuda") -> dict[str, Call]:
    """A call of every op on fixed inputs, by name; its argument is the backend.

    The losses' results are themselves, times a number, and their gradients, in one vector.
    """
    torch.manual_seed(0)
    denoiser = nn.Denoiser(17, 6, 64).to(device).requires_grad_(False)
    critic = nn.TwinCritic(17, 6, 64).to(device).requires_grad_(False)
    schedule = DiffusionSchedule.cosine(10)
    state = torch.randn(33, 17, device=device)
    action = torch.rand(33, 6, device=device) * 2 - 1
    noise = torch.randn(10, 33, 6, device=device)
    omega, coefficients = torch.randn(40, 17, device=device), torch.rand(7, device=device)
    mlp = nn.MLP(17, 64, 6).to(device).requires_grad_(False)
    weights, biases = ([getattr(layer, n) for layer in mlp.layers] for n in ("weight", "bias"))
    t = torch.arange(33, device=device) % 10
    trained = nn.Denoiser(17, 6, 64).to(device)
    psi, zeta = nn.MLP(17, 64, 8, 1).to(device), nn.MLP(6, 64, 8 * 6, 1).to(device)
    critics = [nn.MLP(17, 64, 1).to(device) for _ in range(2)]
    last = torch.nn.Linear(64, 8 * 6).to(device)
    features = torch.randn(33, 8, device=device), torch.randn(33, 64, device=device)
    target, score_weight = torch.randn(33, 1, device=device), torch.rand(33, device=device)

    def chain(backend: str) -> Tensor:
        given = {"x_init": action, "noise": noise}
        return ops.reverse_diffusion(denoiser, schedule, state, backend=backend, **given)

    def with_gradients(loss: Tensor, *modules: torch.nn.Module) -> Tensor:
        scaled = -3 * loss
        parameters = [p for module in modules for p in module.parameters()]
        gradients = torch.autograd.grad(scaled, parameters)
        return torch.cat([part.detach().flatten() for part in (scaled, *gradients)])

    def denoising(backend: str) -> Tensor:
        given = {"t": t, "noise": noise[0], "weight": score_weight}
        loss = ops.denoising_loss(trained, schedule, state, action, backend=backend, **given)
        return with_gradients(loss, trained)

    def denoising_by_row(backend: str) -> Tensor:
        given = {"t": t, "noise": noise[0], "reduction": "none"}
        losses = ops.denoising_loss(trained, schedule, state, action, backend=backend, **given)
        return with_gradients(losses.square().sum(), trained)

    def score_matching(backend: str) -> Tensor:
        sources = (*features, last.weight, last.bias)
        loss = ops.score_matching_loss(*sources, action, score_weight, backend=backend)
        return with_gradients(loss, last)

    def representation(backend: str) -> Tensor:
        inputs = (state, action, noise[0], score_weight)
        loss = ops.representation_loss(psi, zeta, *inputs, backend=backend)
        return with_gradients(loss, psi, zeta)

    def of_critics(backend: str) -> Tensor:
        networks, names = [c.weights_and_biases() for c in critics], critics[0].activations
        given = {"weight": score_weight, "backend": backend}
        loss, _ = ops.critic_loss(state, networks, names, target, **given)
        return with_gradients(loss, *critics)

    return {
        "reverse_diffusion": chain,
        "reverse_step": lambda backend: ops.reverse_step(
            action, action, coefficients, backend=backend
        )[0],
        "action_gradient": lambda backend: ops.action_gradient(
            critic, state, action, steps=5, max_norm=0.1, backend=backend
        ),
        "rff_features": lambda backend: ops.rff_features(state, omega, backend=backend),
        "mlp": lambda backend: ops.mlp(state, weights, biases, mlp.activations, backend=backend),
        "q_sample": lambda backend: ops.q_sample(action, t, noise[0], schedule, backend=backend),
        "denoising_loss": denoising,
        "denoising_loss, by row": denoising_by_row,
        "score_matching_loss": score_matching,
        "representation_loss": representation,
        "critic_loss": of_critics,
    }


OPS_WITH_CUDA = ("reverse_diffusion", "reverse_step", "action_gradient", "rff_features")
OPS = (
    *OPS_WITH_CUDA,
    *("mlp", "q_sample"),
    *("denoising_loss", "denoising_loss, by row"),
    *("score_matching_loss", "representation_loss", "critic_loss"),
)
CASES = [(op, "cuda") for op in OPS_WITH_CUDA] + [(op, "triton") for op in OPS]


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """(graph, where its result lies)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@needs_gpu
@pytest.mark.parametrize(("op", "backend"), CASES)
def test_a_captured_call_gives_the_same_bits(op: str, backend: str) -> None:
    call = calls()[op]
    expected = call(backend)
    graph, result = captured(lambda: call(backend))
    for _ in range(3):
        result.zero_()
        graph.replay()
        assert torch.equal(result, expected)


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_agrees_with_the_reference(op: str, backend: str, device: str) -> None:
    """Without a GPU in Triton's interpreter, which shows that the calls captured here are right."""
    if backend == "cuda" and device == "cpu":
        pytest.skip("needs a GPU")
    call = calls(device)[op]
    torch.testing.assert_close(call(backend), call("reference"), rtol=1e-3, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_every_replay_draws_anew(backend: str) -> None:
    denoiser = nn.Denoiser(17, 6, 64).cuda().requires_grad_(False)
    schedule, state = DiffusionSchedule.cosine(10), torch.randn(33, 17, device="cuda")
    graph, result = captured(
        lambda: ops.reverse_diffusion(denoiser, schedule, state, backend=backend)
    )
    drawn = []
    for _ in range(2):
        graph.replay()
        drawn.append(result.clone())
    assert not torch.equal(*drawn)


@needs_gpu
@pytest.mark.parametrize(("op", "backend"), CASES)
def test_the_current_stream_is_used(op: str, backend: str) -> None:
    """On a stream that is still busy, a call waits for its inputs."""
    call = calls()[op]
    expected = call(backend)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        started = torch.cuda.current_stream().query()
        result = call(backend)
        assert not started
        assert not torch.cuda.current_stream().query(), "the call waited for the device"
    torch.cuda.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", OPS_WITH_CUDA)
def test_a_call_is_for_its_tensors_device(op: str) -> None:
    """Whichever is current, and stays so."""
    call = calls("cuda:1")[op]
    torch.testing.assert_close(call("cuda"), call("reference"), rtol=1e-3, atol=1e-3)
    assert torch.cuda.current_device() == 0


@needs_gpu
def test_the_fastest_backend_is_chosen() -> None:
    state = torch.randn(3, 5, device="cuda")
    answer = diffcore.explain("rff_features", state, torch.randn(4, 5, device="cuda"))
    assert answer.backend == "cuda"
