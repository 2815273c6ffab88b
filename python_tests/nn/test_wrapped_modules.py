"""Networks inside torch's wrapping modules run on the kernels, used as README says."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import diffcore
from diffcore import DiffusionSchedule, ops
from diffcore.nn import Denoiser
from diffcore.ops import _native

SCHEDULE = DiffusionSchedule.cosine(5)
PROCESSES, ROWS = 2, 4


class DenoisingLoss(torch.nn.Module):
    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.backend = ""

    def forward(self, *batch: Tensor) -> Tensor:
        state, action, t, noise = batch
        arguments = (self.denoiser, SCHEDULE, state, action)
        self.backend = diffcore.explain("denoising_loss", *arguments, t=t, noise=noise).backend
        return ops.denoising_loss(*arguments, t=t, noise=noise)


def train_in_parallel(rank: int, rendezvous: Path) -> None:
    """One process: its rows of a batch, and the gradients of all of them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=rendezvous.as_uri(), rank=rank, world_size=PROCESSES
    )
    torch.manual_seed(0)
    denoiser, rows = Denoiser(4, 2, 16), PROCESSES * ROWS
    state, action, noise = (torch.randn(rows, width) for width in (4, 2, 2))
    batch = state, action, torch.randint(5, (rows,)), noise
    whole = copy.deepcopy(denoiser)
    DenoisingLoss(whole)(*batch).backward()

    loss = DenoisingLoss(denoiser)
    parallel = DistributedDataParallel(loss)
    own = slice(ROWS * rank, ROWS * (rank + 1))
    parallel(*(column[own] for column in batch)).backward()
    assert loss.backend == ("reference" if _native._core is None else "cpu")
    for parameter, expected in zip(denoiser.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_data_parallel_processes_have_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(
        train_in_parallel, args=(tmp_path / "rendezvous",), nprocs=PROCESSES
    )


@pytest.mark.skipif(_native._core is None, reason="needs the compiled module")
def test_an_averaged_denoiser_runs_on_the_kernels() -> None:
    denoiser, state, x_init = Denoiser(4, 2, 16), torch.randn(3, 4), torch.randn(3, 2)
    average = AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    before = [p.detach().clone() for p in denoiser.parameters()]
    average.update_parameters(denoiser)  # the first takes the weights over
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(1.0)
    average.update_parameters(denoiser)
    for parameter, old in zip(average.module.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old + 0.5)

    def act(network: torch.nn.Module, backend: str | None = None) -> Tensor:
        return ops.reverse_diffusion(
            network, SCHEDULE, state, x_init=x_init, noise_scale=0.0, backend=backend
        ).detach()

    torch.testing.assert_close(act(average.module, "cpu"), act(average))
