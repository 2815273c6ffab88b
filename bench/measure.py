"""Timing: bursts by turns, tails of latency, contention with torch, the machine's ceiling."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import nn
from workloads import Variant

import diffcore
from diffcore.ops._native import _core

WARM_UP_CALLS = 3
SLOW = 4.0
"""Seconds of warming up, or of a round, that are a lot."""
BURST, BURST_CALLS = 0.03, 20
"""A burst ends after so many seconds, or so many calls."""
REST = 0.005
"""Seconds before a burst: the last one's threads go on spinning for a moment."""
LONG = 0.25
"""Seconds of a call beside which it doesn't matter what it found in the caches."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median and the middle half of all calls, and the median of those that
    came first in a burst, after a rest."""

    median: float
    q25: float
    q75: float
    calls: int
    first: float

    @staticmethod
    def of(bursts: Sequence[Burst]) -> Timing:
        seconds = [call for burst in bursts for call in burst.calls]
        q25, median, q75 = statistics.quantiles(seconds, n=4, method="inclusive")
        first = statistics.median(burst.first for burst in bursts)
        return Timing(median, q25, q75, len(seconds), first)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Burst:
    """Seconds of calls of one variant in a row, and of the call before them."""

    first: float
    calls: list[float]


def interleave(
    variants: Sequence[Variant], *, seconds: float, least: int = 7, most: int = 200
) -> dict[str, Timing]:
    """Time variants in bursts by turns, so that a slow second of the machine meets all of them.

    Every variant finds the caches and its threads as its own calls leave them, as in a training loop
    or a server, not as another library's thread pool does.

    Args:
        variants: each is called a few times untimed first, or for SLOW seconds at most.
        seconds: how long to go on, within ``least`` to ``most`` rounds of all variants in a random
            order. Where a round takes longer than SLOW, 3 rounds are enough.
    """
    bursts: dict[str, list[Burst]] = {v.name: [] for v in variants}
    order = list(variants)
    shuffle = random.Random(0).shuffle
    for variant in variants:
        time.sleep(REST)
        until = time.perf_counter() + SLOW
        for _ in range(WARM_UP_CALLS):
            variant.call()
            if time.perf_counter() > until:
                break
    started = time.perf_counter()
    with no_garbage_collection():
        for done in range(most):
            elapsed = time.perf_counter() - started
            if done == 3 and elapsed > 3 * SLOW:
                least = 3
            if done >= least and elapsed > seconds:
                break
            shuffle(order)
            for variant in order:
                bursts[variant.name].append(_burst(variant))
    return {name: Timing.of(values) for name, values in bursts.items()}


def _burst(variant: Variant) -> Burst:
    def call() -> float:
        if variant.before is not None:
            variant.before()
        return seconds_of(variant.call)

    time.sleep(REST)
    first = call()
    if first > LONG:
        return Burst(first, [first])
    calls = []
    until = time.perf_counter() + BURST
    while not calls or (len(calls) < BURST_CALLS and time.perf_counter() < until):
        calls.append(call())
    return Burst(first, calls)


def latency(call: Callable[[], object], calls: int) -> dict[str, float]:
    """Seconds of single calls in a row: median, 99th percentile and the worst."""
    for _ in range(WARM_UP_CALLS):
        call()
    with no_garbage_collection():
        seconds = sorted(seconds_of(call) for _ in range(calls))
    return {
        "p50": seconds[calls // 2],
        "p99": seconds[min(calls - 1, calls * 99 // 100)],
        "worst": seconds[-1],
    }


def contention(
    ours: Callable[[], object], eager: Callable[[], object], *, seconds: float
) -> dict[str, Timing]:
    """What our calls and torch's cost each other: every call timed right after one of either kind.

    torch's work is a forward and backward pass of a small MLP on 256 rows, on all its threads. After
    itself it finds its data in the caches; after an eager chain, torch's own work too, it doesn't.
    """
    model = nn.Sequential(nn.Linear(256, 256), nn.Mish(), nn.Linear(256, 256))
    x = torch.randn(256, 256)

    def torchs() -> None:
        model(x).square().mean().backward()

    def after(first: Callable[[], object], call: Callable[[], object], name: str) -> Variant:
        return Variant(name, call, before=first)

    return interleave(
        [
            after(torchs, torchs, "torch after torch"),
            after(eager, torchs, "torch after an eager chain"),
            after(ours, torchs, "torch after diffcore"),
            after(ours, ours, "diffcore after diffcore"),
            after(torchs, ours, "diffcore after torch"),
        ],
        seconds=seconds,
    )


def fma_peak(threads: int, repeats: int = 8) -> float:
    """float32 operations per second of fused multiply-adds on registers, the best of some runs."""
    return max(_core.fma_peak(threads, 0.05) for _ in range(repeats))


def cpu_model() -> str:
    """Name, family and model of the processor: what must agree for ratios to be compared."""
    with contextlib.suppress(OSError):
        fields = {}
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
        if "model name" in fields:
            numbers = f"family {fields.get('cpu family')} model {fields.get('model')}"
            return f"{fields['model name']} ({numbers})"
    return platform.processor() or platform.machine()


def environment() -> dict[str, object]:
    """Where and with what the numbers were taken."""
    return {
        "cpu": cpu_model(),
        "isa": _core.isa(),
        "native_bf16": _core.native_bf16(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "jax": _version("jax"),
        "python": platform.python_version(),
        "diffcore": diffcore.__version__,
        "commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str:
    """The commit of the source tree, with a + if files differ from it."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = "+" if git("status", "--porcelain") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
