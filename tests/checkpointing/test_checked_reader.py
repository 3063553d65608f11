"""Checksums are formed while files are read and written, whatever is read in which order."""

from __future__ import annotations

import io
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from raytrainer.checkpointing import checked_reader, checkpoint_files
from raytrainer.checkpointing.checked_reader import CheckedReader, check_file, checked_pieces
from raytrainer.checkpointing.checkpoint_format import read_checkpoint, write_checkpoint
from raytrainer.checkpointing.checksums import ChecksummedWriter, FileRecord
from raytrainer.checkpointing.running_checksum import RunningChecksum
from raytrainer.errors import CheckpointError, GivenUpError

CONTENT = random.Random(0).randbytes(5000)


def _sum(data: bytes) -> str:
    return "xxh3_128:" + xxhash.xxh3_128(data).hexdigest()


RECORD = FileRecord(len(CONTENT), _sum(CONTENT))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, size in (("checked_reader", "_PIECE"), ("checked_reader", "_FAR_PIECE"), ("checksums", "_PIECE")):
        monkeypatch.setattr(f"raytrainer.checkpointing.{module}.{size}", 70)
    monkeypatch.setattr(checked_reader, "_GAP", 300)


def test_what_is_written() -> None:
    sink = io.BytesIO()
    writer = ChecksummedWriter(sink)
    writer.write(CONTENT[:30])
    writer.write(CONTENT[30:2000])
    part = writer.write_part(CONTENT[2000:4500])
    writer.write(CONTENT[4500:])
    assert writer.record() == RECORD and sink.getvalue() == CONTENT
    assert part == FileRecord(2500, _sum(CONTENT[2000:4500]))


def test_a_writer_that_is_given_up() -> None:
    asked = iter([False, False, True])
    writer = ChecksummedWriter(io.BytesIO(), lambda: next(asked))
    writer.write(CONTENT)
    with pytest.raises(GivenUpError, match="after 140 bytes"):
        writer.record()


def test_whatever_is_read_in_which_order() -> None:
    draws = random.Random(1)
    places = [
        [(0, 5000)],
        [],
        [(4900, 100), (0, 20), (20, 2000), (2050, 2000), (4100, 900)],  # the index first, and gaps, as torch does
        [(3000, 1000), (0, 3000), (2000, 3000)],  # backwards, and twice
        [(draws.randrange(5000), draws.randrange(1000)) for _ in range(30)],
    ]
    for reads in places:
        for damaged in (None, 0, 10, 2030, 3500, 4999):
            content = bytearray(CONTENT)
            if damaged is not None:
                content[damaged] ^= 1
            verdict = None
            try:
                with CheckedReader(io.BytesIO(content), RECORD, "x") as file:
                    for begin, size in reads:
                        file.seek(begin)
                        got = file.read(size)
                        assert got == content[begin : begin + size] and file.tell() == begin + len(got)
            except CheckpointError as error:
                verdict = str(error)
            assert (verdict is None) == (damaged is None), (reads, damaged)
            assert verdict is None or "x: the file is damaged: its content is not what was written" in verdict


def test_an_interrupted_reader_reads_nothing_more() -> None:
    class Interrupted(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            if self.tell() > 700:
                raise KeyboardInterrupt
            return super().readinto(buffer)

    source = Interrupted(CONTENT)
    with pytest.raises(KeyboardInterrupt), CheckedReader(source, RECORD, "x") as file:
        file.readinto(bytearray(5000))
    assert source.tell() == 770


@pytest.mark.parametrize("reason", [KeyboardInterrupt, OSError(5, "broken")])
def test_what_stops_the_reading_is_told_where_torch_makes_another_error_of_it(reason: Any) -> None:
    class Stopped(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            if self.tell() > 700:
                raise reason
            return super().readinto(buffer)

    source, kind = Stopped(CONTENT), reason if isinstance(reason, type) else type(reason)
    with pytest.raises(kind), CheckedReader(source, RECORD, "x") as file:
        with suppress(BaseException):
            file.readinto(bytearray(5000))
        raise AttributeError("'CheckedReader' object has no attribute 'read'")


def test_ctrl_c_is_told_as_such_wherever_it_strikes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's readers and writers make other errors of what is raised in what they call."""
    state = {"state_dict": {f"layer{i}": torch.full((50, 100), float(i)) for i in range(6)}}
    monkeypatch.setattr(checkpoint_files, "_LARGE", 1)
    update, until, whole = RunningChecksum.update, Counter[str](), tmp_path / "whole.ckpt"

    def interrupted(self: RunningChecksum, data: memoryview) -> None:
        until["strike"] -= 1
        if until["strike"] == 0:
            os.kill(os.getpid(), signal.SIGINT)
        update(self, data)

    def calls(work: Callable[[], object]) -> int:
        until["strike"] = 0
        work()
        return -until["strike"]

    def strike(call: int, work: Callable[[], object]) -> None:
        until["strike"] = call
        with pytest.raises(KeyboardInterrupt):
            work()

    monkeypatch.setattr(RunningChecksum, "update", interrupted)
    writes, reads = calls(lambda: write_checkpoint(whole, state)), calls(lambda: read_checkpoint(whole))
    assert writes > 10 and reads > 10
    for call in range(1, writes, writes // 5):
        strike(call, lambda: write_checkpoint(tmp_path / "new.ckpt", state))
        assert not (tmp_path / "new.ckpt").exists()
    for call in range(1, reads, reads // 5):
        strike(call, lambda: read_checkpoint(whole))
    until["strike"] = 0
    assert torch.equal(read_checkpoint(whole)["state_dict"]["layer5"], state["state_dict"]["layer5"])


@pytest.mark.parametrize("keep", [True, False])
def test_a_whole_file(keep: bool) -> None:
    into = memoryview(bytearray(5000)) if keep else None
    check_file(io.BytesIO(CONTENT), RECORD, "x", into)
    assert into is None or bytes(into) == CONTENT
    with pytest.raises(CheckpointError, match="x: the file ends after 4999 of 5000 bytes: it is truncated"):
        check_file(io.BytesIO(CONTENT[:-1]), RECORD, "x", into)
    with pytest.raises(CheckpointError, match="x: the file is damaged"):
        check_file(io.BytesIO(CONTENT[:-1] + b"~"), RECORD, "x", into)


def test_pieces_in_one_place() -> None:
    """They come whole and in order, each in the memory of the one before; damage is told after the last one."""

    def read(content: bytes) -> bytes:
        pieces, seen = checked_pieces(io.BytesIO(content), RECORD, "x"), bytearray()
        owners = {id((seen.extend(piece), piece.obj)[1]) for piece in pieces}
        assert len(owners) == 1
        return bytes(seen)

    assert read(CONTENT) == CONTENT
    with pytest.raises(CheckpointError, match="x: the file ends after 4999 of 5000 bytes: it is truncated"):
        read(CONTENT[:-1])
    with pytest.raises(CheckpointError, match="x: the file is damaged"):
        read(CONTENT[:-1] + b"~")
