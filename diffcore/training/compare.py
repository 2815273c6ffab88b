"""Comparisons: the same task for several agents and seeds, one picture, one table.

Every run is an ordinary one, the same as ``diffcore train`` would make, in a directory of its own
below the comparison's. So a comparison that was interrupted goes on when it is asked for again, and
one that is asked for more steps or seeds adds what is missing.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import multiprocessing
import os
import shutil
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from diffcore.training.checkpoint import load_checkpoint
from diffcore.training.config import RESUMABLE, TrainConfig, to_dict
from diffcore.training.errors import RunError, TrainingError
from diffcore.training.files import write_atomically
from diffcore.training.interruption import Interruption
from diffcore.training.logging import read_series
from diffcore.training.loop import resume, train
from diffcore.training.plotting import Array, Band, plot_learning_curves
from diffcore.training.progress import printing, say
from diffcore.training.registry import AgentConfig, agent_name
from diffcore.training.run_directory import RunDirectory
from diffcore.training.statistics import bootstrap_interval


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    name: str
    """What the comparison calls the agent with these settings; one for all seeds."""
    config: TrainConfig
    """With ``run_dir`` set."""
    agent_config: AgentConfig

    @property
    def run(self) -> RunDirectory:
        """Where it is or will be."""
        assert self.config.run_dir is not None
        return RunDirectory(self.config.run_dir)

    def __str__(self) -> str:
        return f"{self.name}, seed {self.config.seed}"


@dataclass(frozen=True)
class Comparison:
    """What a comparison wrote. All of it is there only once every run is complete."""

    complete: bool
    """Whether all runs are; if not, a signal ended one of them."""
    curves: Path
    """The picture of learning curves."""
    final_returns: Path
    """A CSV file with one row per run."""
    summary: Path
    """A CSV file with one row per agent."""


def compare(
    jobs: list[Job],
    output: Path,
    *,
    parallel: int = 1,
    last_evaluations: int = 1,
    console: Console | None = None,
) -> Comparison:
    """Bring every run to its end, then draw and tabulate them.

    Args:
        jobs: the runs; those that are complete aren't touched, interrupted ones are resumed.
        output: the directory for picture and tables.
        parallel: runs at a time. One is run in this process; several have processes of their own,
            which share the cores unless ``threads`` says otherwise, and log to files in ``output``.
        last_evaluations: how many of a run's evaluations, from the end, its final return is the mean
            of.
        console: where to show progress and the table; None is standard output.

    Raises:
        TrainingError: if a run fails, has fewer evaluations, or there is one already that was set
            differently.
    """
    console = console or Console()
    for job in jobs:
        if job.run.path.exists():
            _check_settings(job)
    waiting = [job for job in jobs if not _is_complete(job)]
    if len(waiting) < len(jobs):
        say(console, f"{len(jobs) - len(waiting)} of {len(jobs)} runs are complete already")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"can't make the directory {output}: {error}") from error
    run_all = _run_in_turn if parallel == 1 else _run_in_parallel
    comparison = Comparison(
        complete=run_all(waiting, output, parallel, console),
        curves=output / "learning_curves.png",
        final_returns=output / "final_returns.csv",
        summary=output / "summary.csv",
    )
    if comparison.complete:
        runs = [_final_row(job, last_evaluations) for job in jobs]
        _write_csv(comparison.final_returns, runs)
        rows = summarize(runs)
        _write_csv(comparison.summary, rows)
        plot_learning_curves(
            [job.run.path for job in jobs],
            comparison.curves,
            band=INTERVAL,
            names=[job.name for job in jobs],
        )
        with printing(console):
            console.print(_table(jobs[0].config.env, rows, last_evaluations))
    return comparison


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per agent: interquartile mean with its 95% interval, mean, deviation, extremes.

    Args:
        runs: ``agent``, ``updates`` and final ``return`` of each.
    """
    by_agent: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        by_agent[run["agent"]].append(run)
    rows = []
    for agent, its_runs in by_agent.items():
        values = [run["return"] for run in its_runs]
        iqm, low, high = bootstrap_interval(np.array(values)[:, None])
        rows.append(
            {
                "agent": agent,
                "seeds": len(values),
                "updates": round(statistics.fmean(run["updates"] for run in its_runs)),
                "iqm": float(iqm),
                "ci_low": float(low),
                "ci_high": float(high),
                "mean": statistics.fmean(values),
                "std": statistics.pstdev(values),
                "min": min(values),
                "max": max(values),
            }
        )
    return rows


