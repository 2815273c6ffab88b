"""Results as text: the tables, the stored JSON, and what a later run is checked against."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workloads import BASELINE, OURS

MARKERS = ("<!-- bench:start -->", "<!-- bench:end -->")
SLOWER_BY = 0.10
"""A ratio this much below the recorded one fails the check."""

Results = dict[str, Any]
TITLES = {
    "reverse_diffusion": "`reverse_diffusion`: the whole chain, noise drawn inside the call",
    "action_gradient": "`action_gradient`: all steps of the ascent on min(Q1, Q2)",
    "dipo_step": "One DIPO environment step: an action and a whole update (batch 256)",
}


def duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def ratios(results: Results) -> dict[tuple[str, int, int, str], float]:
    """(op, batch, steps, variant) -> how many times faster than eager PyTorch as written."""

    def key(row: dict[str, Any]) -> tuple[str, int, int]:
        return row["op"], row["batch"], row["steps"]

    base = {key(r): r["median"] for r in results["rows"] if r["variant"] == BASELINE}
    return {(*key(r), r["variant"]): base[key(r)] / r["median"] for r in results["rows"]}


def tables(results: Results) -> str:
    """Everything in ``results`` as Markdown that reads well in a terminal too."""
    parts = [_environment_line(results["environment"])]
    speed_up = ratios(results)
    for op in dict.fromkeys(row["op"] for row in results["rows"]):
        rows = []
        for row in (r for r in results["rows"] if r["op"] == op):
            rows.append(
                [
                    str(row["batch"]),
                    str(row["steps"]),
                    row["variant"],
                    duration(row["median"]),
                    _middle_half(row),
                    f"{speed_up[op, row['batch'], row['steps'], row['variant']]:.2f}x",
                    _peak_fraction(row, results["peak_flops"]),
                    _error(row["error"]),
                ]
            )
        steps = "steps" if op == "action_gradient" else "K"
        header = ["batch", steps, "variant", "median", "middle half"]
        header += ["speed-up", "of peak", "error"]
        parts += [f"**{TITLES[op]}**", _table(header, rows)]
    if results["latency"]:
        parts += ["**Latency of single calls, batch 1, one thread**", _latency(results["latency"])]
    if results["contention"]:
        rows = [
            [str(r["batch"]), r["call"], duration(r["median"]), _middle_half(r)]
            for r in results["contention"]
        ]
        header = ["batch", "call", "median", "middle half"]
        parts += ["**Calls in turns with torch's, K = 100**", _table(header, rows)]
    parts.append(
        "Speed-up is over *eager, as written*. Of peak: share of the float32 multiply-add peak of "
        "the cores used, measured in the same run, counting matrix products only. Error: median "
        "and largest against float64. *New weights*: all parameters changed before each call."
    )
    return "\n\n".join(parts) + "\n"


def _environment_line(environment: dict[str, Any]) -> str:
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


def _latency(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        [str(r["steps"]), r["variant"], str(r["calls"])]
        + [duration(r[name]) for name in ("p50", "p99", "worst")]
        for r in rows
    ]
    return _table(["K", "variant", "calls", "p50", "p99", "worst"], cells)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
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
    ours = sorted(key for key in before.keys() & after.keys() if key[3].startswith(OURS))
    if not ours:
        raise ValueError("no case of the recorded results was measured")
    return [
        f"{key[0]}, batch {key[1]}, {key[2]} steps, {key[3]}: "
        f"{after[key]:.2f}x, recorded {before[key]:.2f}x"
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
    readme.write_text(f"{before}{start}\n\n{tables(results)}\n{end}{after}")
