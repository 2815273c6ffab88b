"""Results as text: the tables, the stored JSON, and what a later run is checked against."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from workloads import BASELINE, OURS, SIZES, VARIANTS

MARKERS = ("<!-- bench:start -->", "<!-- bench:end -->")
SLOWER_BY = 0.10
"""A ratio this much below the recorded one fails the check."""

Results = dict[str, Any]
LEGEND = """\
Medians of calls in one process, in short bursts, variant by variant in turns. *New weights*: all
parameters were changed in place before each call. *Of peak*: diffcore's share, in float32, of the
multiply-add peak of the cores it used, measured in the same run and counting matrix products only.
*torch.compile* runs the hand-optimised code, 10 steps to a graph. *JAX*: jit, and scan over the
steps, on a thread pool of its own of the same size. *dipo_step*: one action and one whole update.
*diffsr_update*: 4 representation steps, then critic and actor."""


def duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


class Key(NamedTuple):
    """A case, and with a variant's name a row."""

    op: str
    state_dim: int
    batch: int
    steps: int
    variant: str = ""

    def __str__(self) -> str:
        case = f"{self.op}, state {self.state_dim}, batch {self.batch}, {self.steps} steps"
        return f"{case}, {self.variant}" if self.variant else case


def rows_by_case(results: Results) -> dict[Key, dict[str, dict[str, Any]]]:
    """Case -> variant -> row."""
    # Older records have networks of one environment's sizes only.
    state_dim = SIZES[results["environment"]["env"]][0]
    by_case: dict[Key, dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        case = Key(row["op"], row.get("state_dim", state_dim), row["batch"], row["steps"])
        by_case.setdefault(case, {})[row["variant"]] = row
    return by_case


def ratios(results: Results) -> dict[Key, float]:
    """How many times faster than eager PyTorch as written every variant of every case is."""
    return {
        case._replace(variant=variant): rows[BASELINE]["median"] / row["median"]
        for case, rows in rows_by_case(results).items()
        for variant, row in rows.items()
    }


def tables(results: Results) -> str:
    """Everything in ``results``, as Markdown that reads well in a terminal too."""
    speed_up = ratios(results)
    by_case = rows_by_case(results)
    parts = []
    for op in dict.fromkeys(case.op for case in by_case):
        rows = [
            [
                *map(str, case[1:4]),
                variant,
                duration(row["median"]),
                _middle_half(row),
                duration(row["first"]) if "first" in row else "",
                f"{speed_up[case._replace(variant=variant)]:.2f}x",
                _peak_fraction(row, results["peak_flops"]),
                _error(row["error"]),
            ]
            for case, variants in by_case.items()
            for variant, row in variants.items()
            if case.op == op
        ]
        header = ["state", "batch", "steps", "variant", "median", "middle half", "after a rest"]
        header += ["speed-up", "of peak", "error"]
        parts += [f"**{op}**", table(header, rows)]
    return "\n\n".join([*parts, summary(results)])


def summary(results: Results) -> str:
    """One line for each case, latency and contention: what README shows."""
    parts = [environment_line(results["environment"])]
    if results["rows"]:
        parts += ["**Speed-up over eager PyTorch as written**", _speed_ups(results), LEGEND]
    if results["latency"]:
        rows = [
            [str(r["steps"]), r["variant"], str(r["calls"])]
            + [duration(r[name]) for name in ("p50", "p99", "worst")]
            for r in results["latency"]
        ]
        header = ["steps", "variant", "calls", "p50", "p99", "worst"]
        parts += ["**Latency of one action, on one thread**", table(header, rows)]
    if results["contention"]:
        rows = [
            [str(r["batch"]), str(r["steps"]), r["call"], duration(r["median"]), _middle_half(r)]
            for r in results["contention"]
        ]
        header = ["batch", "steps", "call", "median", "middle half"]
        parts += ["**`reverse_diffusion` in turns with a torch training step**"]
        parts += [table(header, rows)]
    return "\n\n".join(parts)


def _speed_ups(results: Results) -> str:
    speed_up = ratios(results)
    by_case = rows_by_case(results)
    names = [v for v in VARIANTS if any(v in rows for rows in by_case.values())]
    names.remove(BASELINE)
    lines = []
    for case, rows in by_case.items():
        ratio = [
            f"{speed_up[case._replace(variant=v)]:.2f}x" if v in rows else "" for v in names
        ]
        fraction = _peak_fraction(rows[OURS], results["peak_flops"])
        lines.append([*map(str, case[:4]), duration(rows[BASELINE]["median"]), *ratio, fraction])
    return table(["op", "state", "batch", "steps", BASELINE, *names, "of peak"], lines)


def environment_line(environment: dict[str, Any]) -> str:
    """Machine, versions and commit, in one line."""
    return (
        f"{environment['cpu']}, {environment['isa']}"
        f"{'' if environment['native_bf16'] else ' without bf16 instructions'}, "
        f"{environment['threads']} threads, torch {environment['torch']}, "
        f"{environment['env']} sizes, commit {environment['commit']}, {environment['date'][:10]}"
    )


def _middle_half(row: dict[str, Any]) -> str:
    return f"{duration(row['q25'])} .. {duration(row['q75'])}"


def _error(error: Sequence[float] | None) -> str:
    return "" if error is None else ", ".join(f"{e:.0e}" for e in error)


def _peak_fraction(row: dict[str, Any], peak: dict[str, float]) -> str:
    if row["flops"] is None:
        return ""
    return f"{row['flops'] / row['median'] / peak[str(row['cores'])]:.0%}"


def brief(results: Results) -> str:
    """One line for each case."""
    speed_up = ratios(results)
    lines = []
    for case, rows in rows_by_case(results).items():
        shown = [
            f"{variant} {duration(row['median'])}"
            + ("" if variant == BASELINE else f" ({speed_up[case._replace(variant=variant)]:.2f}x)")
            for variant, row in rows.items()
        ]
        lines.append(f"{case}: {'; '.join(shown)}")
    return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    used = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [[line[i] for i in used] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([padded[0], rule, *padded[1:]])


def save(results: Results, directory: Path) -> Path:
    """Write ``results`` to a file named after day, processor and instruction set."""
    environment = results["environment"]
    cpu = re.sub(r"[^a-z0-9]+", "-", environment["cpu"].lower()).strip("-")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{environment['date'][:10]}-{cpu}-{environment['isa']}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def load(path: Path) -> Results:
    results: Results = json.loads(path.read_text())
    return results


def slower_than(recorded: Results, now: Results) -> list[str]:
    """What got slower: one line for each of our ratios that fell by more than SLOWER_BY.

    Raises:
        ValueError: the two can't be compared: another processor, instruction set, number of
            threads or network sizes, or no case in common.
    """
    for name in ("cpu", "isa", "threads", "env"):
        then, here = recorded["environment"][name], now["environment"][name]
        if then != here:
            raise ValueError(f"recorded with {name} {then!r}, this is {here!r}")
    before, after = ratios(recorded), ratios(now)
    ours = sorted(key for key in before.keys() & after.keys() if key.variant.startswith(OURS))
    if not ours:
        raise ValueError("no case of the recorded results was measured")
    return [
        f"{key}: {after[key]:.2f}x, recorded {before[key]:.2f}x"
        for key in ours
        if after[key] < (1 - SLOWER_BY) * before[key]
    ]


def fill_readme(readme: Path, results: Results) -> None:
    """Put the tables between the markers.

    Raises:
        ValueError: the markers aren't there.
    """
    start, end = MARKERS
    before, found_start, rest = readme.read_text().partition(start)
    _, found_end, after = rest.partition(end)
    if not found_start or not found_end:
        raise ValueError(f"{readme} has no {start} ... {end}")
    readme.write_text(f"{before}{start}\n\n{summary(results)}\n\n{end}{after}")