def _interval_per_step(values: Array) -> tuple[Array, Array, Array]:
    points = [bootstrap_interval(column[:, None]) for column in values.T]
    middle, low, high = np.array(points).T
    return middle, low, high


INTERVAL = Band("interquartile mean, 95% bootstrap interval", _interval_per_step)


def run_or_resume(job: Job, console: Console) -> bool:
    """Bring one run to its end.

    Returns:
        Whether it is there; else a signal ended it, and it is saved.

    Raises:
        TrainingError: as :func:`diffcore.training.train` and ``resume`` do.
    """
    run = job.run
    if run.checkpoint.is_file():
        steps = job.config.total_steps
        same = run.read_config()["train"]["total_steps"] == steps
        result = resume(run.path, total_steps=None if same else steps, console=console)
    else:
        if run.path.exists():  # it was killed before its first checkpoint
            run.lock().release()  # unless it is still going: then this raises
            shutil.rmtree(run.path)
        result = train(job.config, job.agent_config, console=console)
    return not result.interrupted


def _run_in_turn(jobs: list[Job], output: Path, parallel: int, console: Console) -> bool:
    for i, job in enumerate(jobs):
        say(console, f"[{i + 1}/{len(jobs)}] {job}")
        if not run_or_resume(job, console):
            return False
    return True


def _run_in_parallel(jobs: list[Job], output: Path, parallel: int, console: Console) -> bool:
    threads = max(1, (os.cpu_count() or 1) // parallel)
    context = multiprocessing.get_context("spawn")  # a forked process would run on one thread
    waiting = list(jobs)
    running: dict[Path, tuple[Job, BaseProcess]] = {}
    failed: list[Path] = []
    complete = True
    with Interruption() as interruption:
        stopped = False
        while running or (waiting and not interruption.requested):
            while waiting and len(running) < parallel and not interruption.requested:
                job = waiting.pop(0)
                if job.config.threads is None:
                    job = dataclasses.replace(
                        job, config=dataclasses.replace(job.config, threads=threads)
                    )
                log = output / f"{job.name}-s{job.config.seed}.log"
                process: BaseProcess = context.Process(target=_run_in_process, args=(job, log))
                process.start()
                running[log] = (job, process)
                say(console, f"{job}: started, log in {log}")
            wait([process.sentinel for _, process in running.values()], timeout=0.2)
            if interruption.requested and not stopped:
                stopped = True
                for _, stopping in running.values():
                    stopping.terminate()  # a run takes that as Ctrl-C: it saves and ends
            for log, (job, ended) in list(running.items()):
                if ended.exitcode is None:
                    continue
                del running[log]
                complete = complete and ended.exitcode == 0
                if ended.exitcode != 0 and not interruption.requested:
                    failed.append(log)
                say(console, f"{job}: {'complete' if ended.exitcode == 0 else 'not complete'}")
    if failed:
        last = [text for text in failed[0].read_text().splitlines() if text] or ["it left no word"]
        logs = ", ".join(map(str, failed))
        raise TrainingError(f"{len(failed)} of the runs failed, see {logs}: {last[-1]}")
    return complete and not waiting


def _run_in_process(job: Job, log: Path) -> None:
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):  # warnings of C++ libraries too
            os.dup2(file.fileno(), stream.fileno())
        console = Console(file=file, width=120)
        try:
            sys.exit(0 if run_or_resume(job, console) else 1)
        except TrainingError as error:
            say(console, f"error: {error}")
            sys.exit(1)


