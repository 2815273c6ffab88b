"""Compare diffcore with eager PyTorch, torch.compile and JAX: ``python bench``.

Results are checked first. Then all variants of a case are timed in bursts by turns, in this one
process; run it on a quiet machine. Ends with the tables and with a JSON file under bench/results/.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from diffcore.ops import _native

# torch.compile otherwise keeps processes of its own beside the one that is timed.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

ROOT = Path(__file__).parent.parent
SECTIONS = (
    "reverse_diffusion", "reverse_step", "action_gradient", "mlp", "critic_update",
    "denoising_update", "squashed_gaussian", "soft_value", "rff_features", "score_matching_loss",
    "representation_loss", "dipo_step", "diffsr_update", "latency", "contention",
)  # fmt: skip
REPORTS = {
    "overhead": "what a call costs beside its kernel",
    "scaling": "time against batch, width, depth, steps and threads; CSV and PNG",
    "memory": "leaks over many calls, and the peak of a training step",
    "profile": "where the time of a training step goes",
}
UPDATE_BATCH = 256
"""Rows in what only training does."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python bench", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="parts to run")
    add("--env", default="HalfCheetah-v5", help="environment whose network sizes are used")
    add("--batches", nargs="+", type=int, default=[1, 16, 256, 4096])
    add("--steps", nargs="+", type=int, default=[20, 100], help="lengths K of the chain")
    add("--seconds", type=float, default=10.0, help="time for each case, if 7 rounds take less")
    add("--latency-calls", type=int, default=10_000)
    add("--threads", type=int, help="torch's threads; default: torch's own choice")
    add("--no-compile", action="store_true", help="leave out torch.compile: minutes of compiling")
    add("--no-jax", action="store_true", help="leave out JAX, even where it is installed")
    add("--quick", action="store_true", help="tiny sizes, to see that all works; not for numbers")
    add("--brief", action="store_true", help="print one line for each case, no tables")
    add("--from", dest="stored", type=Path, metavar="FILE", help="show stored results instead")
    add("--check", type=Path, metavar="FILE", help="fail if a ratio is 10%% below these results'")
    add("--markdown", action="store_true", help="put the tables into README.md")
    add("--output", type=Path, help="directory of what is stored")
    add("--no-save", action="store_true", help="store nothing")
    reports = parser.add_mutually_exclusive_group()
    for name, about in REPORTS.items():
        reports.add_argument(
            f"--{name}", dest="report", action="store_const", const=name, help=about
        )
    options = parser.parse_args(arguments)
    if options.quick:
        options.batches, options.steps = [1, 16], [5]
        options.seconds, options.latency_calls = 0.0, 50
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Check and measure everything that was asked for."""
    import diffsr_workloads
    import measure
    import workloads

    if options.env not in workloads.SIZES:
        raise SystemExit(f"--env: expected one of {', '.join(workloads.SIZES)}, got {options.env}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    threads = torch.get_num_threads()
    installed = workloads.ALL_RIVALS.jax
    if not installed:
        say("JAX isn't installed (the extra 'bench'): left out")
    rivals = workloads.Rivals(not options.no_compile, installed and not options.no_jax)
    if jax := rivals.jax_baselines():
        jax.use_threads(threads)
    results: dict[str, Any] = {
        "environment": {**measure.environment(), "env": options.env},
        "peak_flops": {str(n): measure.fma_peak(n) for n in {1, threads}},
        "rows": [],
        "latency": [],
        "contention": [],
    }

    def cases() -> Iterable[workloads.Case]:
        env, only = options.env, options.only
        for steps in options.steps if "reverse_diffusion" in only else ():
            for batch in options.batches:
                yield workloads.reverse_diffusion_case(env, batch, steps, rivals=rivals)
        if "reverse_step" in only:
            yield workloads.reverse_step_case(env, UPDATE_BATCH, rivals=rivals)
        for name, case in (
            ("action_gradient", workloads.action_gradient_case),
            ("mlp", workloads.mlp_case),
        ):
            for batch in options.batches if name in only else ():
                yield case(env, batch, rivals=rivals)
        if "critic_update" in only:
            yield workloads.critic_update_case(env, UPDATE_BATCH, rivals=rivals)
        if "denoising_update" in only:
            steps = max(options.steps)
            yield workloads.denoising_update_case(env, UPDATE_BATCH, steps, rivals=rivals)
        if "squashed_gaussian" in only:
            yield diffsr_workloads.squashed_gaussian_case(env, UPDATE_BATCH, rivals=rivals)
        if "soft_value" in only:
            yield diffsr_workloads.soft_value_case(env, UPDATE_BATCH, rivals=rivals)
        if "rff_features" in only:
            yield diffsr_workloads.rff_features_case(UPDATE_BATCH, rivals=rivals)
        if "score_matching_loss" in only:
            yield diffsr_workloads.score_matching_loss_case(env, UPDATE_BATCH, rivals=rivals)
        for name in dict.fromkeys(("Pendulum-v1", env)) if "representation_loss" in only else ():
            yield diffsr_workloads.representation_loss_case(name, UPDATE_BATCH, rivals=rivals)
        for steps in options.steps if "dipo_step" in only else ():
            yield workloads.dipo_step_case(env, steps, rivals=rivals)
        sizes = (("Pendulum-v1", 16),) if options.quick else diffsr_workloads.UPDATE_SIZES
        for name, batch in sizes if "diffsr_update" in only else ():
            yield diffsr_workloads.diffsr_update_case(name, batch, rivals=rivals)

    rounds = 2 if options.quick else 7
    for case in cases():
        say(str(case))
        errors = {v.name: case.check(v.name) for v in case.variants}
        timings = measure.interleave(case.variants, seconds=options.seconds, least=rounds)
        case.check_kernels()
        for name, timing in timings.items():
            results["rows"].append(
                {
                    "op": case.op,
                    "state_dim": case.state_dim,
                    "batch": case.batch,
                    "steps": case.steps,
                    "variant": name,
                    **asdict(timing),
                    "error": errors[name],
                    "flops": case.flops if name == workloads.OURS else None,
                    "cores": case.cores,
                }
            )

    chain, none = max(options.steps), workloads.NO_RIVALS
    if "latency" in options.only:
        say("latency")
        case = workloads.reverse_diffusion_case(options.env, 1, chain, rivals=none)
        with_threads(1, lambda: results["latency"].extend(latencies(case, options.latency_calls)))
    if "contention" in options.only:
        for batch in sorted({min(options.batches), min(256, max(options.batches))}):
            say(f"contention, batch {batch}")
            case = workloads.reverse_diffusion_case(options.env, batch, chain, rivals=none)
            calls = (case.variant(name).call for name in (workloads.OURS, workloads.OPTIMISED))
            timings = measure.contention(*calls, seconds=options.seconds)
            results["contention"] += [
                {"batch": batch, "steps": chain, "call": name, **asdict(timing)}
                for name, timing in timings.items()
            ]
    for cores, peak in results["peak_flops"].items():  # the best seen, before and after
        results["peak_flops"][cores] = max(peak, measure.fma_peak(int(cores)))
    return results


def latencies(case: Any, calls: int) -> list[dict[str, Any]]:
    import measure
    import workloads

    rows = []
    for name, share in (
        (workloads.OPTIMISED, 0.1),  # slow and no claim of ours
        (workloads.OURS, 1.0),
        (workloads.OURS_BF16, 1.0),
    ):
        count = max(10, int(share * calls))
        timed = measure.latency(case.variant(name).call, count)
        rows.append({"steps": case.steps, "variant": name, "calls": count, **timed})
    return rows


def with_threads(threads: int, work: Callable[[], object]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        work()
    finally:
        torch.set_num_threads(before)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 1 where results are wrong, slower than recorded, or can't be compared."""
    options = parse(arguments)
    if _native.unavailable is not None:
        print(f"error: nothing to measure: {_native.unavailable}", file=sys.stderr)
        return 1
    if options.report is not None:
        return write_report(options)
    import report
    from workloads import WrongResultError

    try:
        results = run(options) if options.stored is None else report.load(options.stored)
    except WrongResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.brief(results) if options.brief else report.tables(results))
    if options.stored is None and not options.no_save:
        print(f"stored: {report.save(results, options.output or ROOT / 'bench' / 'results')}")
    if options.markdown:
        report.fill_readme(ROOT / "README.md", results)
    if options.check is not None:
        try:
            slower = report.slower_than(report.load(options.check), results)
        except ValueError as error:
            print(f"error: --check: {error}", file=sys.stderr)
            return 1
        print("\n".join(slower) or "nothing is slower than recorded")
        return 1 if slower else 0
    return 0


def write_report(options: argparse.Namespace) -> int:
    """Print one of the REPORTS, and put it into docs/."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    text = importlib.import_module(f"{options.report}_report").run(options)
    print(text)
    if not options.no_save:
        directory = options.output or ROOT / "docs"
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{options.report}.md"
        path.write_text(text + "\n")
        print(f"stored: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
