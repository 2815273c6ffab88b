"""The same seed gives the same noise on all four backends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import DiffusionSchedule, nn, ops
from diffcore.schedule import SolverTable

#: x' = z: what comes out is the noise of the last step; with no steps' noise, x_init.
ONLY_NOISE = SolverTable(
    torch.tensor([2, 1]), torch.tensor([[0, 0, 0, 0, 0, 1, 0]] * 2, dtype=torch.float64)
)
ONLY_START = SolverTable(
    torch.tensor([2, 1]), torch.tensor([[0, 0, 0, 1, 0, 0, 0]] * 2, dtype=torch.float64)
)


@torch.no_grad()
@pytest.mark.parametrize("table", [ONLY_NOISE, ONLY_START], ids=["noise", "x_init"])
@pytest.mark.parametrize("seed", [0, 2**40 + 3])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (37, 6), (9, 33)])
def test_a_seed_s_noise(
    cuda: str, device: str, table: SolverTable, seed: int, rows: int, columns: int
) -> None:
    denoiser = nn.Denoiser(2, columns, 16, 1)
    schedule = DiffusionSchedule.linear(3)

    def drawn(backend: str, where: str) -> Tensor:
        options: dict[str, Any] = {"clip": math.inf, "solver": table, "backend": backend}
        generator = torch.Generator().manual_seed(seed)
        state = torch.zeros(rows, 2, device=where)
        return ops.reverse_diffusion(
            denoiser.to(where), schedule, state, generator=generator, **options
        ).cpu()

    expected = drawn("reference", "cpu")
    assert expected.abs().max() > 0.01
    for backend, where in (("cpu", "cpu"), ("triton", device), ("cuda", cuda)):
        torch.testing.assert_close(drawn(backend, where), expected, rtol=0, atol=1e-6)
