"""What is installed, and what of it is in use."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from diffcore.ops import _native

try:
    __version__ = importlib.metadata.version("diffcore")
except importlib.metadata.PackageNotFoundError:  # imported from a source tree
    __version__ = "0+source"


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def show_config() -> str:
    """Versions, instruction set and threads, as text for a bug report.

    Raises:
        RuntimeError: ``DIFFCORE_ISA`` names an instruction set that this CPU or build doesn't have.
    """
    lines = {
        "diffcore": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "threads": f"{torch.get_num_threads()} (torch.get_num_threads())",
    }
    if _native.unavailable is not None:
        lines["cpu kernels"] = _native.unavailable
    else:
        core = _native._core
        bfloat16 = "native" if core.native_bf16() else "emulated in float32"
        lines["cpu kernels"] = f"{core.isa()} of {', '.join(core.available_isas())}"
        lines["bfloat16"] = bfloat16
    lines["cuda kernels"] = _native.cuda_unavailable or f"for {_native._cuda.architectures}"
    if _native._cuda is not None and (reason := _native.cuda_lacks()):
        lines["cuda kernels"] += f"; can't run here: {reason}"
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())
