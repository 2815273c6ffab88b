"""Tests of the tests: do those of the ops notice faults in the CUDA sources, and bad accesses?

They run on the CPU in processes of their own, on altered copies of csrc/cuda or under
AddressSanitizer. The tile and the chain have more faults in test_cuda_emulator.py.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

import cuda_builds
import pytest
from conftest import ON_GPU
from processes import HERE, in_a_process, needs_asan, under_asan

pytestmark = pytest.mark.skipif(ON_GPU, reason="on a GPU nothing is emulated")

#: Tests of an op that are enough to notice a fault in it, as pytest's arguments.
ASCENT = (
    "test_cuda_action_gradient.py",
    "every_variant and alone and 16 or different_widths and (alone or cluster)",
)
#: The same in groups.
ASCENT_IN_GROUPS = (
    "test_cuda_action_gradient.py",
    "every_variant_in_groups and _of_ and adam and batch or different_widths and _of_8 and float16"
    " or unequal_shapes and _of_2",
)
ASCENT_OF_MANY = ("test_cuda_action_gradient.py", "norms_of_ties and alone")
CHAIN_IN_GROUPS = (
    "test_cuda_chain.py",
    "precision_in_groups and _of_ and (float32 or float16)"
    " or different_widths and _of_8 and float16 or fewer_clusters",
)
FEATURES = ("test_cuda_rff.py", "awkward_sizes or pieces or nothing_to_multiply")
STEP = ("test_cuda_chain.py", "reverse_step")


def pytest_arguments(tests: tuple[str, str]) -> list[str]:
    file, expression = tests
    # Nothing is captured: what a kernel that ends the process says would be lost.
    options = ["-q", "-x", "-s", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return ["-m", "pytest", *options, str(HERE / file), "-k", expression]


class Fault(NamedTuple):
    tests: tuple[str, str]
    file: str
    before: str
    after: str


FAULTS = {
    "no barrier after the actions were staged": Fault(
        ASCENT,
        "action_gradient.cu",
        "critic_.action_dim, staged, plan_.action_stride);\n    __syncthreads();",
        "critic_.action_dim, staged, plan_.action_stride);",
    ),
    "the grid doesn't meet before the actions move": Fault(
        ASCENT,
        "action_gradient.cu",
        "    wait_for_grid();\n    const Published",
        "    const Published",
    ),
    "the last tile has a row too many": Fault(
        ASCENT,
        "action_gradient.cu",
        "static_cast<int>(left < rows ? left : rows)",
        "static_cast<int>(left < rows ? left + 1 : rows)",
    ),
    "what a wider layer left behind stays": Fault(
        ASCENT,
        "action_gradient.cu",
        "      clear_padding(in, stride, forward ? layer.in : layer.out, weights.k);\n",
        "",
    ),
    "both critics' gradients are taken": Fault(
        ASCENT,
        "action_gradient.cu",
        "if (!(q2 < q1)) gradient -=",
        "gradient -=",
    ),
    "the norm is that of the other critic": Fault(
        ASCENT,
        "action_gradient.cu",
        "second ? both.squared_norm2 : both.squared_norm1",
        "second ? both.squared_norm1 : both.squared_norm2",
    ),
    "rows beyond the first thousand have no norm": Fault(
        ASCENT_OF_MANY,
        "action_gradient.cu",
        "first < p.batch; first += rows_at_once * block_threads",
        "first < block_threads; first += rows_at_once * block_threads",
    ),
    "slopes lie as the critic's own depth has it": Fault(
        ASCENT_IN_GROUPS,
        "action_gradient.cu",
        "plan.depth * rows * plan.width",
        "(critic_.layer_count - 1) * rows * plan.width",
    ),
    "the blocks of a group share their actions": Fault(
        ASCENT_IN_GROUPS,
        "action_gradient.cu",
        "return (2 * rank + item.critic) * plan",
        "return (0 * rank + item.critic) * plan",
    ),
    "the counters of a group's barriers begin anywhere": Fault(
        ASCENT_IN_GROUPS,
        "action_gradient.cu",
        "plan.group.counters[group.index()] = 0;",
        "plan.group.counters[group.index()] |= 0;",
    ),
    "a group begins before all its blocks have read their states": Fault(
        ASCENT_IN_GROUPS,
        "action_gradient.cu",
        "  group.start();\n",
        "",
    ),
    "the group's first block alone has a slice": Fault(
        ASCENT_IN_GROUPS,
        "group.cuh",
        "const int begin = rank * layer.slice;",
        "const int begin = 0 * rank;",
    ),
    "a block of a cluster keeps its columns to itself": Fault(
        ASCENT_IN_GROUPS,
        "group.cuh",
        "for (int r = 0; r < layout_.size; ++r) store_in_cluster",
        "for (int r = rank_; r == rank_; ++r) store_in_cluster",
    ),
    "a hidden layer leaves out columns that the next one reads": Fault(
        CHAIN_IN_GROUPS,
        "reverse_diffusion.cu",
        "round_up(p.trunk[l].out, k_step_of(p.precision))",
        "p.trunk[l].out",
    ),
    "of a first layer that all make whole blocks load a slice": Fault(
        CHAIN_IN_GROUPS,
        "reverse_diffusion.cu",
        "load_slice<float>(chain.layers[l], chain.share_first ? group.rank() : 0, shared)",
        "load_slice<float>(chain.layers[l], group.rank(), shared)",
    ),
    "of the last layer blocks load a slice": Fault(
        CHAIN_IN_GROUPS,
        "reverse_diffusion.cu",
        "(chain.layers[l], last ? 0 : group.rank(), shared)",
        "(chain.layers[l], group.rank() + 0 * last, shared)",
    ),
    "a first layer that all make whole has no buffer": Fault(
        CHAIN_IN_GROUPS,
        "reverse_diffusion.cu",
        "c.group.hidden_bytes * (c.share_first ? 2 : 3)",
        "c.group.hidden_bytes * 2",
    ),
    "a chain's groups begin with any count": Fault(
        CHAIN_IN_GROUPS,
        "reverse_diffusion.cu",
        "chain.group.counters[g] = 0;",
        "chain.group.counters[g] |= 0;",
    ),
    "a chain begins before all blocks have cleared their memory": Fault(
        CHAIN_IN_GROUPS,
        "reverse_diffusion.cu",
        "  group.start();\n",
        "",
    ),
    "a chain's clusters wait for each other": Fault(
        CHAIN_IN_GROUPS,
        "plan.cuh",
        "    if (at_once < plan.arguments.groups && !is_best(at_once)) return nullptr;\n",
        "",
    ),
    "a column too many of x is multiplied": Fault(
        FEATURES,
        "rff_features.cu",
        "row < rows && column < columns ?",
        "row < rows && column <= columns ?",
    ),
    "no barrier between loading a step and multiplying it": Fault(
        FEATURES,
        "gemm.cuh",
        "    __syncthreads();\n    if (k + depth < k_last) {",
        "    if (k + depth < k_last) {",
    ),
    "a launch of no blocks": Fault(
        FEATURES,
        "rff_features.cu",
        "  if (blocks == 0) return nullptr;\n  return launch",
        "  return launch",
    ),
    "without inputs phases have no gradient": Fault(
        FEATURES,
        "rff_features.cu",
        "const bool parameters = call.grad_omega || call.grad_bias;",
        "const bool parameters = call.grad_omega;",
    ),
    "the last number is left out": Fault(
        STEP,
        "reverse_step.cu",
        "j < call.count; ++j",
        "j < call.count - 1; ++j",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, tmp_path: Path) -> None:
    tests, file, before, after = FAULTS[fault]
    sources = cuda_builds.altered(file, [(before, after)], tmp_path / "cuda")
    result = in_a_process(*pytest_arguments(tests), CUDA_ON_CPU_SOURCES=str(sources))
    assert found(result), result.stdout + result.stderr


def found(result: subprocess.CompletedProcess[str]) -> bool:
    """Whether a test failed for what the kernel did, or the kernel ended the process."""
    if result.returncode < 0:  # by a signal: it wrote or read where it mustn't
        return True
    # By pytest's heading, for what follows it depends on the failure: a kernel that reads what
    # nobody wrote differs from run to run, and hypothesis reports that as a group of exceptions.
    said = result.stdout + result.stderr
    return result.returncode != 0 and ("= FAILURES =" in said or "cuda_on_cpu: " in said)


def test_unaltered_kernels_pass() -> None:
    for tests in (ASCENT, ASCENT_IN_GROUPS, ASCENT_OF_MANY, CHAIN_IN_GROUPS, FEATURES, STEP):
        result = in_a_process(*pytest_arguments(tests))
        assert result.returncode == 0, result.stdout + result.stderr


#: Fewer of them, alone and in groups of both kinds.
ASCENT_UNDER_ASAN = (
    ASCENT[0],
    "different_widths and (alone or _of_2 or _of_8) and (float32 or float16)",
)
CHAIN_UNDER_ASAN = (CHAIN_IN_GROUPS[0], ASCENT_UNDER_ASAN[1])


@needs_asan
@pytest.mark.parametrize(
    "tests",
    [ASCENT_UNDER_ASAN, CHAIN_UNDER_ASAN, FEATURES, STEP],
    ids=["ascent", "chain", "features", "step"],
)
def test_under_asan(tests: tuple[str, str]) -> None:
    flags = "-O1 -fsanitize=address,alignment -fno-sanitize-recover=all"
    result = under_asan(*pytest_arguments(tests), CUDA_ON_CPU_FLAGS=flags)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
