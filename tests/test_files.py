from __future__ import annotations

import errno
import fcntl
import io
import os
import sys
import zipfile

import pytest
import torch

from hydrogel_gym.archives import check_state, check_zip, load_archive
from hydrogel_gym.errors import UsageError
from hydrogel_gym.files import make_folder, remove_unfinished, write_atomically
from hydrogel_gym.output import unfailing_output


def test_new_file_follows_the_umask_where_its_folder_cannot_be_flushed(tmp_path, monkeypatch):
    flush = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a.json", b"{}")
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["a.json"]


def test_file_that_cannot_be_flushed_is_not_written_and_a_file_is_no_folder(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(UsageError, match=r"--output-dir .*json cannot be written to: File exists"):
        make_folder(path, "--output-dir")


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    left = tmp_path / "top" / "P0007" / ".designs.parquet.0a1b2c3d"
    left.parent.mkdir(parents=True)
    kept = [tmp_path / name for name in (".notes.txt.01234567", ".a.json", "a.json.01234567")]
    for path in (left, *kept):
        path.touch()
    writing = tmp_path / ".part-00001.parquet.89abcdef"
    with writing.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another process that still writes
        remove_unfinished(tmp_path)
        assert not left.exists()
        assert all(path.exists() for path in (writing, *kept))
    remove_unfinished(tmp_path)
    assert not writing.exists()


def test_any_flipped_bit_of_an_archive_is_noticed(tmp_path):
    torch.save({"weight": torch.arange(64.0)}, tmp_path / "w.pt")
    content = (tmp_path / "w.pt").read_bytes()
    start = content.index(torch.arange(64.0).numpy().tobytes())
    for place in range(start, start + 256, 17):
        damaged = bytearray(content)
        damaged[place] ^= 1
        (tmp_path / "w.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match="it is damaged: .*data/0 does not have its checksum"):
            load_archive(tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes(content[:-100])
    with pytest.raises(ValueError, match="it is cut off, or is no archive of weights"):
        load_archive(tmp_path / "w.pt")


def test_archive_larger_than_its_file_is_refused_before_it_is_read():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(10_000_000))
    with pytest.raises(ValueError, match="its members add up to 10,000,000 bytes, more than the"):
        check_zip(buffer, len(buffer.getvalue()))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "a is missing"),
        ({"a": torch.zeros(2), "b": torch.zeros(1)}, "b is unknown"),
        ({"a": torch.zeros(3)}, r"a has shape \(3,\); expected \(2,\)"),
        ({"a": torch.tensor([0.0, torch.nan])}, "a is not finite"),
        # Weights that repeat themselves are counted in full.
        ({"a": torch.zeros(1).expand(2)}, "add up to 8 bytes, more than the file's 7"),
    ],
)
def test_weights_that_do_not_fit_are_refused(state, message):
    with pytest.raises(ValueError, match=message):
        check_state(state, {"a": torch.zeros(2, device="meta")}, 7 if "bytes" in message else 100)


class _Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_stream_that_is_gone_ends_nothing_and_letters_it_lacks_are_escaped(monkeypatch):
    for stream in (_Gone(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        with unfailing_output():
            print("lost", file=sys.stderr)
        assert sys.stderr is stream
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with unfailing_output():
        print("M\u00fcller")
    assert written.getvalue() == b"M\\xfcller\n"
