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

OUT_OF_MEMORY = 2

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
        self._library = ctypes.CDLL(shutil.copy(built, tmp_path / "library.so"))

    def text(self, name: str, *args: object) -> str | None:
        """A function's result: what went wrong, or None."""
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        result: bytes | None = function(*args)
        return None if result is None else result.decode()

    def fail(self, call: str, error: int) -> None:
        """Has a call of the runtime end in this error; with 0 none does."""
        self._library.fail(call.encode(), error)

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
    assert library.text("multiprocessors", ctypes.byref(ctypes.c_int())) == "out of memory"
    assert library.text("why_unavailable") == "out of memory"
    assert library.last_error() == 0


def an_error_of_others_is_not_the_device_s(library: Library) -> None:
    """It says nothing about whether kernels can run."""
    library.fail("cudaSetDevice", OUT_OF_MEMORY)
    library.text("set_by_others")
    assert library.last_error() == OUT_OF_MEMORY
    assert library.text("why_unavailable") is None
    assert library.text("launched", 1, 0) is None


Check = Callable[[Library], None]

CHECKS: list[Check] = [
    an_error_is_reported_once,
    a_device_that_does_not_answer_leaves_no_error,
    an_error_of_others_is_not_the_device_s,
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
        "    return text;\n  }\n  return nullptr;",
        "    return text;\n  }\n  return error_text(cudaGetLastError());",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, tmp_path: Path) -> None:
    check, file, before, after = FAULTS[fault]
    library = Library(cuda_builds.altered(file, [(before, after)], tmp_path / "cuda"), tmp_path)
    with pytest.raises(AssertionError):
        check(library)
