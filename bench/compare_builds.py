"""Compare the kernels of two builds: ``python bench/compare_builds.py OLD NEW``.

Each is a directory with the package ``diffcore`` and its compiled module: an environment's
``site-packages``, or a checkout that the module was copied into. Whole runs one after the other
compare the times of day as well: a host's other guests come and go in seconds. So both builds stay
alive in a process each and take turns every few hundredths of a second, and each pair of neighbouring
times gives a ratio. Those of quiet and of disturbed moments are told apart by the old build's time
beside its least one: a change may gain in one of them alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

QUIET, DISTURBED = 1.1, 1.2
"""Up to so many times its least time a moment is quiet, and from so many on disturbed."""
SLICE = 0.03
"""Seconds of a turn, if that is three calls."""
BATCH, STEPS = 256, 20


def cases() -> dict[str, tuple[int, Callable[[], object]]]:
    """By name the number of threads, and what to call."""
    import torch

    from diffcore import DiffusionSchedule, nn, ops

    torch.manual_seed(0)
    schedule = DiffusionSchedule.cosine(STEPS)
    state, action = torch.randn(BATCH, 17), torch.rand(BATCH, 6)
    omega, phase = torch.randn(1024, 256), torch.rand(1024)
    points = torch.randn(BATCH, 256, requires_grad=True)

    def critics_gradients(critic: nn.TwinCritic) -> None:
        q1, q2 = critic(state, action)
        (q1.sum() + q2.sum()).backward()

    def features_gradients() -> None:
        ops.rff_features(points, omega, phase).sum().backward()

    calls: dict[str, Callable[[], object]] = {}
    for width in (64, 256):
        denoiser = nn.Denoiser(17, 6, width).requires_grad_(False)
        frozen = nn.TwinCritic(17, 6, width).requires_grad_(False)
        critic = nn.TwinCritic(17, 6, width)
        chain = partial(ops.reverse_diffusion, denoiser, schedule)
        calls[f"chain, width {width}"] = partial(chain, state)
        calls[f"chain of 16 rows, width {width}"] = partial(chain, state[:16])
        ascent = partial(ops.action_gradient, frozen, state, action, steps=20)
        calls[f"ascent, width {width}"] = ascent
        calls[f"critics' gradients, width {width}"] = partial(critics_gradients, critic)
    calls["rff features and gradient"] = features_gradients
    return {
        f"{name}, {threads} thread{'s' * (threads > 1)}": (threads, call)
        for threads in (1, 2)
        for name, call in calls.items()
    }


def serve() -> None:
    """Print the cases' names; then for each name that is read the median time of its turn."""
    import torch

    known = cases()
    print("\t".join(known), flush=True)
    for line in sys.stdin:
        threads, call = known[line.rstrip("\n")]
        torch.set_num_threads(threads)
        call()
        times: list[float] = []
        end = time.perf_counter() + SLICE
        while len(times) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        print(statistics.median(times), flush=True)


class Build:
    """A process with that directory's diffcore."""

    def __init__(self, directory: Path) -> None:
        if not any(directory.glob("diffcore/_core*.so")):
            sys.exit(f"error: {directory}: expected a directory with diffcore/_core*.so")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env={**os.environ, "PYTHONPATH": str(directory.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.names = self.read().split("\t")

    def read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: a build stopped with exit code {self.process.wait()}")
        return line.rstrip("\n")

    def time(self, name: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return float(self.read())

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def row(name: str, pairs: list[tuple[float, float]]) -> str:
    """A case's line of the table, of its pairs of times."""
    least = min(old for old, _ in pairs)

    def ratio(chosen: list[tuple[float, float]]) -> str:
        if not chosen:
            return "-"
        return f"{statistics.median(new / old for old, new in chosen):.3f} of {len(chosen)}"

    quiet = ratio([pair for pair in pairs if pair[0] <= QUIET * least])
    disturbed = ratio([pair for pair in pairs if pair[0] >= DISTURBED * least])
    best = min(new for _, new in pairs) / least
    return f"{name:42} {1e3 * least:9.3f} ms {best:7.3f} {quiet:>14} {disturbed:>14}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="for all cases together (60)")
    parser.add_argument("--only", default="", help="cases with this text in their names")
    options = parser.parse_args()
    builds = [Build(options.old), Build(options.new)]
    names = [name for name in builds[0].names if options.only in name]
    if not names:
        known = "; ".join(builds[0].names)
        sys.exit(f"error: --only: {options.only!r} is in no case's name: {known}")
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    end = time.monotonic() + options.seconds
    turn = 0
    while turn == 0 or time.monotonic() < end:
        for name in names:
            order = (0, 1) if turn % 2 == 0 else (1, 0)
            times = {side: builds[side].time(name) for side in order}
            pairs[name].append((times[0], times[1]))
        turn += 1
    for build in builds:
        build.stop()
    print(f"{'new by old':42} {'old, least':>12} {'least':>7} {'quiet':>14} {'disturbed':>14}")
    for name in names:
        print(row(name, pairs[name]))


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        main()
