"""Builds of the CUDA kernels for tests: as ordinary C++ for the CPU, and by nvcc for a look inside.

Both are kept under build/ by what they are made of, so that a second run of the tests builds nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build"

#: Kernels as g++ takes them; device.cu is replaced by testing/device.cpp. No contraction: an fma is
#: one where the source says so, on every machine.
CPU_FLAGS = (
    "-DDIFFCORE_CUDA_ON_CPU -std=c++17 -O2 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Werror "
    "-Wno-unknown-pragmas -Wno-unused-function"
).split()


def kernel_sources(directory: Path = CUDA) -> list[Path]:
    """The files with kernels: all .cu but the one about devices."""
    return sorted(path for path in directory.glob("*.cu") if path.name != "device.cu")


def run(command: Sequence[str | Path]) -> str:
    """What the command prints.

    Raises:
        RuntimeError: it failed; with all that it said.
    """
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if result.returncode:
        words = " ".join(str(word) for word in command)
        raise RuntimeError(f"{words}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def run_all(commands: Iterable[Sequence[str | Path]]) -> list[str]:
    """What the commands print, two of them at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, commands))


def digest(*parts: object, directory: Path = CUDA) -> str:
    """A name for what is made from the sources in `directory`, and from `parts`."""
    content = hashlib.sha256(repr(parts).encode())
    for path in sorted([*directory.rglob("*"), ROOT / "csrc" / "python" / "cuda_module.cpp"]):
        if path.suffix in {".cu", ".cuh", ".h", ".cpp"}:
            content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()[:16]


# -- on the CPU ------------------------------------------------------------------------------------


def build_for_cpu(directory: Path = CUDA, extra_flags: Sequence[str] = ()) -> Path:
    """The module `_cuda_on_cpu`, from the sources in `directory`: the real ones, or altered copies.

    Args:
        directory: laid out as csrc/cuda.
        extra_flags: more flags for the compiler and the linker.
    """
    import pybind11

    compiler = os.environ.get("CXX", "g++")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    name = digest(compiler, CPU_FLAGS, extra_flags, suffix, directory=directory)
    folder = BUILD / "cuda_on_cpu" / name
    module = folder / f"_cuda_on_cpu{suffix}"
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*CPU_FLAGS, *extra_flags]
    python = sysconfig.get_paths()
    includes = [f"-I{path}" for path in (python["include"], pybind11.get_include())]
    architectures = '-DDIFFCORE_CUDA_ARCHITECTURES="the CPU"'
    sources = [*kernel_sources(directory), directory / "testing" / "device.cpp"]
    objects = [folder / f"{path.stem}.o" for path in sources]
    commands = [
        [compiler, *flags, "-x", "c++", "-c", source, "-o", target]
        for source, target in zip(sources, objects, strict=True)
    ]
    binding = folder / "cuda_module.o"
    source = ROOT / "csrc" / "python" / "cuda_module.cpp"
    commands.append([compiler, *flags, architectures, *includes, "-c", source, "-o", binding])
    run_all(commands)
    unfinished = folder / "unfinished.so"
    run([compiler, "-shared", *extra_flags, *objects, binding, "-o", unfinished])
    unfinished.rename(module)  # whole or not there at all
    return module


def load(path: Path) -> ModuleType:
    """The module that `build_for_cpu` made."""
    spec = importlib.util.spec_from_file_location("_cuda_on_cpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- by nvcc ---------------------------------------------------------------------------------------


def find_nvcc() -> Path | None:
    """On PATH, in CUDA_HOME, in /usr/local/cuda, or in PyPI's wheel nvidia-cuda-nvcc."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    homes += [str(Path(path) / "nvidia" / "cu13") for path in sys.path]
    on_path = shutil.which("nvcc")
    found = [Path(on_path)] if on_path else []
    found += [Path(home) / "bin" / "nvcc" for home in homes if home]
    return next((path for path in found if path.exists()), None)


def find_cuobjdump() -> Path | None:
    """On PATH, beside nvcc, or in triton's wheel."""
    on_path = shutil.which("cuobjdump")
    found = [Path(on_path)] if on_path else []
    if nvcc := find_nvcc():
        found.append(nvcc.parent / "cuobjdump")
    if spec := importlib.util.find_spec("triton"):
        assert spec.origin is not None
        found.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((path for path in found if path.exists()), None)


class Resources(NamedTuple):
    """What a kernel takes of a multiprocessor, as ptxas reports it."""

    registers: int
    shared_bytes: int  # static ones; dynamic ones are the launcher's affair
    spilled_bytes: int


class Compiled(NamedTuple):
    """A source for one architecture."""

    cubin: Path
    resources: dict[str, Resources]  # by the kernel's demangled name, with template arguments


_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def demangled(names: Sequence[str]) -> list[str]:
    """Names without namespaces, return types and parameters: `kernel<arguments>`."""
    result = []
    for line in run(["c++filt", *names]).splitlines():
        line = line.replace("(anonymous namespace)::", "").replace("diffcore::cuda::", "")
        line = re.sub(r"\((?:gemm::)?[A-Z]\w*\)", "", line)  # of enumerators: (Precision)2
        result.append(line.partition("(")[0].removeprefix("void "))
    return result


def compile_for_gpu(source: Path, architecture: int) -> Compiled:
    """Machine code for sm_<architecture> with the flags of CMakeLists.txt.

    Raises:
        RuntimeError: nvcc found a fault in it.
    """
    nvcc = find_nvcc()
    assert nvcc is not None
    version = run([nvcc, "--version"])
    folder = BUILD / "cuda_gates" / digest(version)
    folder.mkdir(parents=True, exist_ok=True)
    cubin = folder / f"{source.stem}.sm_{architecture}.cubin"
    report = cubin.with_suffix(".txt")
    if not report.exists():
        command = [nvcc, "-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v"]
        printed = run([*command, "-Werror=all-warnings", source, "-o", cubin])
        report.write_text(printed)
    found = list(_KERNEL.finditer(report.read_text()))
    names = demangled([match["name"] for match in found]) if found else []
    resources = {}
    for name, match in zip(names, found, strict=True):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        resources[name] = Resources(
            int(match["registers"]),
            int(shared[1]) if shared else 0,
            int(match["stores"]) + int(match["loads"]),
        )
    return Compiled(cubin, resources)


def instructions(cubin: Path) -> dict[str, str]:
    """The SASS of every kernel in a file, by demangled name."""
    cuobjdump = find_cuobjdump()
    assert cuobjdump is not None
    parts = re.split(r"\n\s*Function : (\S+)\n", run([cuobjdump, "-sass", cubin]))[1:]
    return dict(zip(demangled(parts[::2]), parts[1::2], strict=True))
