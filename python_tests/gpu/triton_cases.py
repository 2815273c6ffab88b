"""What users launch on the Triton backend, for the tests that compile it ahead of time.

A case calls an op's Triton functions as the op does, on tensors of the sizes that the agents here
have by default (networks 256 wide). Their values don't matter: nothing runs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor


class Case(NamedTuple):
    name: str
    #: "float32", "tf32", "bfloat16" or "float16".
    precision: str
    launch: Callable[[], object]
    #: Kernels that multiply matrices: on the tensor cores, in any precision but float32.
    matrix_kernels: tuple[str, ...] = ()


def parameters(*widths: int) -> list[Tensor]:
    """Weight, bias, weight, bias, ... of an MLP."""
    shapes = (((o, i), (o,)) for i, o in itertools.pairwise(widths))
    return [torch.empty(shape) for pair in shapes for shape in pair]


def mlp_cases() -> list[Case]:
    from diffcore.ops.mlp import triton

    def case(
        name: str, precision: str, batch: int, networks: int, activations: str, *widths: int
    ) -> Case:
        def launch() -> None:
            network = parameters(*widths)
            x = torch.empty(batch, widths[0])
            _, saved = triton.forward(x, network * networks, activations, True, precision)
            grad_y = torch.empty(networks, batch, widths[-1])
            triton.backward(grad_y, saved, network * networks, activations, True, True, precision)

        kernels = ("forward_kernel", "backward_kernel", "weight_gradient_kernel")
        return Case(name, precision, launch, kernels)

    critics = (2, "mish,mish,identity", 23, 256, 256, 1)
    # With 16, 32 and 64 rows a program; tf32 has no 64.
    sizes = {
        "float32": (256, 4096, 8192),
        "tf32": (256, 4096),
        "bfloat16": (256, 4096, 8192),
        "float16": (256,),
    }
    return [
        case(f"critics in {precision}, batch {batch}", precision, batch, *critics)
        for precision, batches in sizes.items()
        for batch in batches
    ]


def rff_cases() -> list[Case]:
    from diffcore.ops.rff_features import triton

    def case(kind: str, precision: str, batch: int, fan_in: int) -> Case:
        def launch() -> None:
            x, omega, bias = torch.empty(batch, fan_in), torch.empty(512, fan_in), torch.empty(512)
            y, slopes = triton.forward(x, omega, bias, kind, 1.0, True, precision)
            saved = y if kind == "cos_sin" else slopes
            wanted = (True, True, True)
            triton.backward(torch.empty_like(y), x, omega, saved, kind, *wanted, precision)

        kernels = ("forward_kernel", "backward_kernel", "weight_gradient_kernel")
        return Case(f"{kind}, {precision}", precision, launch, kernels)

    return [
        case("sin", "float32", 256, 256),
        case("cos_sin", "tf32", 8192, 23),
        case("cos", "bfloat16", 256, 256),
        case("sin", "float16", 256, 256),
    ]


def score_matching_cases() -> list[Case]:
    from diffcore.ops.score_matching_loss import triton

    def case(precision: str, batch: int) -> Case:
        def launch() -> None:
            features, state, hidden = 256, 17, 512
            shapes = [(batch, features), (batch, hidden), (features * state, hidden)]
            sources = [torch.empty(shape) for shape in (*shapes, (features * state,))]
            others = torch.empty(batch, state), torch.empty(batch)
            grads = [torch.empty_like(t) for t in sources]
            loss, wanted = torch.empty(()), [True] * 4
            tensors = [*sources, *others, loss, *grads]
            triton.loss_and_gradients(*tensors, wanted=wanted, precision=precision)

        kernels = ("score_kernel", "hidden_kernel", "weight_kernel")
        return Case(f"{precision}, batch {batch}", precision, launch, kernels)

    return [
        case("float32", 256),
        case("tf32", 256),
        case("bfloat16", 2048),
        case("float16", 256),
    ]


def denoising_cases() -> list[Case]:
    from diffcore import nn
    from diffcore.ops.denoising_loss import triton

    batch, state, action = 256, 17, 6

    def launch(
        precision: str = "float32", weight: torch.Tensor | None = None, per_row: bool = False
    ) -> None:
        denoiser = nn.Denoiser(state, action, hidden_layers=2)
        inputs = [torch.empty(batch, state), *(torch.empty(batch, action) for _ in range(2))]
        levels = torch.empty(batch, dtype=torch.int64), torch.empty(100, 2), torch.empty(100, 32)
        parameters = [p.detach() for p in denoiser.weights_and_biases()]
        grads = [torch.empty_like(t) for t in (*inputs[:2], *parameters)]
        wanted = [True] * len(grads)
        settings = (per_row, grads, wanted, parameters, precision)
        triton.loss_and_gradients(*inputs, weight, *levels, "mish", *settings)
        triton.normals(torch.tensor(1), inputs[1])

    weights, kernels = torch.empty(batch), ("rows_kernel", "weight_gradient_kernel")
    weighted = functools.partial(launch, weight=weights)
    by_row = functools.partial(launch, "float32", weights, True)
    lower = ("tf32", "bfloat16", "float16")
    return [
        Case("update", "float32", launch, kernels),
        Case("update, weighted", "float32", weighted, kernels),
        Case("update by row", "float32", by_row, kernels),
        *(Case(f"update in {p}", p, functools.partial(launch, p), kernels) for p in lower),
    ]


def on_132_processors(launch: Callable[[], object]) -> Callable[[], object]:
    """As on an H100: block sizes depend on it."""

    def launch_there() -> None:
        with mock.patch("diffcore.ops._triton.processors", return_value=132):
            launch()

    return launch_there


def reverse_diffusion_cases() -> list[Case]:
    from diffcore.ops.reverse_diffusion import triton

    def case(precision: str, batch: int, *, drawn: bool = True) -> Case:
        def launch() -> None:
            state, action, steps = 17, 6, 100
            trunk = parameters(action + 32 + state, 256, 256, 256, action)
            triton.reverse_diffusion(
                torch.empty(batch, state),
                None if drawn else torch.empty(batch, action),
                None if drawn else torch.empty(steps, batch, action),
                torch.tensor(2**40) if drawn else None,
                [*parameters(32, 64, 32), *trunk],
                torch.empty(steps, 7),
                torch.empty(steps, 32),
                1.0,
                1.0,
                "mish",
                precision,
                None if drawn else torch.empty(steps + 1, batch, action),
                torch.empty(batch, action),
            )

        name = f"{precision}, batch {batch}"
        return Case(name, precision, on_132_processors(launch), ("chain_kernel",))

    return [
        case("float32", 256),
        case("bfloat16", 256, drawn=False),
        case("bfloat16", 4096),
        case("float32", 4096, drawn=False),
        case("tf32", 4096),
        case("float16", 4096),
    ]


def action_gradient_cases() -> list[Case]:
    from diffcore.ops.action_gradient import triton

    def case(precision: str, batch: int, clip_mode: str = "batch") -> Case:
        def launch() -> None:
            state, action = 17, 6
            triton.action_gradient(
                torch.empty(batch, state),
                torch.empty(batch, action),
                *(parameters(state + action, 256, 256, 256, 1) for _ in range(2)),
                "mish",
                precision,
                20,
                0.03,
                0.1,
                clip_mode,
                "adam",
                1e-5,
                -1.0,
                1.0,
                torch.empty(batch, action),
            )

        name = f"{precision}, batch {batch}"
        return Case(name, precision, on_132_processors(launch), ("ascent_kernel",))

    return [
        case("float32", 256),
        case("tf32", 256),
        case("float32", 4096, "row"),
        case("bfloat16", 256),
        case("bfloat16", 4096),
        case("float16", 256),
    ]


def elementwise_cases(op: str) -> list[Case]:
    def step() -> None:
        from diffcore.ops.reverse_step import triton

        x = torch.empty(256, 6)
        triton.reverse_step(x, x, torch.rand(7), x, x, 1.0, 1.0, x, x)

    def corruption() -> None:
        from diffcore.ops.q_sample import triton

        x, t = torch.empty(256, 6), torch.zeros(256, dtype=torch.int64)
        triton.q_sample(x, t, x, torch.empty(100, 2), x)

    return [Case("batch 256", "float32", step if op == "reverse_step" else corruption)]


CASES: dict[str, Callable[[], list[Case]]] = {
    "action_gradient": action_gradient_cases,
    "denoising_loss": denoising_cases,
    "mlp": mlp_cases,
    "q_sample": functools.partial(elementwise_cases, "q_sample"),
    "reverse_diffusion": reverse_diffusion_cases,
    "reverse_step": functools.partial(elementwise_cases, "reverse_step"),
    "rff_features": rff_cases,
    "score_matching_loss": score_matching_cases,
}
