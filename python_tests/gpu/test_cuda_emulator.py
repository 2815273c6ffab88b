"""The CPU that plays the GPU (csrc/cuda/testing/cuda_on_cpu.h): does it do what a GPU does, does it
refuse what a GPU only sometimes gets away with, and do the checks of the kernels notice faults?"""

from __future__ import annotations

import ctypes
import functools
import shutil
from pathlib import Path

import cuda_builds
import emulated
import numpy as np
import pytest
import torch
from conftest import ON_GPU
from processes import in_a_process, needs_asan, under_asan

pytestmark = pytest.mark.skipif(ON_GPU, reason="on a GPU nothing is emulated")

ASAN_FLAGS = ("-O0", "-g", "-fsanitize=address,alignment", "-fno-sanitize-recover=all")


@functools.cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(emulated.build("linear")))


def ints(count: int, *values: int) -> np.ndarray:
    out = np.full(count, -1, np.int32)
    out[: len(values)] = values
    return out


def run(name: str, out: np.ndarray) -> np.ndarray:
    getattr(library(), name)(emulated.address(out))
    return out


# -- numbers and tensor cores ----------------------------------------------------------------------

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def rounded(precision: str, x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    code = emulated.PRECISIONS[precision]
    library().rounded(code, len(x), emulated.address(x), emulated.address(y))
    return y


@pytest.mark.parametrize("precision", DTYPES)
def test_rounding_is_torch_s(precision: str) -> None:
    """To nearest, ties to even, from subnormal numbers to infinity."""
    x = torch.cat([torch.randn(2000) * 10.0**e for e in range(-9, 8)])
    ties = 1 + torch.arange(4096) / 2**12
    limits = torch.tensor([0.0, -0.0, 65504.0, 65519.0, 65520.0, 2.0**-25, 2.0**-24, 6e-8, 1e38])
    x = torch.cat([x, ties, ties * 2.0**-16, limits, -limits, torch.tensor([float("inf")])])
    expected = x.to(DTYPES[precision]).float().numpy()
    np.testing.assert_array_equal(rounded(precision, x.numpy()), expected)


def test_rounding_to_tf32() -> None:
    """10 bits of mantissa, ties away from zero."""
    x = np.array([1, 1 + 2**-11, 1 + 3 * 2**-12, 1 + 2**-12, -1 - 2**-11, 0], np.float32)
    expected = [1, 1 + 2**-10, 1 + 2**-10, 1, -1 - 2**-10, 0]
    np.testing.assert_array_equal(rounded("tf32", x), np.array(expected, np.float32))


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
def test_mma_is_a_matrix_product(
    monkeypatch: pytest.MonkeyPatch, lanes: str, precision: str
) -> None:
    """Fragments filled by PTX's formulas, numbers that every precision holds exactly."""
    rng = np.random.default_rng(0)
    k = 8 if precision == "tf32" else 16
    for _ in range(5):
        a, b = (rng.integers(-15, 16, shape).astype(np.float32) / 8 for shape in ((16, k), (k, 8)))
        d = np.full((16, 8), np.nan, np.float32)
        library().multiply(
            emulated.PRECISIONS[precision], *(emulated.address(array) for array in (a, b, d))
        )
        np.testing.assert_array_equal(d, a @ b)


# -- lanes, blocks, copies -------------------------------------------------------------------------


def test_shuffles_of_a_part_of_the_warp(lanes: str) -> None:
    out = run("shuffle", ints(32))
    assert (out[:20] == sum(range(20))).all()
    assert out[20:].tolist() == [lane ^ 1 for lane in range(20, 32)]


def test_shuffles_within_groups_of_eight(lanes: str) -> None:
    up, down, xor, broadcast = run("shuffle_groups", ints(128)).reshape(4, 32).tolist()
    for lane in range(32):
        group, i = lane // 8 * 8, lane % 8
        assert up[lane] == (lane - 3 if i >= 3 else lane)
        assert down[lane] == (lane + 3 if i < 5 else lane)
        assert xor[lane] == min(lane, lane ^ 8)  # earlier groups can be read, later ones not
        assert broadcast[lane] == group + 3


def test_blocks_of_a_cluster_write_to_each_other(lanes: str) -> None:
    assert run("pass_on", ints(8)).tolist() == [3, 0, 1, 2, 7, 4, 5, 6]


def test_blocks_of_a_cooperative_launch_run_at_the_same_time(lanes: str) -> None:
    """The last block goes first, whatever the order in which they start."""
    assert run("take_turns", ints(1, 0))[0] == 5


def test_copies_arrive_when_they_are_waited_for(lanes: str) -> None:
    early = run("read_early", ints(6, 11))
    assert early[4] == -1  # all bits set, as shared memory is at the start
    assert early[5] == 11
    assert run("copy_in_order", ints(11, 1, 1, 1, 1, 2))[8:].tolist() == [1, -1, 2]


def test_a_missing_barrier_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for order in ("forward", "reverse"):
        monkeypatch.setenv("CUDA_ON_CPU_LANES", order)
        results.append(run("race", ints(32)).tolist())
    assert results[0] != results[1]
    assert list(range(31, -1, -1)) not in results


def test_a_launch_needs_blocks() -> None:
    launch = library().launch_of_nothing
    launch.restype = ctypes.c_char_p
    assert launch() == b"invalid configuration argument"


# -- what ends the process -------------------------------------------------------------------------


BREAK = """
import ctypes, sys
out = (ctypes.c_int * 16)()
getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])(out)
"""


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("divergent", "threads of one barrier came to different places"),
        ("deadlock", "deadlock: every thread waits for one that doesn't come"),
        ("poll_for_ever", "polls for ever"),
        ("misaligned", "cp.async: an address isn't a multiple of the size"),
        ("unfinished", "a cp.async was never waited for"),
        ("foreign_lane", "a shuffle reads from a lane outside its mask"),
    ],
)
def test_broken_rules_are_named(lanes: str, kernel: str, message: str) -> None:
    result = in_a_process("-c", BREAK, emulated.build("linear"), kernel)
    assert result.returncode < 0
    assert message in result.stderr


