"""What the launchers make of CUDA's answers: its errors above all, which no emulation of kernels has.

csrc/cuda/runtime.cuh and device.cu run here against a runtime whose calls fail as told
(csrc/cuda/testing/runtime).
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cuda_builds
import pytest
from conftest import ON_GPU

pytestmark = pytest.mark.skipif(ON_GPU, reason="on a GPU CUDA's own runtime answers")

CALLS = Path(__file__).parent / "runtime_calls.cu"
FLAGS = [flag for flag in cuda_builds.CPU_FLAGS if "DIFFCORE_CUDA_ON_CPU" not in flag]

OUT_OF_MEMORY, NO_DEVICE, NO_KERNEL_IMAGE = 2, 100, 209

#: Dynamic shared memory for which a kernel's attribute has to be set before.
MUCH_SHARED_MEMORY = 100_000


class Library:
    """A process's view of the kernels' host side, in which nothing was asked yet."""

    def __init__(self, directory: Path, tmp_path: Path) -> None:
        sources = [CALLS, directory / "device.cu"]
        key = cuda_builds.digest(FLAGS, files=[*sources, *cuda_builds.headers(directory)])
        built = cuda_builds.BUILD / "fake_runtime" / f"{key}.so"
        if not built.exists():
            built.parent.mkdir(parents=True, exist_ok=True)
            includes = [f"-I{directory}", f"-I{directory / 'testing' / 'runtime'}"]
            compiler = [os.environ.get("CXX", "g++"), *FLAGS, *includes, "-shared", "-x", "c++"]
            cuda_builds.make(built, [*compiler, *sources, "-o"])
        # What a process keeps of the answers, each copy of the library has for itself.
        self._copy = tmp_path / "library.so"
        self._library = ctypes.CDLL(shutil.copy(built, self._copy))

    def forget(self) -> None:
        """Begins anew, as another process would."""
        self._copy = Path(shutil.copy(self._copy, self._copy.with_suffix(".another.so")))
        self._library = ctypes.CDLL(str(self._copy))

    def text(self, name: str, *args: object) -> str | None:
        """A function's result: what went wrong, or None."""
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        result: bytes | None = function(*args)
        return None if result is None else result.decode()

    def unavailable(self) -> tuple[str | None, str | None]:
        """(why kernels can't run, what went wrong when that was to be found out)"""
        reason = ctypes.c_char_p()
        error = self.text("why_unavailable", ctypes.byref(reason))
        return None if reason.value is None else reason.value.decode(), error

    def fail(self, call: str, error: int) -> None:
        """Has a call of the runtime end in this error; with 0 none does."""
        self._library.fail(call.encode(), error)

    def device(self) -> tuple[list[int], str | None]:
        """([multiprocessors, bytes of shared memory, whether there are clusters], what went wrong)"""
        out = (ctypes.c_int * 3)()
        error = self.text("device_of_launchers", out)
        return list(out), error

    def set_architectures(self, major: int, compiled: int) -> None:
        """Of the device, and that for which the kernels were compiled."""
        self._library.set_architectures(major, compiled)

    def set_driver(self, version: int) -> None:
        self._library.set_driver(version)

    def calls_of(self, call: str) -> int:
        count: int = self._library.calls_of(call.encode())
        return count

    def last_error(self) -> int:
        error: int = self._library.last_error()
        return error


# -- errors ----------------------------------------------------------------------------------------


def an_error_is_reported_once(library: Library) -> None:
    """Or who asks for the last error next would take it for that of a call of their own."""
    launch = ("launched", 1, MUCH_SHARED_MEMORY)
    for call in ("cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaLaunchKernelExC"):
        library.fail(call, OUT_OF_MEMORY)
        assert library.text(*launch) == "out of memory"
        assert library.last_error() == 0
        library.fail(call, 0)
        assert library.text(*launch) is None
    assert library.text("launched", 0, 0) == "invalid configuration argument"
    assert library.last_error() == 0


def a_device_that_does_not_answer_leaves_no_error(library: Library) -> None:
    library.fail("cudaDeviceGetAttribute", OUT_OF_MEMORY)
    assert library.device()[1] == "out of memory"
    assert library.unavailable() == (None, "out of memory")
    assert library.last_error() == 0


def an_error_of_others_is_not_the_device_s(library: Library) -> None:
    """It says nothing about whether kernels can run."""
    library.fail("cudaSetDevice", OUT_OF_MEMORY)
    library.text("set_by_others")
    assert library.last_error() == OUT_OF_MEMORY
    assert library.unavailable() == (None, None)
    assert library.text("launched", 1, 0) is None


