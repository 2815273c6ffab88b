"""Writing files so that a crash, a full disk or a power failure leaves the old or the new one."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from diffcore.training.errors import WriteError


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it there.

    Raises:
        WriteError: if any of it fails; names the path and the cause.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as raw:
            file = _ErrorKeeper(raw)
            try:
                write(file)  # type: ignore[arg-type]
            except RuntimeError as error:
                # torch.save hides the cause of a failed write behind an error of its own.
                raise file.error or error from error
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except (OSError, RuntimeError) as error:
        raise WriteError(f"can't write {path}: {error}") from error
    finally:
        with suppress(OSError):  # it is gone already if all went well
            temporary.unlink()


class _ErrorKeeper:
    """A file that remembers the first error of the system."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def _sync_directory(directory: Path) -> None:
    """Make a rename survive a power failure. Windows can't, and needn't, open a directory."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
