"""Checkpoints: whole or not there, and never anything else's file."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from diffcore.training import CheckpointError
from diffcore.training.checkpoint import copy_tensors, load_checkpoint, save_checkpoint

CONTENTS: dict[str, Any] = {
    "step": 7,
    "big": 2**127 + 1,
    "nested": {"list": [1, 2.5, None, "text"], "tuple": (True, b"bytes")},
    "tensor": torch.arange(1000, dtype=torch.float64),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "checkpoint.pt", CONTENTS)
    return tmp_path / "checkpoint.pt"


def assert_holds_contents(path: Path) -> None:
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["tensor"], CONTENTS["tensor"])
    for name in ("step", "big", "nested"):
        assert loaded[name] == CONTENTS[name]


def test_round_trip(path: Path) -> None:
    assert_holds_contents(path)
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


def test_a_truncated_file_is_refused_wherever_it_ends(path: Path) -> None:
    data = path.read_bytes()
    for size in [0, 1, 3, 100, *range(200, len(data), 997), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt"):
            load_checkpoint(path)


def test_a_flipped_bit_is_refused_or_harmless(path: Path) -> None:
    data = path.read_bytes()
    refused = 0
    for at in range(0, len(data), 61):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        try:
            assert_holds_contents(path)  # the bit was in padding
        except CheckpointError:
            refused += 1
    assert refused > len(data) // 61 // 2


def test_unverified_reading_looks_at_no_tensor(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(CONTENTS["tensor"].numpy().tobytes())
    data[at + 100] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is damaged"):
        load_checkpoint(path)
    assert load_checkpoint(path, verify=False)["step"] == 7


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt"
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*foreign\.pt"):
        load_checkpoint(path)
    path.write_text("not a checkpoint, but quite a long text " * 100)
    with pytest.raises(CheckpointError, match="truncated, damaged or not a checkpoint"):
        load_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photo.txt", "a zip archive of something else")
    with pytest.raises(CheckpointError, match="can't be read as a checkpoint"):
        load_checkpoint(path)
    torch.save({"model": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of diffcore"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="not a checkpoint of diffcore"):
        load_checkpoint(path)


def test_another_format_version_is_refused(path: Path) -> None:
    contents = torch.load(path, weights_only=True)
    torch.save({**contents, "version": 99}, path)
    with pytest.raises(CheckpointError, match="format version 99, this diffcore reads version 1"):
        load_checkpoint(path)


class Attack:
    """What a pickle from a stranger may contain."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("attacked",))


def test_loading_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "diffcore-checkpoint", "version": 1, "x": Attack()}, "attack.pt")
    with pytest.raises(CheckpointError, match=r"attack\.pt can't be read"):
        load_checkpoint(Path("attack.pt"))
    Path("attack.pkl").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError):
        load_checkpoint(Path("attack.pkl"))
    assert not Path("attacked").exists()


def test_copies_outlive_the_file(path: Path) -> None:
    kept = copy_tensors(load_checkpoint(path))
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(kept["tensor"], CONTENTS["tensor"])
    assert kept["nested"] == CONTENTS["nested"]


BIGGER: dict[str, Any] = {"tensor": torch.zeros(400_000)}


def assert_refuses_and_keeps_the_previous(path: Path, cause: str) -> None:
    with pytest.raises(CheckpointError, match=rf"can't write .*checkpoint\.pt: .*{cause}"):
        save_checkpoint(path, BIGGER)
    assert_holds_contents(path)
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("room", [0, 100, 100_000])
def test_a_write_that_finds_the_disk_full(
    path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    from diffcore.training import files

    class FullDisk(files._ErrorKeeper):
        written = 0

        def write(self, data: bytes) -> int:
            FullDisk.written += len(data)
            if FullDisk.written > room:
                self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                raise self.error
            return super().write(data)

    monkeypatch.setattr(files, "_ErrorKeeper", FullDisk)
    assert_refuses_and_keeps_the_previous(path, "No space left on device")


def test_a_disk_that_is_full_only_when_the_file_is_synced(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    assert_refuses_and_keeps_the_previous(path, "No space left on device")


def test_a_file_size_limit(path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        assert_refuses_and_keeps_the_previous(path, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_really_full(tiny_disk: Path) -> None:
    path = tiny_disk / "checkpoint.pt"
    save_checkpoint(path, CONTENTS)
    assert_refuses_and_keeps_the_previous(path, "No space left on device")


def test_an_interrupted_write_leaves_the_previous(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, BIGGER)
    assert_holds_contents(path)
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"can't write .*gone.*No such file or directory"):
        save_checkpoint(tmp_path / "gone" / "checkpoint.pt", CONTENTS)
