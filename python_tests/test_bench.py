"""The benchmarks run, check what they time, and notice when something got slower."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import diffcore
from diffcore import ops

BENCH = Path(__file__).parent.parent / "bench"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH), *arguments], capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON file of a quick run of everything but torch.compile and JAX."""
    directory = tmp_path_factory.mktemp("results")
    # On one thread: a busy machine makes teams wait for threads that it doesn't run.
    settings = ("--threads", "1", "--no-compile", "--no-jax")
    done = bench("--quick", *settings, "--output", str(directory))
    assert done.returncode == 0, done.stderr
    assert "speed-up" in done.stdout
    (file,) = directory.glob("*.json")
    return file


def test_all_sections_are_measured_and_checked(stored: Path) -> None:
    results = json.loads(stored.read_text())
    assert {row["op"] for row in results["rows"]} == {
        "reverse_diffusion",
        "reverse_step",
        "action_gradient",
        "mlp",
        "critic_update",
        "denoising_update",
        "squashed_gaussian",
        "soft_value",
        "rff_features",
        "score_matching_loss",
        "representation_loss",
        "dipo_step",
        "diffsr_update",
    }
    assert results["latency"]
    assert results["contention"]
    assert results["environment"]["cpu"]
    for row in results["rows"]:
        assert row["q25"] <= row["median"] <= row["q75"]
        assert row["error"] is not None
        assert row["error"][0] < 1e-2


def test_jax_computes_the_same() -> None:
    pytest.importorskip("jax")
    cases = ("reverse_diffusion", "reverse_step", "action_gradient", "mlp", "critic_update")
    cases += ("denoising_update", "squashed_gaussian", "soft_value", "representation_loss")
    cases += ("dipo_step", "diffsr_update")
    done = bench("--quick", "--no-compile", "--no-save", "--brief", "--only", *cases)
    assert done.returncode == 0, done.stderr
    assert all("JAX" in line for line in done.stdout.splitlines())


TARGETS = """
import functools, importlib.util, eager, torch, workloads
from diffcore.agents import DIPO, DIPOConfig

small = {"hidden_dim": 8, "diffusion_steps": 2, "batch_size": 4, "action_gradient_steps": 1}
agent = DIPO(3, 1, DIPOConfig(**small, update_actor_target_every=2), seed=0)
replay = workloads.random_replay(3, 1, 50)
forms = {}
for form in (eager.EagerDIPO, eager.OptimisedDIPO):
    theirs = form(agent)
    update = functools.partial(theirs.update, replay, torch.Generator().manual_seed(0))
    forms[form.__name__] = update, lambda a=theirs: workloads.flat(a.actor_target.parameters())
if importlib.util.find_spec("jax"):
    import jax_baselines as jax
    in_jax, arrays = jax.JaxDIPO(agent), [jax.replay_arrays(replay)]
    forms["JAX"] = (
        lambda: arrays.append(in_jax.update(arrays.pop())),
        lambda: jax.flat(in_jax.agent.actor_target),
    )
for name, (update, target) in forms.items():
    moved = []
    for _ in range(4):
        before = target()
        update()
        moved.append(not torch.equal(before, target()))
    assert moved == [True, False, True, False], (name, moved)
"""


