"""What installing and importing promise: CUDA kernels or a clear word, and a quick import."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run_script

ROOT = Path(__file__).parent.parent


def configure(folder: Path, *definitions: str) -> subprocess.CompletedProcess[str]:
    """Configures a build where no nvcc is found: a path that is set isn't looked for."""
    pybind11 = pytest.importorskip("pybind11")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake, ninja = (shutil.which(tool, path=path) for tool in ("cmake", "ninja"))
    if cmake is None or ninja is None:
        pytest.skip("needs cmake and ninja")
    settings = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "DIFFCORE_NVCC": "",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    defined = [f"-D{name}={value}" for name, value in settings.items()]
    places = ["-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    environment = {k: v for k, v in os.environ.items() if k != "CUDACXX"}
    return subprocess.run(
        [cmake, *places, *defined, *definitions], capture_output=True, text=True, env=environment
    )


def test_auto_skips_the_cuda_kernels_and_says_so(tmp_path: Path) -> None:
    done = configure(tmp_path)
    assert done.returncode == 0, done.stderr
    skipped = "diffcore: CUDA kernels skipped: no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda"
    assert skipped in done.stdout


def test_on_without_nvcc_is_an_error(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DDIFFCORE_CUDA=on")
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert "DIFFCORE_CUDA=on, but the CUDA kernels can't be built: no nvcc on PATH" in said


def test_an_unknown_setting_is_an_error(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DDIFFCORE_CUDA=yes")
    assert done.returncode != 0
    assert "DIFFCORE_CUDA: expected auto, on or off, got 'yes'" in " ".join(done.stderr.split())


def test_import_is_quick_and_takes_no_triton_along() -> None:
    """Under 1.5 s after torch; the quickest of three, on a machine that does other things too."""
    script = """
import sys, time, torch
start = time.process_time()
import diffcore, diffcore.ops, diffcore.nn
print(time.process_time() - start, "triton" in sys.modules)
"""
    runs = [run_script(script) for _ in range(3)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    seconds, brought = zip(*(run.stdout.split() for run in runs), strict=True)
    assert min(map(float, seconds)) < 1.5
    assert set(brought) == {"False"}
