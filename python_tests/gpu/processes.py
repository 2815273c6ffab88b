"""Processes of their own, for what ends them, and under AddressSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cuda_builds
import pytest

HERE = Path(__file__).parent


def in_a_process(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def asan_runtime() -> str | None:
    compiler = os.environ.get("CXX", "g++")
    answer = cuda_builds.run([compiler, "-print-file-name=libasan.so"]).strip()
    return answer if os.path.isabs(answer) else None


needs_asan = pytest.mark.skipif(
    asan_runtime() is None, reason="the compiler has no shared AddressSanitizer"
)


def under_asan(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    runtime = asan_runtime()
    assert runtime is not None
    options = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    return in_a_process(*arguments, **options, **environment)
