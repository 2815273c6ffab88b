"""Logs of a run: CSV files, TensorBoard, and metrics gathered without waiting for the device."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcore.training.errors import RunError, WriteError
from diffcore.training.files import write_atomically

Row = dict[str, float | int]


class CSVLog:
    """A CSV file that grows row by row, and can be cut back to an earlier length.

    A row is on its way to the disk when :meth:`write` returns; one that can't be written is kept
    and tried again with the next. A column that turns up later is added to the rows before it,
    empty. Floats are written in the shortest form that reads back as the same float.

    Args:
        path: the file; need not exist.
        warn: is told when rows can't be written.

    Raises:
        RunError: if the file exists but isn't such a log.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path = path
        self._warn = warn
        self._columns: list[str] = []
        self._rows: list[dict[str, str]] = []
        self._unwritten = 0
        self._header_changed = False
        if path.exists():
            self._columns, self._rows = read_csv(path)
            self._rewrite()  # drops a last line that a crash cut short

    def __len__(self) -> int:
        return len(self._rows)

    def write(self, row: Row) -> None:
        """Append ``row``."""
        new = [name for name in row if name not in self._columns]
        self._columns += new
        self._rows.append({name: _text(value) for name, value in row.items()})
        self._unwritten += 1
        self._header_changed = self._header_changed or bool(new)
        self._flush()

    def sync(self) -> None:
        """Have all rows on the disk, if it takes them."""
        self._flush()
        try:
            if self.path.exists():
                with self.path.open("ab") as file:
                    os.fsync(file.fileno())
        except OSError as error:
            self._warn(f"can't write {self.path}, will try again: {error}")

    def _flush(self) -> None:
        if not self._unwritten:
            return
        try:
            if self._header_changed:
                self._rewrite()
            else:
                self._append()
        except (OSError, WriteError) as error:
            self._warn(f"can't write {self.path}, will try again: {error}")
            return
        self._unwritten = 0
        self._header_changed = False

    def truncate(self, rows: int) -> None:
        """Keep the first ``rows`` rows only.

        Raises:
            WriteError: if the file can't be written.
        """
        if rows < len(self._rows):
            del self._rows[rows:]
            self._rewrite()

    def _rewrite(self) -> None:
        text = ",".join(self._columns) + "\n" + self._format(self._rows)
        write_atomically(self.path, lambda file: file.write(text.encode()))

    def _append(self) -> None:
        data = self._format(self._rows[-self._unwritten :]).encode()
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(data) != len(data):
                    raise OSError("the disk took only a part of it")
            except OSError:
                file.truncate(end)  # no half rows
                raise

    def _format(self, rows: list[dict[str, str]]) -> str:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self._columns, restval="", lineterminator="\n")
        writer.writerows(rows)
        return buffer.getvalue()


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of a CSV file. A last line without its end is left out.

    Raises:
        RunError: if the file can't be read or its rows don't fit its header.
    """
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        raise RunError(f"can't read {path}: {error}") from error
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    rows = list(reader)
    if any(None in row or None in row.values() for row in rows):
        raise RunError(f"{path} isn't a log of a run: its rows don't fit its header")
    return list(reader.fieldnames or []), rows


def read_series(path: Path, column: str) -> tuple[list[int], list[float]]:
    """Steps and values of one column of a log, where it has a value.

    Raises:
        RunError: if the file isn't a log with this column.
    """
    columns, rows = read_csv(path)
    if "step" not in columns or column not in columns:
        raise RunError(f"{path} has no columns 'step' and {column!r}")
    try:
        points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
    except ValueError as error:
        raise RunError(f"{path} holds something that isn't a number: {error}") from error
    return [step for step, _ in points], [value for _, value in points]


class MetricAverages:
    """Means of an agent's metrics over an interval.

    Tensors are kept as they come and read at the interval's end, all of one name in one transfer:
    the training loop never waits for a GPU.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float | Tensor]] = {}

    def add(self, metrics: dict[str, float | Tensor]) -> None:
        """Add the metrics of one update, each a float or a 0-d tensor."""
        for name, value in metrics.items():
            kept = value.detach() if isinstance(value, Tensor) else value
            self._values.setdefault(name, []).append(kept)

    def pop(self) -> Row:
        """The mean of each metric since the last call."""
        means = {name: sum(v) / len(v) for name, v in self._floats().items()}
        self._values = {}
        return dict(means)

    def state_dict(self) -> dict[str, Any]:
        """The values gathered since the last :meth:`pop`."""
        return {"values": self._floats()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state_dict`."""
        self._values = {name: list(values) for name, values in state["values"].items()}

    def _floats(self) -> dict[str, list[float]]:
        return {name: _read(values) for name, values in self._values.items()}


class TensorBoardLog:
    """Scalars for TensorBoard; gives up with a warning when they can't be written.

    Args:
        directory: where its files go.
        first_step: what earlier files say about this step and later ones is void.
        warn: is told when writing fails.
    """

    def __init__(self, directory: Path, first_step: int, warn: Callable[[str], None]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._warn = warn
        self._writer: Any = SummaryWriter(str(directory), purge_step=first_step or None)

    def write(self, group: str, row: Row) -> None:
        """Log every entry of ``row`` but ``step`` as ``group/entry`` at that step."""
        if self._writer is None:
            return
        try:
            for name, value in row.items():
                if name != "step":
                    self._writer.add_scalar(f"{group}/{name}", value, row["step"])
            self._writer.flush()
        except (OSError, RuntimeError, ValueError) as error:
            self._warn(f"TensorBoard logging stops here: {error}")
            self._writer = None

    def close(self) -> None:
        """Write what is pending."""
        if self._writer is not None:
            try:
                self._writer.close()
            except (OSError, RuntimeError, ValueError) as error:
                self._warn(f"TensorBoard logging stops here: {error}")


def _read(values: list[float | Tensor]) -> list[float]:
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return [float(value) for value in values]
    read = iter(torch.stack([tensor.reshape(()) for tensor in tensors]).tolist())
    return [float(next(read) if isinstance(value, Tensor) else value) for value in values]


def _text(value: float | int) -> str:
    return repr(float(value)) if isinstance(value, float) else str(value)
