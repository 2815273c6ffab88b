"""How often Triton compiles a kernel for one network, whatever the batches that it gets.

Each compilation takes a second within some call. Triton keeps them, in memory and on disk.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import fake_gpu
from fake_gpu import Launch
from triton_cases import CASES

_triton = fake_gpu.triton_module()

#: Configurations of a kernel: by rows of a block, of which there are three (``row_settings`` and
#: ``rows_per_program``); by whether sums over the batch are cut into parts; by groups of
#: coordinates, up to MOST_GROUPS.
MOST = {
    "add_kernel": 8,
    "add_parts_kernel": 1,
    "ascent_kernel": 3,
    "backward_kernel": 3,
    "chain_kernel": 3,
    "forward_kernel": 3,
    "hidden_kernel": 8,
    "normals_kernel": 1,
    "q_sample_kernel": 1,
    "round_kernel": 1,
    "rows_kernel": 3,
    "score_kernel": 8,
    "step_kernel": 1,
    "transpose_kernel": 1,
    "weight_gradient_kernel": 2,
    "weight_kernel": 1,
}

#: Between the sizes at which something changes, among them odd ones.
BATCHES = [1, 7, 16, 256, 1000, 1057, 1216, 1500, 2112, 2816, 4224, 8448, 20_000, 100_000]

#: Those with Triton kernels of their own, and several networks at once.
OPS = [*CASES, "mlp_ensemble"]
PRECISIONS = ["float32", "tf32", "bfloat16", "float16"]


def launches(op: str, batch: int, precision: str) -> list[Launch]:
    dtype = getattr(torch, precision, None)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with fake_gpu.fake_gpu() as made:
            fake_gpu.call(op, "triton", batch, dtype)
    finally:
        torch.set_float32_matmul_precision(before)
    return made


def too_many(op: str, precision: str) -> dict[str, int]:
    """Compilations of the kernels that are compiled more often than allowed."""
    compiled: defaultdict[str, set[Hashable]] = defaultdict(set)
    calls: Counter[str] = Counter()  # in one call of the op, each with a network of its own
    for batch in BATCHES:
        made = launches(op, batch, precision)
        calls |= Counter(launch.kernel for launch in made)
        for launch in made:
            compiled[launch.kernel].add(launch.compiled_for)
    assert compiled
    return {k: len(v) for k, v in compiled.items() if len(v) > calls[k] * MOST[k]}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("op", OPS)
def test_few_configurations_for_all_batches(op: str, precision: str) -> None:
    assert not too_many(op, precision)


@pytest.mark.usefixtures("device")
def test_every_kernel_is_counted() -> None:
    precisions = ("float32", "tf32")  # of which each has kernels that the other does without
    kernels = {launch.kernel for op in OPS for p in precisions for launch in launches(op, 5000, p)}
    assert kernels == {*MOST}


@pytest.mark.usefixtures("device")
def test_a_block_size_for_every_batch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "rows_per_program", lambda batch, *_: batch)
    assert too_many("reverse_diffusion", "float32").keys() == {"chain_kernel"}


@pytest.mark.usefixtures("device")
def test_a_number_that_triton_specializes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the batch would be, for being 1 or a multiple of 16."""
    from diffcore.ops.q_sample.triton import q_sample_kernel

    kernel: Any = q_sample_kernel
    exempt = kernel.kwargs if hasattr(kernel, "kwargs") else vars(kernel)
    monkeypatch.setitem(exempt, "do_not_specialize", [])
    assert too_many("q_sample", "float32").keys() == {"q_sample_kernel"}