UNIMPORTANT = ({*RESUMABLE} - {"eval_interval"}) | {"run_dir", "runs_dir"}
"""The settings in which a run may differ from the one that is asked for. Curves need common steps, or
else it would be all that a run can be resumed with other values of."""


def _check_settings(job: Job) -> None:
    """Refuse to take a run for another one.

    Raises:
        RunError: if the run that is there already isn't the one that is asked for.
    """
    there = RunDirectory.open(job.run.path).read_config()
    asked = {"train": to_dict(job.config), "agent": to_dict(job.agent_config)}
    asked = json.loads(json.dumps(asked))  # tuples become lists, as in config.json
    agent = agent_name(job.agent_config)
    if there["agent"] != agent:
        raise RunError(f"{job.run.path} is a run of {there['agent']}, not of {agent}")
    # A run from before there was a setting was made as the setting's default has it.
    settings = {**to_dict(TrainConfig(job.config.env)), **there["train"]}
    for old, new in ((settings, asked["train"]), (there["agent_config"], asked["agent"])):
        for name in sorted(old.keys() | new.keys()):
            if name not in UNIMPORTANT and old.get(name) != new.get(name):
                raise RunError(
                    f"{job.run.path} was trained with {name} {old.get(name)!r}, asked for is "
                    f"{new.get(name)!r}; choose another directory (--output) or remove that run"
                )
    if there["train"]["total_steps"] > job.config.total_steps:
        raise RunError(
            f"{job.run.path} is set to {there['train']['total_steps']:,} steps, asked for are "
            f"{job.config.total_steps:,}; choose another directory (--output)"
        )


def _is_complete(job: Job) -> bool:
    """Whether all steps are done, evaluated and saved. The weights are what a run writes last."""
    run = job.run
    if not (run.evaluations.is_file() and run.checkpoint.is_file()):
        return False
    steps, _ = read_series(run.evaluations, "mean_return")
    saved = load_checkpoint(run.checkpoint, verify=False)["step"]
    ends = bool(steps) and steps[-1] == saved == run.weights_step()
    return ends and saved >= job.config.total_steps


def _final_row(job: Job, last_evaluations: int) -> dict[str, Any]:
    """Mean return of a run's last evaluations, and the updates that it took.

    Raises:
        RunError: if it has fewer.
    """
    steps, returns = read_series(job.run.evaluations, "mean_return")
    if len(returns) < last_evaluations:
        raise RunError(
            f"{job.run.path} has {len(returns)} evaluations, asked for is the mean of the last "
            f"{last_evaluations}; ask for fewer (--last-evaluations), the runs are kept"
        )
    _, updates = read_series(job.run.progress, "updates")
    return {
        "agent": job.name,
        "seed": job.config.seed,
        "step": steps[-1],
        "updates": int(updates[-1]),
        "return": statistics.fmean(returns[-last_evaluations:]),
    }


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def _table(env: str, rows: list[dict[str, Any]], last_evaluations: int = 1) -> Table:
    """The part of the summary that fits a terminal of 80 columns."""
    last = "evaluation" if last_evaluations == 1 else f"{last_evaluations} evaluations"
    title = f"Final return on {env}: mean of the last {last} of each run"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    for name in ("agent", "seeds", "updates", "IQM", "95% interval", "mean ± std"):
        table.add_column(name, justify="left" if name == "agent" else "right")
    for row in rows:
        table.add_row(
            row["agent"],
            str(row["seeds"]),
            f"{row['updates']:,}",
            f"{row['iqm']:.1f}",
            f"{row['ci_low']:.1f} .. {row['ci_high']:.1f}",
            f"{row['mean']:.1f} ± {row['std']:.1f}",
        )
    return table
