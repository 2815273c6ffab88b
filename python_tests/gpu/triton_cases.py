"""What users launch on the Triton backend, for the tests that compile it ahead of time.

A case calls an op's Triton functions as the op does, on tensors of the sizes that the agents here
have by default (networks 256 wide). Their values don't matter: nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Case(NamedTuple):
    name: str
    #: "float32", "tf32", "bfloat16" or "float16".
    precision: str
    launch: Callable[[], object]
    #: Kernels that must use the tensor cores in any precision but float32.
    matrix_kernels: tuple[str, ...] = ()


CASES: dict[str, list[Case]] = {}
