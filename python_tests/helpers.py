"""What several test files share: recorded data, networks in plain PyTorch, measured errors."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffcore import nn
from diffcore.ops import _native
from diffcore.schedule import DiffusionSchedule, SolverTable

GOLDEN = Path(__file__).parent / "golden"

#: Instruction sets of this machine, best first.
ISAS: list[str] = [] if _native._core is None else _native._core.available_isas()

#: Rows at and around which kernels change from one block of rows to another; up to 256.
BATCHES = (0, 1, 2, 3, 4, 5, 7, 8, 13, 15, 16, 17, 32, 33, 63, 64, 65, 130, 256)

#: Widths at which AMX, which takes 32 inputs at a time, has none of them whole, one, and a rest.
AMX_EDGES = (24, 40, 100)

#: The activations that have CPU kernels, as torch has them.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "elu": F.elu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "mish": F.mish,
    # Not F.gelu, which loses small values to cancellation, in float64 too.
    "gelu": lambda z: z * torch.special.erfc(-z / math.sqrt(2)) / 2,
    "sin": torch.sin,
    "cos": torch.cos,
}

#: Recorded samplers.
SAMPLERS = ("halfcheetah_k100", "hopper_k50", "pendulum_k20")

#: One step whose result is the predicted noise itself; with clip = inf it is returned as it is.
EPS_ONLY = SolverTable(
    torch.tensor([3]), torch.tensor([[0, 0, 0, 0, 1, 0, 0]], dtype=torch.float64)
)


# -- recorded data ---------------------------------------------------------------------------------


def load_golden(name: str) -> dict[str, Any]:
    """A file recorded from the released code: arrays as tensors, scalars as Python values."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: v.item() if v.ndim == 0 else torch.from_numpy(v) for key, v in file.items()}


def load_parameters(module: torch.nn.Module, golden: dict[str, Any], prefix: str) -> None:
    """Recorded weights, which lie in the file from input to output like ``parameters()``."""
    recorded = [value for key, value in golden.items() if key.startswith(prefix)]
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), recorded, strict=True):
            assert parameter.shape == value.shape
            parameter.copy_(value)


def golden_denoiser(golden: dict[str, Any]) -> nn.Denoiser:
    denoiser = nn.Denoiser(golden["state"].shape[1], golden["x_T"].shape[1])
    load_parameters(denoiser, golden, "model__")
    return denoiser


def golden_critic(golden: dict[str, Any]) -> nn.TwinCritic:
    critic = nn.TwinCritic(golden["state"].shape[1], golden["action"].shape[1])
    load_parameters(critic, golden, "critic__")
    return critic


# -- networks in plain PyTorch ---------------------------------------------------------------------


def plain_mlp(x: Tensor, parameters: list[Tensor], activation: str) -> Tensor:
    for layer in range(0, len(parameters), 2):
        x = F.linear(x, parameters[layer], parameters[layer + 1])
        if layer < len(parameters) - 2:
            x = ACTIVATIONS[activation](x)
    return x


def plain_denoiser(denoiser: nn.Denoiser, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The same function in eager PyTorch, in another precision."""
    parameters = [p.detach().to(dtype) for p in denoiser.parameters()]
    half = denoiser.time_dim // 2
    frequencies = torch.tensor([10000 ** (-i / max(half - 1, 1)) for i in range(half)]).double()

    def eps(x: Tensor, state: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * frequencies
        # Rounded to float32 as for the kernels, which get it as an input.
        embedding = torch.cat([angle.sin(), angle.cos()], dim=1).float().to(dtype)
        time = plain_mlp(embedding, parameters[:4], denoiser.activation)
        return plain_mlp(torch.cat([x, time, state], dim=1), parameters[4:], denoiser.activation)

    return eps


def plain_critic(critic: nn.TwinCritic, dtype: torch.dtype) -> Callable[..., Any]:
    parameters = [p.detach().to(dtype) for p in critic.parameters()]
    half = len(parameters) // 2

    def q(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([state, action], dim=1)
        return (
            plain_mlp(x, parameters[:half], critic.activation),
            plain_mlp(x, parameters[half:], critic.activation),
        )

    return q


def rounded(table: SolverTable) -> SolverTable:
    """Coefficients that float32 holds exactly, so that only the arithmetic's error is measured."""
    return SolverTable(table.timesteps, table.coefficients.float().double())


def float32_table(schedule: DiffusionSchedule) -> SolverTable:
    """DDPM's coefficients in float32 arithmetic, as the released code computes them."""
    beta = schedule.betas.float()
    alpha = 1 - beta
    abar = torch.cumprod(alpha, 0)
    before = torch.cat([torch.ones(1), abar[:-1]])
    log_variance = (beta * (1 - before) / (1 - abar)).clamp(min=1e-20).log()
    columns = [
        (1 / abar).sqrt(),
        (1 / abar - 1).sqrt(),
        beta * before.sqrt() / (1 - abar),
        (1 - before) * alpha.sqrt() / (1 - abar),
        torch.zeros_like(beta),
        (0.5 * log_variance).exp() * (torch.arange(schedule.K) > 0),
        torch.zeros_like(beta),
    ]
    table = schedule.solver("ddpm")
    return SolverTable(table.timesteps, torch.stack(columns, dim=1).flip(0).double())


# -- measured errors -------------------------------------------------------------------------------


def root_mean_square(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item()


def quantile(error: Tensor, q: float) -> float:
    flat = error.double().abs().flatten()
    return flat.kthvalue(max(1, math.ceil(q * flat.numel()))).values.item()


def assert_error_at_most_twice_eager(
    native: Tensor, eager: Tensor, exact: Tensor, *, amplified: bool = False
) -> None:
    """The kernels' error against float64 is at most twice that of eager float32.

    Compared are the 99% quantile and, unless the errors are amplified, the root mean square, over
    thousands of values. Not the largest single error: which of two implementations has it is
    chance, and where a chain divides by sqrt(abar), or Adam by sqrt(v), a rare row magnifies its
    rounding by orders of magnitude, in one implementation or in the other.
    """
    assert exact.dtype == torch.float64
    assert exact.numel() >= 1000
    assert torch.isfinite(native).all()
    of_native, of_eager = native - exact, eager - exact
    assert quantile(of_native, 0.99) <= 2 * quantile(of_eager, 0.99)
    if not amplified:
        assert root_mean_square(of_native) <= 2 * root_mean_square(of_eager)


# -- other processes -------------------------------------------------------------------------------


def run_script(source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python source in a process of its own, which ends within a minute, children included."""
    command = [sys.executable, "-c", source]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        cwd=Path(__file__).parent,  # not the source tree, which would hide the installed package
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@contextmanager
def torch_defaults(dtype: torch.dtype, device: str | None) -> Iterator[None]:
    """What tensors get that are made in this block without a dtype or device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


OTHER_DEFAULTS = [(torch.float64, None), (torch.bfloat16, None), (torch.float32, "meta")]
"""Defaults other than torch's own; nothing can be computed on the meta device."""
