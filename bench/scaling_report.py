"""``python bench --scaling``: time against batch, width, depth, steps and threads.

Writes scaling.csv and scaling-<op>.png. Every point is measured in several rounds, the points of a
round in random order, so that a slow phase of the machine doesn't look like a property of a size.
"""

from __future__ import annotations

import argparse
import csv
import functools
import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import measure
import report
import torch
from torch import nn
from workloads import SEED, SIZES

from diffcore import DiffusionSchedule, ops
from diffcore.nn import Denoiser, TwinCritic

RESULTS = Path(__file__).parent.parent / "docs" / "results"

#: what varies -> its values, those that are no multiple of a tile among them
VALUES = {
    "batch": (
        1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 64, 65, 100, 128, 192, 256, 257, 300, 512, 1000, 1024,
        4096, 4100, 16_384,
    ),
    "width": (64, 65, 100, 127, 128, 192, 256, 257, 300, 384, 512, 513, 700, 768, 1000, 1024),
    "depth": (1, 2, 3, 4, 5, 6),
    "steps": (5, 10, 20, 50, 100, 200, 500, 1000),
}  # fmt: skip
QUICK_VALUES = {"batch": (1, 9), "width": (64, 65), "depth": (1, 2), "steps": (5, 10)}
CLIFF = 1.25
"""A share of peak this many times below that of a neighbouring size is worth a look."""
GOAL = 0.6
"""Share of peak that every width is to reach at 256 rows."""
TILE_FROM = 8
"""Rows from which every thread has tiles of its own; fewer are shared by columns of the weights."""


@dataclass(frozen=True)
class Shape:
    """A point of a sweep."""

    batch: int = 256
    width: int = 256
    depth: int = 3
    steps: int = 20


@dataclass(frozen=True)
class Op:
    """An op as a function of a shape: the call, and what it must do at least."""

    name: str
    network: Callable[[Shape], nn.Module]
    call: Callable[[nn.Module, Shape], object]
    flops_per_row: Callable[[Shape], int]
    """Operations of a step for one row, in matrix products."""
    weights: Callable[[Shape], int]
    """Numbers that a step reads."""
    most_steps: int


def chain_op(env: str) -> Op:
    state_dim, action_dim = SIZES[env]

    def network(shape: Shape) -> nn.Module:
        return Denoiser(state_dim, action_dim, shape.width, shape.depth)

    # Made once, as a user would: a schedule's solver table and time features are kept with it.
    schedule_of = functools.cache(DiffusionSchedule.cosine)
    states = functools.cache(lambda batch: torch.zeros(batch, state_dim))

    @torch.no_grad()
    def call(denoiser: nn.Module, shape: Shape) -> object:
        return ops.reverse_diffusion(denoiser, schedule_of(shape.steps), states(shape.batch))

    def products(shape: Shape) -> int:
        return 2 * shape.width * action_dim + (shape.depth - 1) * shape.width**2

    return Op("reverse_diffusion", network, call, lambda s: 2 * products(s), products, 1000)


