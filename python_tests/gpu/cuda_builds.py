"""The CUDA kernels as ordinary C++ for the CPU, and a look into what nvcc made of them.

Builds are kept under build/ by what they are made of: a second run of the tests builds nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from filelock import FileLock

ROOT = Path(__file__).parent.parent.parent
CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build"

#: Kernels as g++ takes them; device.cu is replaced by testing/device.cpp. No contraction: an fma is
#: one where the source says so, on every machine.
CPU_FLAGS = [
    "-DDIFFCORE_CUDA_ON_CPU",
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
]


def kernel_sources(directory: Path = CUDA) -> list[Path]:
    """The files with kernels: all .cu but the one about devices."""
    return sorted(path for path in directory.glob("*.cu") if path.name != "device.cu")


def headers(directory: Path = CUDA) -> list[Path]:
    """The files that any of them may include."""
    return [path for path in directory.rglob("*") if path.suffix in {".h", ".cuh"}]


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


def make(path: Path, command: Sequence[str | Path]) -> None:
    """Has a command whose last word is the file to write make `path`: whole, or not at all."""
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    run([*command, unfinished])
    unfinished.rename(path)


def digest(*parts: object, files: Iterable[Path]) -> str:
    """A name for what is made from files, and from `parts`."""
    content = hashlib.sha256(repr(parts).encode())
    for path in sorted(files):
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
    flags = [*CPU_FLAGS, *extra_flags]
    binding = ROOT / "csrc" / "python" / "cuda_module.cpp"
    includes = [f"-I{path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include())]
    for_binding = ['-DDIFFCORE_CUDA_ARCHITECTURES="the CPU"', *includes]
    folder = BUILD / "cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)

    # An object by what is in it, so that a change of one kernel compiles that one.
    objects, commands = [], []
    for source in [*kernel_sources(directory), directory / "testing" / "device.cpp", binding]:
        own_flags = [*flags, *(for_binding if source == binding else ["-x", "c++"])]
        name = digest(compiler, own_flags, files=[source, *headers(directory)])
        target = folder / f"{source.stem}-{name}.o"
        objects.append(target)
        if not target.exists():
            commands.append((target, [compiler, *own_flags, "-c", source, "-o"]))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda work: make(*work), commands))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    name = digest(compiler, flags, [path.name for path in objects], files=[])
    module = folder / name / f"_cuda_on_cpu{suffix}"
    if not module.exists():
        module.parent.mkdir(exist_ok=True)
        make(module, [compiler, "-shared", *extra_flags, *objects, "-o"])
    return module


def build_for_tests() -> Path:
    """The module that tests run: by the first of their processes that asks for it.

    ``CUDA_ON_CPU_SOURCES`` in the environment names a directory with other sources,
    ``CUDA_ON_CPU_FLAGS`` further flags.
    """
    directory = Path(os.environ.get("CUDA_ON_CPU_SOURCES", CUDA))
    flags = os.environ.get("CUDA_ON_CPU_FLAGS", "").split()
    BUILD.mkdir(exist_ok=True)
    with FileLock(BUILD / "cuda_on_cpu.lock"):
        return build_for_cpu(directory, flags)


def load(path: Path) -> ModuleType:
    """The module that `build_for_cpu` made."""
    spec = importlib.util.spec_from_file_location("_cuda_on_cpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def altered(file: str, change: Sequence[tuple[str, str]], target: Path) -> Path:
    """A copy of csrc/cuda in which a file's text is changed."""
    shutil.copytree(CUDA, target)
    text = (target / file).read_text()
    for before, after in change:
        assert text.count(before) == 1, f"{file} has {before!r} {text.count(before)} times"
        text = text.replace(before, after)
    (target / file).write_text(text)
    return target


# -- by nvcc ---------------------------------------------------------------------------------------


def find_cuobjdump() -> Path | None:
    """NVIDIA's disassembler: on PATH, or in triton's wheel."""
    if on_path := shutil.which("cuobjdump"):
        return Path(on_path)
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.exists() else None


class Kernel(NamedTuple):
    """A kernel for one architecture, by what it takes of a multiprocessor."""

    architecture: str
    name: str
    """Without namespaces and parameters: ``kernel<arguments>``."""
    registers: int
    stack_bytes: int
    """Of local memory: registers that spilled, arrays that were indexed."""
    shared_bytes: int
    """Of static shared memory; what is dynamic, the launcher asks for."""
    instructions: str
    """Its SASS."""


def demangled(names: Sequence[str]) -> list[str]:
    result = []
    for line in run(["c++filt", *names]).splitlines():
        line = line.replace("(anonymous namespace)::", "").replace("diffcore::cuda::", "")
        result.append(line.partition("(")[0].removeprefix("void "))
    return result


def look_into(module: Path) -> list[Kernel]:
    """Every kernel for every architecture in a file."""
    cuobjdump = find_cuobjdump()
    assert cuobjdump is not None, "no cuobjdump: neither on PATH nor in triton's wheel"
    usage: dict[tuple[str, str], tuple[int, int, int]] = {}
    for architecture, text in _by_architecture(run([cuobjdump, "-res-usage", module])):
        for name, numbers in re.findall(r"Function (\w+):\n\s*(.*)", text):
            values = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", numbers))
            registers, stack, shared = (int(values[key]) for key in ("REG", "STACK", "SHARED"))
            usage[architecture, name] = registers, stack, shared
    code: dict[tuple[str, str], str] = {}
    for architecture, text in _by_architecture(run([cuobjdump, "-sass", module])):
        parts = re.split(r"\n\s*Function : (\w+)\n", text)[1:]
        for name, instructions in zip(parts[::2], parts[1::2], strict=True):
            code[architecture, name] = instructions
    assert set(code) == set(usage)
    names = demangled([name for _, name in usage])
    return [
        Kernel(architecture, readable, *usage[architecture, name], code[architecture, name])
        for (architecture, name), readable in zip(usage, names, strict=True)
    ]


def _by_architecture(printed: str) -> list[tuple[str, str]]:
    """cuobjdump's text in pieces, each of one architecture."""
    parts = re.split(r"\narch = (sm_\d+)\w*\n", printed)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))