def clusters_that_nobody_can_count_are_an_error(library: Library) -> None:
    """And not none, with which a launcher would go on to another plan."""
    count = ctypes.c_int()
    for call in ("cudaFuncSetAttribute", "cudaOccupancyMaxActiveClusters"):
        library.fail(call, OUT_OF_MEMORY)
        assert library.text("clusters", ctypes.byref(count)) == "out of memory"
    library.fail("", 0)
    assert library.text("clusters", ctypes.byref(count)) is None
    assert count.value == 15


def a_plan_asks_once(library: Library) -> None:
    """Every call plans, and twice: for its workspace, and for its launch."""
    count = ctypes.c_int()
    questions = (
        "cudaDeviceGetAttribute",
        "cudaFuncGetAttributes",
        "cudaFuncSetAttribute",
        "cudaOccupancyMaxActiveClusters",
    )
    asked = []
    for _ in range(2):
        count.value = 0
        assert library.device() == ([132, 232448, 1], None)
        assert library.text("clusters", ctypes.byref(count)) is None
        assert count.value == 15
        asked.append([library.calls_of(question) for question in questions])
    assert asked[0] == asked[1]
    assert all(asked[0])


# -- devices ---------------------------------------------------------------------------------------


def a_device_needs_a_kernel_that_was_built_for_it(library: Library) -> None:
    assert library.unavailable() == (None, None)
    library.fail("cudaFuncGetAttributes", NO_KERNEL_IMAGE)
    no_image = "no kernel image is available for execution on the device"
    assert library.unavailable() == (no_image, None)


def clusters_are_for_kernels_that_were_compiled_for_them(library: Library) -> None:
    """PTX of before, compiled by the driver of a newer device, ends the process there."""
    for major, compiled, clusters in ((8, 80, 0), (9, 90, 1), (9, 80, 0), (10, 90, 1), (12, 89, 0)):
        library.forget()
        library.set_architectures(major, compiled)
        assert library.device() == ([132, 232448, clusters], None), (major, compiled)


def what_may_pass_is_no_reason(library: Library) -> None:
    for call in ("cudaDriverGetVersion", "cudaGetDevice", "cudaFuncGetAttributes"):
        library.fail(call, OUT_OF_MEMORY)
        assert library.unavailable() == (None, "out of memory")
    library.fail("cudaGetDevice", NO_DEVICE)
    assert library.unavailable() == ("no CUDA-capable device is detected", None)


def an_old_driver_is_named(library: Library) -> None:
    library.set_driver(0)
    assert library.unavailable() == ("no CUDA driver is installed", None)
    library.set_driver(12040)
    reason = "the driver knows CUDA 12.4, the kernels were built with 13.0"
    assert library.unavailable() == (reason, None)


Check = Callable[[Library], None]

CHECKS: list[Check] = [
    an_error_is_reported_once,
    a_device_that_does_not_answer_leaves_no_error,
    an_error_of_others_is_not_the_device_s,
    clusters_that_nobody_can_count_are_an_error,
    a_plan_asks_once,
    a_device_needs_a_kernel_that_was_built_for_it,
    clusters_are_for_kernels_that_were_compiled_for_them,
    what_may_pass_is_no_reason,
    an_old_driver_is_named,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_launchers(check: Check, tmp_path: Path) -> None:
    check(Library(cuda_builds.CUDA, tmp_path))


# -- tests of the tests ----------------------------------------------------------------------------


class Fault(NamedTuple):
    check: Check
    file: str
    before: str
    after: str


FAULTS = {
    "errors stay the last one": Fault(
        an_error_is_reported_once,
        "runtime.cuh",
        "  cudaGetLastError();\n  return cudaGetErrorString",
        "  return cudaGetErrorString",
    ),
    "the last error, whoever made it, is the device's": Fault(
        an_error_of_others_is_not_the_device_s,
        "device.cu",
        "  const char* failure = error_text(error);",
        "  error = cudaGetLastError();\n  const char* failure = error_text(error);",
    ),
    "nothing is kept": Fault(
        a_plan_asks_once,
        "device.cu",
        "answers_[key] = *answer;",
        "(void)key;",
    ),
    "nobody looks for a kernel": Fault(
        a_device_needs_a_kernel_that_was_built_for_it,
        "device.cu",
        "if (error == cudaSuccess) error = attributes_of_kernels(&attributes);",
        "attributes = {};",
    ),
    "clusters by the device alone": Fault(
        clusters_are_for_kernels_that_were_compiled_for_them,
        "device.cu",
        "kernels.ptxVersion >= 10 * first_major_with_clusters",
        "kernels.ptxVersion >= 0",
    ),
    "every error is for good": Fault(
        what_may_pass_is_no_reason,
        "device.cu",
        "    default: return false;",
        "    default: return error != cudaSuccess;",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, tmp_path: Path) -> None:
    check, file, before, after = FAULTS[fault]
    library = Library(cuda_builds.altered(file, [(before, after)], tmp_path / "cuda"), tmp_path)
    with pytest.raises(AssertionError):
        check(library)