def test_competitors_move_their_targets_as_often_as_ours() -> None:
    """Of several updates a check of one knows nothing."""
    done = subprocess.run(
        [sys.executable, "-c", TARGETS], cwd=BENCH, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_overhead_is_measured_for_the_ops_that_keep_packs(tmp_path: Path) -> None:
    done = bench("--overhead", "--quick", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "overhead.md").read_text()
    for op in ("reverse_diffusion", "action_gradient", "mlp", "rff_features"):
        assert op in table
    assert table.strip() in done.stdout


def test_scaling_writes_curves_and_pictures(tmp_path: Path) -> None:
    done = bench("--scaling", "--quick", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    with (tmp_path / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["varies"] for row in rows} == {"batch", "width", "depth", "steps"}
    assert all(float(row["seconds"]) > 0 for row in rows)
    for op in ("reverse_diffusion", "action_gradient"):
        assert (tmp_path / f"scaling-{op}.png").stat().st_size > 10_000


def test_memory_counts_calls_and_peaks() -> None:
    done = bench("--memory", "--quick", "--env", "Pendulum-v1", "--no-save")
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split("|")[0].strip() for line in done.stdout.splitlines()]
    assert {line.removesuffix(", backward") for line in lines} >= set(ops.__all__)
    assert "update of DIPO, diffcore" in lines


def test_profile_adds_up_to_a_step(tmp_path: Path) -> None:
    done = bench("--profile", "--quick", "--env", "Pendulum-v1", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (tmp_path / "profile.md").read_text().splitlines()
        if line.startswith("|") and " ms " in line
    ]
    *parts, total = [float(line[1].removesuffix(" ms")) for line in lines]
    assert total > 0
    assert sum(parts) == pytest.approx(total, abs=0.1)


def test_kernels_are_timed_part_by_part(tmp_path: Path) -> None:
    program = tmp_path / "kernel_parts"
    flags = ("-O1", "-std=gnu++17", "-fopenmp", "-w", f"-I{BENCH.parent / 'csrc' / 'cpu'}")
    isa = ("-DDIFFCORE_ISA=baseline", "-DDIFFCORE_ISA_BASELINE")
    source = BENCH / "kernel_parts.cpp"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, *flags, *isa, str(source), "-o", str(program)], check=True)
    done = subprocess.run([program, "20", "1"], capture_output=True, text=True, check=True)
    first, *parts = done.stdout.splitlines()
    assert first == "64 rows, hidden width 20"
    products = {"hidden layer, mish": 20 * 20, "output layer": 6 * 20, "mish alone": 0}
    for name, count in products.items():
        (line,) = (part for part in parts if part.startswith(f"{name}  "))
        ticks, needed = (float(word) for word in line[44:].split() if word[0].isdigit())
        assert ticks > 0.0
        assert needed == pytest.approx(count / 4 / 2)  # two products of four numbers a tick
    for wrong in ("0", "1025"):
        refused = subprocess.run([program, wrong], capture_output=True, text=True)
        assert refused.returncode == 2
        assert "hidden width" in refused.stderr


def test_check_fails_when_a_ratio_fell(stored: Path, tmp_path: Path) -> None:
    assert bench("--from", str(stored), "--check", str(stored)).returncode == 0
    results = json.loads(stored.read_text())
    for row in results["rows"]:
        if row["variant"] == "diffcore":
            row["median"] *= 1.2
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(results))
    done = bench("--from", str(slower), "--check", str(stored))
    assert done.returncode == 1
    assert "recorded" in done.stdout


def test_check_refuses_another_processor(stored: Path, tmp_path: Path) -> None:
    results = json.loads(stored.read_text())
    results["environment"]["cpu"] = "another"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(results))
    done = bench("--from", str(other), "--check", str(stored))
    assert done.returncode == 1
    assert "another" in done.stderr


def test_builds_are_compared(tmp_path: Path) -> None:
    """One with itself: what is printed, not how long it takes."""
    installed = str(Path(diffcore.__file__).parent.parent)
    script = str(BENCH / "compare_builds.py")

    def compare(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, script, *arguments, "--seconds", "0.1"]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = compare(installed, installed, "--only", "16 rows, width 64, 1 thread")
    assert done.returncode == 0, done.stderr
    header, row = done.stdout.splitlines()
    assert header.split() == ["new", "by", "old", "old,", "least", "least", "quiet", "disturbed"]
    assert row.startswith("chain of 16 rows, width 64, 1 thread ")
    least, unit, ratio = row[42:].split()[:3]
    assert float(least) > 0
    assert unit == "ms"
    assert float(ratio) > 0

    done = compare(installed, installed, "--only", "nothing")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --only: 'nothing' is in no case's name: chain, width 64")
    done = compare(installed, str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}: expected a directory")
