"""The benchmarks run, check what they time, and notice when something got slower."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH), *arguments], capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON file of a quick run of everything but torch.compile."""
    directory = tmp_path_factory.mktemp("results")
    done = bench("--quick", "--no-compile", "--output", str(directory))
    assert done.returncode == 0, done.stderr
    assert "speed-up" in done.stdout
    (file,) = directory.glob("*.json")
    return file


def test_all_sections_are_measured_and_checked(stored: Path) -> None:
    results = json.loads(stored.read_text())
    ops = {row["op"] for row in results["rows"]}
    assert ops == {"reverse_diffusion", "action_gradient", "mlp", "dipo_step"}
    assert results["latency"]
    assert results["contention"]
    assert results["environment"]["cpu"]
    for row in results["rows"]:
        assert row["q25"] <= row["median"] <= row["q75"]
        assert row["error"] is not None
        assert row["error"][0] < 1e-2


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