def test_no_clusters_before_compute_capability_9() -> None:
    device = {"CUDA_ON_CPU_DEVICE": "108,166912,8"}
    result = in_a_process("-c", BREAK, emulated.build("linear"), "pass_on", **device)
    assert result.returncode < 0
    assert "clusters exist from compute capability 9.0 on" in result.stderr


# -- hosts -----------------------------------------------------------------------------------------

ARM_TOOLS = ("aarch64-linux-gnu-g++", "qemu-aarch64")  # Debian's g++-aarch64-linux-gnu, qemu-user
needs_arm = pytest.mark.skipif(
    not all(map(shutil.which, ARM_TOOLS)), reason=f"needs {' and '.join(ARM_TOOLS)}"
)


@needs_arm
def test_arm_hosts_compute_the_same_bits(lanes: str, tmp_path: Path) -> None:
    """Fibers, barriers, clusters, copies and mma on an emulated ARM processor as on this one."""
    printed = []
    for compiler, *runner in (("g++",), ARM_TOOLS):
        program = tmp_path / compiler
        flags = [*cuda_builds.CPU_FLAGS, "-static", f"-I{cuda_builds.CUDA}"]
        sources = [emulated.HERE / "emulator_kernels.cu", emulated.HERE / "host_prints.cpp"]
        cuda_builds.run([compiler, *flags, "-x", "c++", *sources, "-o", program])
        printed.append(cuda_builds.run([*runner, program]))
    assert printed[0] == printed[1]
    assert printed[0].count("linear") == 24


@needs_arm
@pytest.mark.parametrize("source", cuda_builds.kernel_sources(), ids=lambda path: path.stem)
def test_kernels_compile_for_arm_hosts(source: Path) -> None:
    cuda_builds.run([ARM_TOOLS[0], *cuda_builds.CPU_FLAGS, "-fsyntax-only", "-x", "c++", source])


# -- AddressSanitizer ------------------------------------------------------------------------------


@needs_asan
def test_asan_sees_the_end_of_shared_memory() -> None:
    path = emulated.build("linear", flags=ASAN_FLAGS)
    result = under_asan("-c", BREAK, path, "beyond_shared")
    assert "heap-buffer-overflow" in result.stderr


