"""Shards on their way to a checkpoint: the node that has them writes them; where it cannot, the driver does."""

from __future__ import annotations

import logging

import pytest
import ray
import torch

from raytrainer.checkpointing.checkpoint_format import read_checkpoint, write_checkpoint
from raytrainer.checkpointing.new_checkpoint import NewCheckpoint
from raytrainer.checkpointing.piece_files import brought_along
from raytrainer.checkpointing.pieces import KEY, Mark, brought_here, whole_state
from raytrainer.driver.workers import ray_parts
from raytrainer.driver.workers.ray_parts import PiecesInRay
from raytrainer.errors import GivenUpError, StorageError
from raytrainer.worker.actor.pieces_apart import apart

WHOLE = {"state_dict/weight": torch.arange(40.0).view(8, 5), "state_dict/half": torch.arange(6).view(6, 1).bfloat16()}


class Pieces(PiecesInRay):
    """Notes which ranks' bytes have come to the driver."""

    def __init__(self, *args):
        super().__init__(*args)
        self.fetched = []

    def _fetch(self, rank):
        self.fetched.append(rank)
        return super()._fetch(rank)


@pytest.fixture
def state(ray_session):
    """A state of two ranks, each of which has some rows, in Ray's memory."""
    node = ray.get_runtime_context().get_node_id()
    layouts, refs = [], []
    for rank in range(2):
        pieces = {}
        for key, whole in WHOLE.items():
            rows = len(whole) // 2
            block = whole[rank * rows : (rank + 1) * rows]
            pieces[key] = {"at": (rank * rows, 0), "shape": tuple(block.shape), "data": block}
        pieces["state_dict/none"] = {"at": (0,), "shape": (0,), "data": torch.empty(0)}
        rest, data = apart({KEY: pieces, "own": None})
        layouts.append(rest[KEY])
        refs.append(ray.put(data))
    tree = {key.split("/")[1]: Mark(key, tuple(whole.shape), whole.dtype) for key, whole in WHOLE.items()}
    pieces = Pieces(layouts, refs, [node] * 2, StorageError)
    return {"epoch": 1, "global_step": 2, "state_dict": tree, KEY: pieces}


def is_whole(path):
    found = read_checkpoint(path)["state_dict"]
    return all(torch.equal(found[key.split("/")[1]], whole) for key, whole in WHOLE.items())


def test_nodes_write_what_they_have(state, tmp_path):
    for _ in range(2):  # the second one replaces the first
        write_checkpoint(tmp_path / "a.ckpt", state)
        assert is_whole(tmp_path / "a.ckpt")
    names = sorted(path.name.split("-")[0] for path in (tmp_path / "a.ckpt").iterdir())
    assert names == ["meta.json", "pieces", "rank0", "rank1", "state"]
    assert state[KEY].fetched == []


def test_pieces_are_read_where_they_are(state):
    told = brought_along(state, [])
    assert type(told[KEY]) is list
    found = ray.get(ray.remote(num_cpus=0)(_whole).remote(ray.put(told)))
    assert all(torch.equal(found[key.split("/")[1]], whole) for key, whole in WHOLE.items())
    here = brought_here(state)
    assert torch.equal(here[KEY][1]["state_dict/weight"]["data"], WHOLE["state_dict/weight"][4:])


def _whole(state):
    return whole_state(state)["state_dict"]


def test_a_node_that_does_not_see_the_folder(state, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(NewCheckpoint, "marker", "elsewhere.json")
    logging.getLogger("raytrainer").addHandler(caplog.handler)
    try:
        for name in ("a.ckpt", "b.ckpt"):
            write_checkpoint(tmp_path / name, state)
            assert is_whole(tmp_path / name)
    finally:
        logging.getLogger("raytrainer").removeHandler(caplog.handler)
    assert state[KEY].fetched == [0, 1, 0, 1]
    assert sum("does not see this folder" in message for message in caplog.messages) == 1


def test_a_node_whose_process_ends(state, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_parts, "write_parts", _ends)
    write_checkpoint(tmp_path / "a.ckpt", state)
    assert is_whole(tmp_path / "a.ckpt") and state[KEY].fetched == [0, 1]


def _ends(*args):
    import os

    os._exit(1)


@pytest.mark.sample(0)
def test_what_cannot_be_state_is_told_and_leaves_nothing(state, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "a.ckpt", state)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(ray_parts, "write_parts", _fails)
    with pytest.raises(StorageError, match="the disk is full"):
        write_checkpoint(tmp_path / "a.ckpt", state)
    monkeypatch.setattr(ray_parts, "write_parts", _writes_elsewhere)
    with pytest.raises(StorageError, match="the file is not to be seen"):
        write_checkpoint(tmp_path / "a.ckpt", state)
    assert sorted(tmp_path.rglob("*")) == before and is_whole(tmp_path / "a.ckpt") and state[KEY].fetched == []


def _fails(path, shown, marker, environment, plans, *pieces):
    from raytrainer.errors import GivenUpError, StorageError

    return [GivenUpError("as the other"), StorageError("the disk is full")]


def _writes_elsewhere(path, shown, marker, environment, plans, *pieces):
    from raytrainer.checkpointing.checksums import FileRecord
    from raytrainer.checkpointing.part_file import PartRecord

    return [PartRecord(FileRecord(1, None), {}) for _ in plans]


@pytest.mark.sample(0)
def test_giving_up_ends_what_nodes_write(state, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_parts, "write_parts", _never_ends)
    asked = []

    def given_up():
        asked.append(1)
        return any(tmp_path.glob("a.ckpt/rank*"))

    with pytest.raises(GivenUpError):
        write_checkpoint(tmp_path / "a.ckpt", state, given_up)
    assert asked and not list(tmp_path.rglob("*"))


def _never_ends(path, shown, marker, environment, plans, *pieces):
    import threading

    from raytrainer.checkpointing.places import folder_at

    folder = folder_at(path)
    with folder.storage.create(folder.inside(plans[0].name)) as file:
        file.write(b"begun")
        file.flush()
        threading.Event().wait(600.0)
