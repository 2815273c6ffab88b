"""Checkpoints that are either whole or not there.

A checkpoint is an ordinary torch file of tensors and plain data, read with ``weights_only=True``,
so that opening one runs no code. It is a zip archive whose entries carry checksums; all of them are
verified before anything is used.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcore.training.errors import CheckpointError, WriteError
from diffcore.training.files import write_atomically

FORMAT = "diffcore-checkpoint"
VERSION = 1


def save_checkpoint(path: Path, contents: dict[str, Any]) -> None:
    """Write ``contents`` to ``path``, replacing what is there only once all of it is on the disk.

    Args:
        path: the file; a temporary one beside it, ``<path>.tmp``, is used while writing.
        contents: tensors, numbers, strings, lists, tuples and dicts.

    Raises:
        CheckpointError: if it can't be written, for want of space for instance. What ``path`` held
            before is untouched.
    """
    contents = {"format": FORMAT, "version": VERSION, **contents}
    try:
        write_atomically(path, lambda file: torch.save(contents, file))
    except WriteError as error:
        raise CheckpointError(str(error)) from error


def load_checkpoint(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """Read and verify a checkpoint.

    Its tensors are mapped from the file, so that a large replay buffer is in memory only once:
    copy them (:func:`copy_tensors`) before keeping them.

    Args:
        path: the file.
        verify: check all its checksums, for which all of it is read. Without, what isn't a tensor is
            there at once.

    Raises:
        CheckpointError: if the file is missing, truncated, damaged or not such a checkpoint.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if verify else None
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged: the checksum of {damaged!r} is wrong")
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is truncated, damaged or not a checkpoint: {error}"
        ) from error
    # torch, pickle and zipfile raise about every kind of exception on damaged input.
    except Exception as error:
        raise CheckpointError(f"{path} can't be read as a checkpoint: {error}") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(f"{path} is a torch file, but not a checkpoint of diffcore training")
    if contents.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {contents.get('version')!r}, "
            f"this diffcore reads version {VERSION}"
        )
    return contents


def copy_tensors(tree: Any) -> Any:
    """A copy of nested dicts, lists and tuples, with every tensor in memory of its own."""
    if isinstance(tree, Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {key: copy_tensors(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(copy_tensors(item) for item in tree)
    return tree