@needs_asan
@pytest.mark.parametrize("check", emulated.CHECKS)
def test_kernels_under_asan(check: str) -> None:
    path = emulated.build(check, flags=ASAN_FLAGS)
    result = under_asan(emulated.HERE / "emulated.py", path, check)
    assert result.returncode == 0, result.stderr[-4000:]


# -- tests of the tests ----------------------------------------------------------------------------


def fails(check: str, directory: Path) -> bool:
    """Whether a check notices something, with the lanes in one order or the other."""
    path = emulated.build(check, directory, ("-O0",))
    for order in ("forward", "reverse"):
        result = in_a_process(emulated.HERE / "emulated.py", path, check, CUDA_ON_CPU_LANES=order)
        if result.returncode != 0:
            named = ("AssertionError", "cuda_on_cpu: ")
            by_signal = result.returncode < 0  # it wrote or read where it mustn't
            assert by_signal or any(name in result.stderr for name in named), result.stderr
            return True
    return False


@pytest.mark.parametrize("check", emulated.CHECKS)
def test_unaltered_kernels_pass(check: str, tmp_path: Path) -> None:
    assert not fails(check, cuda_builds.altered("tile.cuh", [], tmp_path / "cuda"))


FAULTS = {
    "no barrier before the sums of several warps are added": (
        "linear",
        "tile.cuh",
        [("    } else {\n      __syncthreads();\n    }", "    }")],
    ),
    "copies aren't waited for": (
        "linear",
        "tile.cuh",
        [("      wait_for_copies<Math::stages - 2>();\n", "")],
    ),
    "lanes don't wait for the other lanes' copies": (
        "linear",
        "tile.cuh",
        [
            (
                "      wait_for_copies<Math::stages - 2>();\n      __syncwarp();",
                "      wait_for_copies<Math::stages - 2>();",
            )
        ],
    ),
    "A's registers a1 and a2 are swapped": (
        "linear",
        "tile.cuh",
        [("word(lower, t), word(upper, t + 4)", "word(upper, t + 4), word(lower, t)")],
    ),
    "B's registers are swapped": (
        "linear",
        "tile.cuh",
        [
            (
                "b[j][0] = word(w + 8 * j * w_stride + k, t);",
                "b[j][1] = word(w + 8 * j * w_stride + k, t);",
            ),
            (
                "b[j][1] = word(w + 8 * j * w_stride + k, t + 4);",
                "b[j][0] = word(w + 8 * j * w_stride + k, t + 4);",
            ),
        ],
    ),
    "a row too many is finished": (
        "linear",
        "tile.cuh",
        [("row < row_count; row +=", "row <= row_count; row +=")],
    ),
    "the last columns are masked one pair too late": (
        "linear",
        "tile.cuh",
        [("+ column < w.columns) {", "+ column <= w.columns) {")],
    ),
    "the last tile has a row too many": (
        "chain",
        "reverse_diffusion.cu",
        [
            (
                "row_count_ = left < rows ? static_cast<int>(left) : rows;",
                "row_count_ = left < rows ? static_cast<int>(left) + 1 : rows;",
            )
        ],
    ),
    "no barrier between a step and the next": (
        "chain",
        "reverse_diffusion.cu",
        [
            (
                "      last_layer(step, hidden, solver);\n      __syncthreads();",
                "      last_layer(step, hidden, solver);",
            )
        ],
    ),
    "blocks of a cluster don't wait for each other": (
        "chain",
        "group.cuh",
        [
            (
                "case Exchange::cluster: wait_for_cluster(); break;",
                "case Exchange::cluster: __syncthreads(); break;",
            )
        ],
    ),
    "no wait at the software barrier": (
        "chain",
        "group.cuh",
        [("while (load_acquire(&layout_.counters[index_]) < arrivals_) poll();", "")],
    ),
    "exchanges don't take turns": (
        "chain",
        "group.cuh",
        [("    turn_ ^= 1;\n", "")],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, tmp_path: Path) -> None:
    check, file, change = FAULTS[fault]
    assert fails(check, cuda_builds.altered(file, change, tmp_path / "cuda"))
