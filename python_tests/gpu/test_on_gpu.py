"""What only a GPU can show: capture in a CUDA graph, streams, and agreement of backends there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import DiffusionSchedule, nn, ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

Call = Callable[..., Tensor]


def calls() -> dict[str, Call]:
    """A call of every op on fixed inputs, by name; its argument is the backend."""
    torch.manual_seed(0)
    denoiser = nn.Denoiser(17, 6, 64).cuda().requires_grad_(False)
    critic = nn.TwinCritic(17, 6, 64).cuda().requires_grad_(False)
    schedule = DiffusionSchedule.cosine(10)
    state = torch.randn(33, 17, device="cuda")
    action = torch.rand(33, 6, device="cuda") * 2 - 1
    noise = torch.randn(10, 33, 6, device="cuda")
    omega, coefficients = torch.randn(40, 17, device="cuda"), torch.rand(7, device="cuda")
    mlp = nn.MLP(17, 64, 6).cuda().requires_grad_(False)
    weights, biases = ([getattr(layer, n) for layer in mlp.layers] for n in ("weight", "bias"))

    def chain(backend: str) -> Tensor:
        given = {"x_init": action, "noise": noise}
        return ops.reverse_diffusion(denoiser, schedule, state, backend=backend, **given)

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
    }


CASES = [
    (op, backend)
    for op in ("reverse_diffusion", "reverse_step", "action_gradient", "rff_features", "mlp")
    for backend in ("cuda", "triton")
    if (op, backend) != ("mlp", "cuda")
]


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
def test_agrees_with_the_reference(op: str, backend: str) -> None:
    call = calls()[op]
    torch.testing.assert_close(call(backend), call("reference"), rtol=1e-3, atol=1e-3)


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


def test_the_fastest_backend_is_chosen() -> None:
    state = torch.randn(3, 5, device="cuda")
    answer = diffcore.explain("rff_features", state, torch.randn(4, 5, device="cuda"))
    assert answer.backend == "cuda"
