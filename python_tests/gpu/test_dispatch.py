"""Which backend takes a call on a GPU, on fake tensors: no GPU is needed to know."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import diffcore
from diffcore import DiffusionSchedule, nn, ops
from diffcore.ops import _backends, _native
from diffcore.ops.action_gradient import native as action_gradient
from diffcore.ops.reverse_diffusion import native as reverse_diffusion

SCHEDULE = DiffusionSchedule.linear(4)
DRIVER_LACKS = _backends._driver_lacks  # before a fixture replaces it
OPS = [
    "action_gradient",
    "denoising_loss",
    "mlp",
    "representation_loss",
    "reverse_diffusion",
    "reverse_step",
    "rff_features",
    "score_matching_loss",
]


Calls = dict[str, tuple[Any, ...]]


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """A call of every op, in a world where each has kernels of all kinds and the GPU runs them."""
    for op in OPS:
        module = importlib.import_module(f"diffcore.ops.{op}")
        monkeypatch.setattr(module, "KERNELS", ("cuda", "triton", "cpu"))
    monkeypatch.setattr(_native, "_cuda", SimpleNamespace(on_cpu=False))
    monkeypatch.setattr(_native, "cuda_unavailable", None)
    monkeypatch.setattr(_backends, "_has_triton", lambda: True)
    monkeypatch.setattr(_backends, "_device_lacks", lambda device: None)
    monkeypatch.setattr(_backends, "_driver_lacks", lambda index: None)
    monkeypatch.setattr(action_gradient, "why_not_cuda", lambda *sizes: None)
    monkeypatch.setattr(reverse_diffusion, "why_not_cuda", lambda *sizes: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    network, zeta = nn.MLP(5, 8, 3, 1), nn.MLP(4, 8, 3 * 3, 1)
    critic, denoiser = nn.TwinCritic(5, 3, 8), nn.Denoiser(5, 3, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (network, zeta, critic, denoiser):
            for child in module.modules():
                for name, parameter in list(child.named_parameters(recurse=False)):
                    moved = torch.nn.Parameter(torch.empty(parameter.shape, device="cuda"))
                    setattr(child, name, moved)
        yield on_the_gpu(network, zeta, critic, denoiser)


def on_the_gpu(
    network: nn.MLP, zeta: nn.MLP, critic: nn.TwinCritic, denoiser: nn.Denoiser
) -> Calls:
    def cuda(*shape: int) -> Tensor:
        return torch.empty(*shape, device="cuda")

    weights = [layer.weight for layer in network.layers]
    biases = [layer.bias for layer in network.layers]
    state, action = cuda(2, 5), cuda(2, 3)
    return {
        "action_gradient": (critic, state, action),
        "denoising_loss": (denoiser, SCHEDULE, state, action),
        "mlp": (state, weights, biases, ["mish", "identity"]),
        "representation_loss": (network, zeta, state, cuda(2, 4), action, cuda(2)),
        "reverse_diffusion": (denoiser, SCHEDULE, state),
        "reverse_step": (action, action, cuda(7)),
        "rff_features": (state, cuda(8, 5)),
        "score_matching_loss": (cuda(2, 4), state, cuda(12, 5), cuda(12), action, cuda(2)),
    }


@pytest.mark.parametrize("op", OPS)
def test_cuda_first_then_triton_then_the_reference(op: str, calls: Calls, monkeypatch: Any) -> None:
    answer = diffcore.explain(op, *calls[op])
    assert (answer.backend, answer.passed_over) == ("cuda", {})

    monkeypatch.setattr(_native, "cuda_unavailable", "the CUDA kernels weren't built")
    answer = diffcore.explain(op, *calls[op])
    assert answer.backend == "triton"
    assert answer.passed_over == {"cuda": "the CUDA kernels weren't built"}

    monkeypatch.setattr(_backends, "_has_triton", lambda: False)
    answer = diffcore.explain(op, *calls[op])
    assert answer.backend == "reference"
    assert answer.passed_over["triton"] == "Triton isn't installed"


@pytest.mark.parametrize("op", OPS)
def test_an_old_gpu_runs_the_reference(op: str, calls: Calls, monkeypatch: Any) -> None:
    reason = "cuda:0 has compute capability 7.5, 8.0 is the least"
    monkeypatch.setattr(_backends, "_device_lacks", lambda device: reason)
    answer = diffcore.explain(op, *calls[op])
    assert answer.backend == "reference"
    assert answer.passed_over == {"cuda": reason, "triton": reason}


def test_what_a_device_lacks_is_asked_once_and_asked_again_if_nobody_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A failure may pass: a call that meets it runs on another backend, those after it needn't."""
    answers = iter([RuntimeError("out of memory"), None, RuntimeError("asked once too often")])

    def unavailable() -> None:
        if (answer := next(answers)) is not None:
            raise answer

    monkeypatch.setattr(_native._cuda, "unavailable", unavailable, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    index = 1000  # that no other test asks about
    assert [DRIVER_LACKS(index) for _ in range(3)] == ["out of memory", None, None]


def test_other_dtypes_run_the_reference(calls: Calls) -> None:
    answer = diffcore.explain("rff_features", *(t.double() for t in calls["rff_features"]))
    assert answer.backend == "reference"
    reason = "a tensor is torch.float64, the {} kernels take float32"
    assert answer.passed_over == {"cuda": reason.format("CUDA"), "triton": reason.format("Triton")}


@pytest.mark.parametrize("op", ["action_gradient", "reverse_diffusion", "score_matching_loss"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpus_take_both_lower_precisions(op: str, calls: Calls, dtype: torch.dtype) -> None:
    assert diffcore.explain(op, *calls[op], compute_dtype=dtype).backend == "cuda"


def test_cpu_kernels_are_not_for_gpu_tensors(calls: Calls) -> None:
    with pytest.raises(ValueError, match="^backend: mlp can't run on 'cpu' here: .* on cuda:0"):
        diffcore.explain("mlp", *calls["mlp"], backend="cpu")


def test_gpu_kernels_are_not_for_cpu_tensors() -> None:
    with FakeTensorMode():
        x, omega = torch.empty(2, 5), torch.empty(8, 5)
        assert diffcore.explain("rff_features", x, omega).backend == "cpu"
        for backend in ("cuda", "triton"):
            with pytest.raises(ValueError, match=f"can't run on '{backend}' here: .* on cpu"):
                ops.rff_features(x, omega, backend=backend)


def test_autocast_on_a_gpu_chooses_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(2, device="cuda")
    assert _backends.precision(None, x) == "float32"
    # torch.autocast itself turns "cuda" off where there is none.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    assert _backends.precision(None, x) == "bfloat16"
    assert _backends.precision(torch.float16, x) == "float16"
    assert _backends.precision(torch.float32, x) == "float32"
    assert _backends.precision(None, torch.empty(2)) == "float32"


def test_tf32_only_where_torch_allows_it() -> None:
    x = torch.empty(2, device="cuda")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert _backends.precision(None, x) == "float32"
        torch.set_float32_matmul_precision("high")
        assert _backends.precision(None, x) == "tf32"
        assert _backends.precision(torch.float16, x) == "float16"
        assert _backends.precision(None, torch.empty(2)) == "float32"
    finally:
        torch.set_float32_matmul_precision(before)
