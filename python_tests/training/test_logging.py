"""Logs: CSV files that survive crashes and full disks, and metrics read late."""

from __future__ import annotations

import math
import weakref
from pathlib import Path

import pytest
import torch

from diffcore.training import RunError
from diffcore.training.logging import (
    CSVLog,
    MetricAverages,
    TensorBoardLog,
    read_csv,
    read_series,
)


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def log(tmp_path: Path, warnings: list[str]) -> CSVLog:
    return CSVLog(tmp_path / "log.csv", warnings.append)


def test_rows_are_on_the_disk_at_once_and_read_back_exactly(log: CSVLog) -> None:
    value = 0.1 + 0.2
    log.write({"step": 1, "value": value})
    assert log.path.read_text() == f"step,value\n1,{value!r}\n"
    assert read_series(log.path, "value") == ([1], [value])


def test_a_late_column_is_empty_in_the_rows_before(log: CSVLog) -> None:
    log.write({"step": 1})
    log.write({"step": 2, "loss": 0.5})
    log.write({"step": 3})
    assert log.path.read_text() == "step,loss\n1,\n2,0.5\n3,\n"
    assert read_series(log.path, "loss") == ([2], [0.5])


def test_numpy_floats_are_written_as_numbers(log: CSVLog) -> None:
    import numpy as np

    log.write({"step": 1, "value": np.float64(0.5)})
    assert log.path.read_text() == "step,value\n1,0.5\n"


def test_an_existing_log_is_continued_and_cut_back(log: CSVLog, warnings: list[str]) -> None:
    for step in range(4):
        log.write({"step": step, "value": step / 2})
    again = CSVLog(log.path, warnings.append)
    assert len(again) == 4
    again.truncate(2)
    again.write({"step": 9, "value": 9.0})
    assert log.path.read_text() == "step,value\n0,0.0\n1,0.5\n9,9.0\n"
    assert warnings == []


def test_a_row_that_a_crash_cut_short_is_dropped(log: CSVLog, warnings: list[str]) -> None:
    log.write({"step": 1, "value": 1.0})
    with log.path.open("a") as file:
        file.write("2,0.")
    again = CSVLog(log.path, warnings.append)
    again.write({"step": 2, "value": 2.0})
    assert log.path.read_text() == "step,value\n1,1.0\n2,2.0\n"


def test_rows_that_find_the_disk_full_are_written_later(
    log: CSVLog, warnings: list[str], tmp_path: Path
) -> None:
    log.write({"step": 1})
    log.path = tmp_path / "gone" / "log.csv"  # as good as any way to make writing fail
    log.write({"step": 2})
    log.write({"step": 3})
    assert len(warnings) == 2
    assert "can't write" in warnings[0]
    log.path = tmp_path / "log.csv"
    log.write({"step": 4})
    assert log.path.read_text() == "step\n1\n2\n3\n4\n"


def test_a_row_that_finds_place_for_a_part_leaves_none(log: CSVLog, warnings: list[str]) -> None:
    resource = pytest.importorskip("resource")
    log.write({"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 2, limits[1]))
    try:
        log.write({"step": 1234})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(warnings) == 1
    assert log.path.read_text() == "step\n1\n"
    log.write({"step": 5678})
    assert log.path.read_text() == "step\n1\n1234\n5678\n"


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    with pytest.raises(RunError, match="can't read"):
        read_csv(path)
    path.write_text("step,value\n1,2,3\n")
    with pytest.raises(RunError, match="rows don't fit its header"):
        read_csv(path)
    path.write_text("step,value\n1,hello\n")
    with pytest.raises(RunError, match="isn't a number"):
        read_series(path, "value")
    with pytest.raises(RunError, match="no columns 'step' and 'other'"):
        read_series(path, "other")


def test_metrics_are_averaged_over_the_interval() -> None:
    averages = MetricAverages()
    averages.add({"loss": torch.tensor(1.0), "rate": 2.0})
    averages.add({"loss": torch.tensor(2.0), "rate": 4.0, "late": torch.tensor(5.0)})
    assert averages.pop() == {"loss": 1.5, "rate": 3.0, "late": 5.0}
    assert averages.pop() == {}


def test_metrics_are_not_read_before_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(tensor: torch.Tensor) -> float:
        raise AssertionError("the training loop waited for a metric")

    averages = MetricAverages()
    with monkeypatch.context() as patch:
        for name in ("item", "__float__", "tolist", "cpu", "numpy"):
            patch.setattr(torch.Tensor, name, read)
        averages.add({"loss": torch.tensor(1.0)})
    assert averages.pop() == {"loss": 1.0}


def test_metrics_hold_no_graph() -> None:
    class Saved:
        """What the graph keeps in place of a tensor."""

    kept = []

    def pack(tensor: torch.Tensor) -> Saved:
        saved = Saved()
        kept.append(weakref.ref(saved))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: torch.zeros(())):
        loss = torch.zeros((), requires_grad=True).exp()
    averages = MetricAverages()
    averages.add({"loss": loss})
    assert [saved() is None for saved in kept] == [False]
    del loss
    assert [saved() is None for saved in kept] == [True]
    assert averages.pop() == {"loss": 1.0}


def test_metrics_go_on_after_saving() -> None:
    values = [0.1, 0.7, 0.3]
    whole, first, second = MetricAverages(), MetricAverages(), MetricAverages()
    for value in values:
        whole.add({"loss": torch.tensor(value)})
    first.add({"loss": torch.tensor(values[0])})
    second.load_state_dict(first.state_dict())
    for value in values[1:]:
        second.add({"loss": torch.tensor(value)})
    assert whole.pop() == second.pop()


def test_diverged_metrics_are_logged_as_they_are(log: CSVLog) -> None:
    averages = MetricAverages()
    averages.add({"loss": torch.tensor(math.inf)})
    averages.add({"loss": torch.tensor(-math.inf)})
    log.write({"step": 1, **averages.pop()})
    assert log.path.read_text() == "step,loss\n1,nan\n"


def scalars(directory: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("progress/loss")]


def test_tensorboard_has_no_duplicates_after_resuming(tmp_path: Path, warnings: list[str]) -> None:
    first = TensorBoardLog(tmp_path, 0, warnings.append)
    for step in (1, 2, 3):
        first.write("progress", {"step": step, "loss": 0.5})
    first.close()
    second = TensorBoardLog(tmp_path, 3, warnings.append)
    second.write("progress", {"step": 3, "loss": 0.25})
    second.close()
    assert scalars(tmp_path) == [(1, 0.5), (2, 0.5), (3, 0.25)]
    assert warnings == []
