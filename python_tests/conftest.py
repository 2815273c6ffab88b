"""Fixtures and settings of all tests."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

# Before torch brings OpenMP in: its idle threads spin, and where another process wants the cores
# thousands of small calls then wait for their turns, ten times as long as they compute.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# torch.compile keeps graphs on disk, with sizes that another build of the kernels gave its results.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. Triton decides for that where a kernel is
# defined, its own included: so here, before anything else imports it, and in the fixture `device`,
# since ops import their kernels at the first call.
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETS = HAS_TRITON and not torch.cuda.is_available()
if INTERPRETS:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.language  # noqa: F401

from helpers import ISAS  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from diffcore.ops import _native  # noqa: E402

# The same examples on every run: a failure is a fault, never bad luck.
settings.register_profile(
    "diffcore",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("diffcore")


#: Files of few tests that take long, each in processes of its own: they needn't stay together.
ONE_BY_ONE = ("gpu/test_cuda_faults.py",)


@pytest.hookimpl(optionalhook=True)  # there is one where pytest-xdist is installed
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests go to one process, files of most tests first; those of ONE_BY_ONE come last."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return nodeid if file.endswith(ONE_BY_ONE) else file

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def teams() -> Iterator[None]:
    """Small batches are shared among threads however narrow the layers, and whatever it costs."""
    _native._core.always_use_teams(True)
    yield
    _native._core.always_use_teams(False)


@pytest.fixture
def pack_budget() -> Iterator[Callable[[int], None]]:
    """Sets how many bytes of packed weights are kept, for the length of a test."""
    yield _native._core.set_pack_budget
    _native._core.set_pack_budget(2**28)


def _use(isa: str) -> Iterator[str]:
    before = _native._core.isa()
    _native._core.use_isa(isa)
    yield isa
    _native._core.use_isa(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on the kernels of every instruction set that this machine has."""
    yield from _use(request.param)


@pytest.fixture(params=["reference", *(f"cpu-{isa}" for isa in ISAS)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on the reference and on the kernels of every instruction set."""
    name, _, wanted = request.param.partition("-")
    if wanted:
        for _ in _use(wanted):
            yield name
    else:
        yield name


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where Triton's kernels take their tensors in a test."""
    if not HAS_TRITON:
        pytest.skip("Triton isn't installed")
    if INTERPRETS:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return "cpu" if INTERPRETS else "cuda"


@pytest.fixture
def large_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in few large blocks, where a GPU would spill and the interpreter gets faster."""
    if device == "cpu":
        from diffcore.ops import _triton

        def layout(hidden: int, *_: Any) -> Any:
            width = max(16, -(-hidden // 64) * 64)
            return _triton.HiddenLayout(width, width & -width, width & -width)

        monkeypatch.setattr(_triton, "hidden_layout", layout)