def ascent_op(env: str) -> Op:
    state_dim, action_dim = SIZES[env]

    def network(shape: Shape) -> nn.Module:
        return TwinCritic(state_dim, action_dim, shape.width, shape.depth)

    @functools.cache
    def rows(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(batch, state_dim), torch.zeros(batch, action_dim)

    def call(critic: nn.Module, shape: Shape) -> object:
        settings = {"steps": shape.steps, "max_norm": 0.1 * action_dim}
        return ops.action_gradient(critic, *rows(shape.batch), **settings)

    def forward(shape: Shape) -> int:
        return shape.width * (action_dim + 1) + (shape.depth - 1) * shape.width**2

    # Both critics forward, one of them back to the action.
    return Op(
        "action_gradient",
        network,
        call,
        lambda s: 2 * (3 * forward(s) - s.width),
        lambda s: 3 * forward(s) - s.width,
        200,
    )


@dataclass(frozen=True)
class Point:
    """A row of the CSV."""

    op: str
    varies: str
    batch: int
    width: int
    depth: int
    steps: int
    threads: int
    seconds: float
    at_peak: float
    """Seconds that the matrix products take at the multiply-add peak of the cores used."""
    bound: float
    """The same, or if that is longer, what reading the weights once a step takes."""

    @property
    def value(self) -> int:
        value: int = getattr(self, self.varies)
        return value

    @property
    def share(self) -> float:
        return self.at_peak / self.seconds


def read_rate(count: int) -> float:
    """Bytes per second that one core reads of an array of float32 that it has just read."""
    values = torch.ones(max(count, 4096))
    repeats = max(1, 2_000_000 // len(values))

    def read() -> None:
        for _ in range(repeats):
            values.sum()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fastest = min(measure.seconds_of(read) for _ in range(5))
    finally:
        torch.set_num_threads(threads)
    return 4 * len(values) * repeats / fastest


def sweep(op: Op, quick: bool, seconds: float) -> list[Point]:
    torch.manual_seed(SEED)
    most_threads = torch.get_num_threads()
    threads = range(1, most_threads + 1)
    peak = {n: measure.fma_peak(n) for n in threads}
    points = [
        (varies, Shape(**{varies: value}), n)
        for varies, values in (QUICK_VALUES if quick else VALUES).items()
        for value in values
        for n in threads
        if varies != "steps" or value <= op.most_steps
    ]
    networks: dict[tuple[int, int], nn.Module] = {}
    samples: dict[tuple[str, Shape, int], list[float]] = {point: [] for point in points}
    started = time.perf_counter()
    shuffled = list(points)
    done = 0
    while done < (1 if quick else 3) or (done < 50 and time.perf_counter() - started < seconds):
        random.Random(done).shuffle(shuffled)
        for point in shuffled:
            _, shape, n = point
            network = networks.setdefault((shape.width, shape.depth), op.network(shape))
            torch.set_num_threads(n)

            def call(network: nn.Module = network, shape: Shape = shape) -> object:
                return op.call(network, shape)

            first = measure.seconds_of(call)  # packs the weights, and fetches them
            calls = 3 if first < 0.05 else 1 if first < 0.5 else 0
            again = [measure.seconds_of(call) for _ in range(calls)]
            samples[point].append(min(again, default=first))
        done += 1
        gc.collect()
    torch.set_num_threads(most_threads)

    rates: dict[int, float] = {}
    found = []
    for point in points:
        varies, shape, n = point
        at_peak = shape.steps * shape.batch * op.flops_per_row(shape) / peak[n]
        weights = op.weights(shape)
        rate = rates.setdefault(weights, read_rate(weights))
        read_by_a_core = 4 * weights / (n if shape.batch < TILE_FROM else 1)
        bound = max(at_peak, shape.steps * read_by_a_core / rate)
        median = statistics.median(samples[point])
        found.append(Point(op.name, varies, *asdict(shape).values(), n, median, at_peak, bound))
    return found


def cliffs(points: list[Point]) -> list[str]:
    """Sizes whose share of peak lies far below a smaller neighbour's."""
    lines = []
    curves: dict[tuple[str, str, int], list[Point]] = {}
    for point in points:
        curves.setdefault((point.op, point.varies, point.threads), []).append(point)
    for (op, varies, threads), curve in curves.items():
        for before, point in itertools.pairwise(curve):
            if before.share > CLIFF * point.share:
                lines.append(
                    f"{op}, {_threads(threads)}, {varies} {point.value}: {point.share:.0%} of peak, "
                    f"at {before.value} {before.share:.0%}"
                )
    return lines


def narrow(points: list[Point]) -> list[str]:
    """Widths whose share of peak is below GOAL at 256 rows, for each op and number of threads."""
    found: dict[tuple[str, int], list[str]] = {}
    for p in points:
        if p.varies == "width" and p.share < GOAL:
            found.setdefault((p.op, p.threads), []).append(f"{p.width} ({p.share:.0%})")
    return [f"{op}, {_threads(n)}: {', '.join(w)}" for (op, n), w in found.items()]


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def picture(op: str, points: list[Point], title: str, path: Path) -> None:
    """Time above, share of peak below; a column for each of what varies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(17, 8), sharex="col", layout="constrained")
    colors = ("tab:blue", "tab:orange", "tab:green", "tab:red")
    for column, varies in enumerate(VALUES):
        above, below = axes[:, column]
        for n in sorted({p.threads for p in points}):
            curve = [p for p in points if p.varies == varies and p.threads == n]
            x = [p.value for p in curve]
            color, label = colors[(n - 1) % 4], _threads(n)
            above.plot(x, [p.seconds * 1e3 for p in curve], "o-", ms=3.5, color=color, label=label)
            above.plot(x, [p.bound * 1e3 for p in curve], "--", lw=1, color=color)
            below.plot(x, [p.share * 100 for p in curve], "o-", ms=3.5, color=color)
            shares = [100 * p.at_peak / p.bound for p in curve]
            below.plot(x, shares, "--", lw=1, color=color)
        above.plot([], [], "--", lw=1, color="gray", label="roofline")
        above.set_yscale("log")
        above.grid(alpha=0.3, which="both")
        below.grid(alpha=0.3)
        below.set_ylim(0, 108)
        below.axhline(100 * GOAL, color="gray", lw=0.8, ls=":")
        fixed = asdict(Shape())
        if varies != "depth":
            below.set_xscale("log", base=2 if varies != "steps" else 10)
            ticks = {
                "batch": [1, 8, 64, 256, 1024, 16384],
                "width": [64, 100, 128, 256, 512, 1024],
                "steps": [5, 20, 100, 1000],
            }[varies]
            below.set_xticks(ticks, [f"{t:,}" for t in ticks])
            below.minorticks_off()
        others = ", ".join(f"{name} {value}" for name, value in fixed.items() if name != varies)
        above.set_title(others, fontsize=9)
        below.set_xlabel({"width": "hidden width", "depth": "hidden layers"}.get(varies, varies))
    axes[0, 0].set_ylabel("time of a call, ms")
    axes[1, 0].set_ylabel("share of the multiply-add peak, %")
    axes[0, 0].legend(fontsize=9)
    figure.suptitle(f"{op}: {title}", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(options: argparse.Namespace) -> str:
    """What is worth a look, as Markdown; curves go to files unless nothing is to be stored."""
    environment = report.environment_line({**measure.environment(), "env": options.env})
    points: list[Point] = []
    seconds = min(options.seconds * 5, 90.0)
    for op in (chain_op(options.env), ascent_op(options.env)):
        points += sweep(op, options.quick, seconds)
    directory = None
    if not options.no_save:
        # The page itself goes into docs/, or all together into the directory asked for.
        directory = options.output or RESULTS
        directory.mkdir(parents=True, exist_ok=True)
    return page(points, environment, directory, "" if options.output else f"{RESULTS.name}/")


def page(points: list[Point], environment: str, directory: Path | None, link: str) -> str:
    """What is worth a look, as Markdown, with links to the curves that it stores."""
    curves = ["Not stored."]
    if directory is not None:
        with (directory / "scaling.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*asdict(points[0]), "share_of_peak"])
            writer.writerows([*asdict(p).values(), round(p.share, 4)] for p in points)
        curves = [f"Every point: [scaling.csv]({link}scaling.csv)."]
        for name in dict.fromkeys(p.op for p in points):
            path = directory / f"scaling-{name}.png"
            picture(name, [p for p in points if p.op == name], environment, path)
            curves.append(f"![{name}]({link}{path.name})")
    return "\n\n".join(
        [
            "# Scaling",
            environment,
            f"Sizes whose share of peak is {CLIFF:.2f} times below that of the next smaller one:",
            _listed(cliffs(points)),
            f"Widths below {GOAL:.0%} of peak, of 256 rows and 3 hidden layers:",
            _listed(narrow(points)),
            *curves,
        ]
    )


def _listed(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) or "none"
