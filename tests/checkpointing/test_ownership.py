"""What this package has not written is never deleted, written over, or taken for a checkpoint."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_group import FORK
from tiny import Tiny, data

from raytrainer import CheckpointError, ConfigurationError, CSVLogger, ModelCheckpoint, PredictionWriter
from raytrainer.checkpointing.checkpoint_format import read_checkpoint, write_checkpoint
from raytrainer.checkpointing.places import checkpoint_exists, find_checkpoints, newest_checkpoint, remove_checkpoint
from raytrainer.checkpointing.reservations import release, require_writable, reserve
from raytrainer.checkpointing.storage import LocalStorage

FOREIGN = {
    "state-of-california.csv": b"a,b",
    "state-2024.parquet": b"PAR1",
    "state-0123456789ab.pt": b"of somebody else",
    "meta-0123456789ab.json": b"{}",
    "thesis.tex": b"\\documentclass{article}",
    "notes/meta.json": b'{"title": "a data set"}',
    "empty/meta.json": b"",
    "list/meta.json": b"[1, 2]",
}


def strew(folder: Path) -> Callable[[], None]:
    """Put somebody's files into a folder; the result finds out whether they are as they were."""
    for name, content in FOREIGN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    def check() -> None:
        assert {name: (folder / name).read_bytes() for name in FOREIGN} == FOREIGN

    return check


def test_files_beside_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    check = strew(path)
    for epoch in range(2):
        write_checkpoint(path, {"epoch": epoch})
        check()
    assert read_checkpoint(path) == {"epoch": 1}
    assert len(list(path.glob("state-*"))) == 4  # theirs, and the newest of ours
    remove_checkpoint(path)
    check()
    assert not checkpoint_exists(path) and len(list(path.glob("*"))) == len(FOREIGN)
    remove_checkpoint(path)
    check()


@pytest.mark.parametrize("content", [b"{}", b"", b"[]", b"\xff", b'{"format": "mine", "state": "thesis.tex"}'])
def test_a_meta_json_of_somebody_else(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "meta.json").write_bytes(content)
    (tmp_path / "d" / "thesis.tex").write_bytes(b"x")
    assert not checkpoint_exists(tmp_path / "d") and find_checkpoints(tmp_path) == []
    remove_checkpoint(tmp_path / "d")
    with pytest.raises(CheckpointError, match=r"meta\.json: this file is not raytrainer's.*another path"):
        write_checkpoint(tmp_path / "d", {"epoch": 1})
    assert {file.name: file.read_bytes() for file in (tmp_path / "d").iterdir()} == {
        "meta.json": content,
        "thesis.tex": b"x",
    }


def test_a_crafted_checkpoint_deletes_nothing_else(tmp_path: Path) -> None:
    from forge import forge_meta

    path = tmp_path / "x.ckpt"
    write_checkpoint(path, {"epoch": 1})
    record = {"bytes": 1, "checksum": "xxh3_128:" + "0" * 32}
    (path / "thesis.tex").write_text("x")
    (tmp_path / "other-0123456789ab.pt").write_text("x")
    forge_meta(path, state="thesis.tex", files={"thesis.tex": record, "../other-0123456789ab.pt": record})
    write_checkpoint(path, {"epoch": 2})
    remove_checkpoint(path)
    assert (path / "thesis.tex").exists() and (tmp_path / "other-0123456789ab.pt").exists()


def test_a_file_is_no_place_for_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"PK of another trainer")
    with pytest.raises(CheckpointError, match=r"x\.ckpt"):
        write_checkpoint(tmp_path / "x.ckpt", {"epoch": 1})
    assert (tmp_path / "x.ckpt").read_bytes() == b"PK of another trainer" and not reserve(f"{tmp_path}/x.ckpt")


def test_what_a_killed_save_has_left_goes_with_the_next(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    write_checkpoint(path, {"epoch": 1})
    process = FORK.Process(target=_die_while_saving, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 9 and len(list(path.iterdir())) == 4
    assert read_checkpoint(path) == {"epoch": 1}
    write_checkpoint(path, {"epoch": 3})
    assert read_checkpoint(path) == {"epoch": 3} and len(list(path.iterdir())) == 2


def _die_while_saving(path: Path) -> None:
    def fsync(descriptor: int) -> None:
        if os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")).startswith("state-"):
            os._exit(9)

    os.fsync = fsync
    write_checkpoint(path, {"epoch": 2})


@pytest.mark.parametrize("save_last", [False, True])
def test_a_folder_of_checkpoints_with_other_things(save_last: bool, local_trainer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    check = strew(folder)
    (folder / "epoch=0-step=10.ckpt").write_bytes(b"a file of another trainer")
    (folder / "epoch=1-step=20.ckpt").mkdir()
    (folder / "epoch=1-step=20.ckpt" / "mine").write_text("x")
    (folder / "last.ckpt").mkdir()
    (folder / "last.ckpt" / "meta.json").write_text("{}")
    saving = ModelCheckpoint(folder, save_last=save_last)
    local_trainer(max_epochs=3, callbacks=saving).fit(Tiny(), data())
    check()
    assert (folder / "epoch=0-step=10.ckpt").is_file() and (folder / "epoch=1-step=20.ckpt" / "mine").exists()
    assert (folder / "last.ckpt" / "meta.json").read_text() == "{}"
    expected = {f"{folder}/epoch=2-step=30.ckpt"} | ({f"{folder}/last-v1.ckpt"} if save_last else set())
    assert {path for _, path in find_checkpoints(folder)} == expected
    assert newest_checkpoint([folder]) == max(expected)
    (folder / "newer").mkdir()
    (folder / "newer" / "meta.json").write_text('{"of": "somebody"}')
    resumed = local_trainer(max_epochs=4, callbacks=ModelCheckpoint(folder))
    resumed.fit(Tiny(), data(), ckpt_path="last")
    assert resumed.ckpt_path == max(expected) and resumed.global_step == 40
    check()


def test_the_newest_that_is_damaged_is_not_passed_over(local_trainer: Any, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "c", save_top_k=-1)
    local_trainer(max_epochs=2, callbacks=saving).fit(Tiny(), data())
    newest = Path(saving.best_model_path)
    for damage in (lambda text: "{" + text, lambda text: "", lambda text: text.replace("raytrainer", "raytrainet")):
        whole = (newest / "meta.json").read_text()
        (newest / "meta.json").write_text(damage(whole))
        with pytest.raises(CheckpointError, match=newest.name):
            local_trainer(max_epochs=3, callbacks=ModelCheckpoint(tmp_path / "c")).fit(Tiny(), data(), ckpt_path="last")
        (newest / "meta.json").write_text(whole)


# ---------------------------------------------------------------- links


def test_a_link_is_removed_and_what_it_leads_to_stays(local_trainer: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x.ckpt", {"epoch": 1})
    (tmp_path / "notes").mkdir()
    for name, target in {"a": "x.ckpt", "b": tmp_path / "x.ckpt", "c": "a", "d": "notes", "e": "nowhere"}.items():
        (tmp_path / name).symlink_to(target)
    remove_checkpoint(f"{tmp_path}/b/")
    for name in ("c", "a", "d", "e"):
        local_trainer().remove_checkpoint(str(tmp_path / name))
        remove_checkpoint(tmp_path / name)
    assert read_checkpoint(tmp_path / "x.ckpt") == {"epoch": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "e", "notes", "x.ckpt"]


@pytest.mark.parametrize("link", [False, True])
def test_two_remove_one_checkpoint(link: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "x.ckpt", {"epoch": 1})
    path = tmp_path / "x.ckpt"
    if link:
        path = tmp_path / "a"
        path.symlink_to("x.ckpt")
    asked = LocalStorage.is_link

    def is_link(storage: LocalStorage, place: str) -> bool:
        monkeypatch.setattr(LocalStorage, "is_link", asked)
        remove_checkpoint(path)  # between the other one's looks at it
        return asked(storage, place)

    monkeypatch.setattr(LocalStorage, "is_link", is_link)
    remove_checkpoint(path)
    assert [left.name for left in tmp_path.iterdir()] == (["x.ckpt"] if link else [])


def test_retention_leaves_what_a_run_went_on_from_by_a_link(local_trainer: Any, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path)
    local_trainer(max_epochs=1, callbacks=saving).fit(Tiny(), data())
    first = Path(saving.best_model_path)
    (tmp_path / "best.ckpt").symlink_to(first.name)
    saving = ModelCheckpoint(tmp_path)
    local_trainer(max_epochs=3, callbacks=saving).fit(Tiny(), data(), ckpt_path=tmp_path / "best.ckpt")
    assert read_checkpoint(tmp_path / "best.ckpt")["epoch"] == 0 and first.name != Path(saving.best_model_path).name
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("options", [{"filename": "one"}, {"save_top_k": 0, "save_last": True}])
def test_what_a_link_in_a_checkpoints_place_leads_to_stays(
    options: dict[str, Any], local_trainer: Any, tmp_path: Path
) -> None:
    saving = ModelCheckpoint(tmp_path / "c", **options)
    local_trainer(max_epochs=1, callbacks=saving).fit(Tiny(), data())
    (place,) = (tmp_path / "c").iterdir()
    place.rename(tmp_path / "archived.ckpt")
    place.symlink_to("../archived.ckpt")
    saving = ModelCheckpoint(tmp_path / "c", **options)
    local_trainer(max_epochs=3, callbacks=saving).fit(Tiny(), data(), ckpt_path="last")
    assert read_checkpoint(tmp_path / "archived.ckpt")["epoch"] == 0
    newest = saving.best_model_path or saving.last_model_path
    assert newest.endswith("-v1.ckpt") and read_checkpoint(newest)["epoch"] == 2


def test_moved_folders_are_found_by_their_links(tmp_path: Path) -> None:
    root, disk = tmp_path / "logs", tmp_path / "disk"
    for epoch, name in enumerate(("version_0/checkpoints/x.ckpt", "version_1/checkpoints/x.ckpt", "y.ckpt", "other/x")):
        write_checkpoint(disk / name, {"epoch": epoch})
    (root / "version_0").mkdir(parents=True)
    (root / "version_0" / "checkpoints").symlink_to(disk / "version_0" / "checkpoints")
    (root / "version_1").symlink_to(disk / "version_1")
    (root / "y.ckpt").symlink_to(disk / "y.ckpt")
    (root / "of another run").symlink_to(disk / "other")
    (disk / "version_1" / "checkpoints" / "version_2").symlink_to(root)  # round and round
    (root / "version_3").symlink_to(tmp_path)  # above: what other runs have, too
    (root / "best.ckpt").symlink_to("version_0/checkpoints/x.ckpt")
    (root / "here").symlink_to("version_0")
    found = {path for _, path in find_checkpoints(root)}
    names = ("version_0/checkpoints/x.ckpt", "version_1/checkpoints/x.ckpt", "y.ckpt", "best.ckpt")
    assert found == {f"{root}/{name}" for name in names}
    assert newest_checkpoint([root]) == f"{root}/y.ckpt"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_what_is_no_file_is_no_checkpoint(local_trainer: Any, tmp_path: Path) -> None:
    """A pipe, which nobody writes to: who opened it would wait for ever."""
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "meta.json")
    (tmp_path / "folder" / "meta.json").mkdir(parents=True)
    for name in ("pipe", "folder"):
        assert not checkpoint_exists(tmp_path / name)
        with pytest.raises(CheckpointError, match=r"meta\.json: the file cannot be read: .*no regular file"):
            read_checkpoint(tmp_path / name)
        with pytest.raises(CheckpointError, match="no regular file"):
            write_checkpoint(tmp_path / name, {"epoch": 1})
    trainer = local_trainer(max_epochs=1, callbacks=ModelCheckpoint(tmp_path))
    trainer.fit(Tiny(), data(), ckpt_path="last")
    assert trainer.ckpt_path is None and len(list(tmp_path.iterdir())) == 3
    assert (tmp_path / "pipe" / "meta.json").is_fifo() and (tmp_path / "folder" / "meta.json").is_dir()


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_name_that_no_folder_can_have(on_error: Any, local_trainer: Any, tmp_path: Path, caplog: Any) -> None:
    saving = ModelCheckpoint(tmp_path, "x" * 300, on_error=on_error)
    trainer = local_trainer(max_epochs=2, callbacks=saving)
    if on_error == "raise":
        with pytest.raises(CheckpointError, match=r"xxx\.ckpt: cannot be written: .*too long"):
            trainer.fit(Tiny(), data())
    else:
        trainer.fit(Tiny(), data())
        assert trainer.state.finished and "training goes on without a checkpoint" in caplog.text
        assert saving.best_model_path == ""


# ---------------------------------------------------------------- two processes, one folder


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    path = f"{tmp_path}/x.ckpt"
    assert reserve(path) and not reserve(path)
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # which has not inherited what is reserved here
        assert pool.apply(reserve, (path,)) is False
        release(path)
        assert not os.path.exists(path) and pool.apply(reserve, (path,)) is True
        assert not reserve(path)
    assert reserve(path)  # the other process is gone
    write_checkpoint(path, {"epoch": 1})
    assert not reserve(path) and checkpoint_exists(path)


def test_who_makes_a_folder_may_find_it_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two calls of one that reserves a name another one may come."""
    fcntl = pytest.importorskip("fcntl")
    path, make = f"{tmp_path}/x.ckpt", os.mkdir
    taken: list[int] = []

    def made(*args: Any) -> None:
        make(*args)
        taken.append(os.open(path, os.O_RDONLY))
        fcntl.flock(taken[0], fcntl.LOCK_EX)

    monkeypatch.setattr(os, "mkdir", made)
    assert not reserve(path)
    os.close(taken[0])
    monkeypatch.undo()
    assert reserve(path)
    release(path)


def test_two_processes_get_different_versions_and_names(tmp_path: Path) -> None:
    begin = FORK.Barrier(2)
    answers = FORK.Queue()
    processes = [FORK.Process(target=_train, args=(tmp_path, begin, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert {log_dir for log_dir, _, _ in found} == {f"{tmp_path}/logs/version_0", f"{tmp_path}/logs/version_1"}
    paths = [path for _, paths, _ in found for path in paths]
    assert len(set(paths)) == len(paths) == 6
    for log_dir, paths, total in found:
        assert {read_checkpoint(path)["hyper_parameters"]["tag"] for path in paths} == {total}
        assert json.loads(Path(log_dir, "hparams.json").read_text())["tag"] == total


class _Tagged(Tiny):
    def __init__(self, tag: int) -> None:
        super().__init__()
        self.save_hyperparameters()


def _train(root: Path, begin: Any, answers: Any) -> None:
    from raytrainer import Trainer

    saving = ModelCheckpoint(root / "c", save_top_k=-1)
    trainer = Trainer(
        max_epochs=3, strategy="local", logger=CSVLogger(root), callbacks=saving, enable_progress_bar=False
    )
    begin.wait()
    trainer.fit(_Tagged(os.getpid()), data())
    mine = [path for _, path in find_checkpoints(root / "c") if _tag(path) == os.getpid()]
    answers.put((trainer.log_dir, mine, os.getpid()))


def _tag(path: str) -> Any:
    return read_checkpoint(path)["hyper_parameters"]["tag"]


# ---------------------------------------------------------------- other files


def test_loggers_leave_files_of_others(tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "mine"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("name,price\r\nx,1\r\n")
    (folder / "hparams.json").write_text('["x"]')
    logger = CSVLogger(tmp_path, version="mine")
    with pytest.raises(ConfigurationError, match=r"metrics\.csv was not written by a CSVLogger"):
        logger.log_metrics({"loss": 1.0}, 0)
    with pytest.raises(ConfigurationError, match=r"hparams\.json was not written by a CSVLogger"):
        logger.log_hyperparams({"a": 1})
    assert (folder / "metrics.csv").read_text() == "name,price\nx,1\n"
    (folder / "hparams.json").write_text('{"theirs": 1, "a": 0}')
    logger.log_hyperparams({"a": 1})
    assert json.loads((folder / "hparams.json").read_text()) == {"theirs": 1, "a": 1}


def test_exports_replace_weights_only(tmp_path: Path) -> None:
    module = Tiny()
    for name in ("w.pt", "w.safetensors"):
        if name.endswith("safetensors"):
            pytest.importorskip("safetensors")
        for _ in range(2):
            module.export_weights(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / f"thesis.{name}").write_text("x")
        with pytest.raises(CheckpointError, match="holds no weights, and is not replaced"):
            module.export_weights(tmp_path / f"thesis.{name}")
        module.export_weights(tmp_path / name)
        assert (tmp_path / name).read_bytes() == whole
    with pytest.raises(CheckpointError, match=r"w\.pt: the weights cannot be written"):
        module.export_weights(tmp_path / "absent" / "w.pt")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "thesis.w.pt", "thesis.w.safetensors", "w.pt", "w.safetensors"
    ]  # fmt: skip
    assert torch.equal(torch.load(tmp_path / "w.pt", weights_only=True)["layer.weight"], module.layer.weight)


def test_predictions_of_others(local_trainer: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    class Predicting(Tiny):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0])

    pq.write_table(pa.table({"a": [1]}), tmp_path / "part-00000.parquet")
    writer = PredictionWriter(tmp_path, overwrite=True)
    with pytest.raises(ConfigurationError, match=r"part-00000\.parquet' holds no predictions"):
        local_trainer(callbacks=writer).predict(Predicting(), data(4), return_predictions=False)
    assert pq.read_table(tmp_path / "part-00000.parquet").to_pydict() == {"a": [1]}
    (tmp_path / "part-00000.parquet").write_bytes(b"PAR1 cut off")
    for _ in range(2):
        local_trainer(callbacks=writer).predict(Predicting(), data(4), return_predictions=False)
    assert PredictionWriter.read(tmp_path).num_rows > 0


def test_predictions_of_another_run_that_has_begun_too(local_trainer: Any, tmp_path: Path) -> None:
    class Predicting(Tiny):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:  # the other one writes first
                (tmp_path / "part-00000.parquet").write_bytes(b"theirs")
            return self(batch[0])

    with pytest.raises(ConfigurationError, match=r"part-00000\.parquet has come there since.*Give each its own"):
        local_trainer(callbacks=PredictionWriter(tmp_path)).predict(Predicting(), data(8))
    assert (tmp_path / "part-00000.parquet").read_bytes() == b"theirs"


def test_a_folder_that_cannot_be_written_to_is_told_before_training(local_trainer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigurationError, match=r"it's: .*file/c cannot be written to"):
        require_writable(f"{tmp_path}/file/c", "it's")
    for options, whose in (
        ({"callbacks": ModelCheckpoint(tmp_path / "file" / "c")}, "ModelCheckpoint"),
        ({"logger": CSVLogger(tmp_path / "file")}, "CSVLogger"),
    ):
        module = Tiny()
        with pytest.raises(ConfigurationError, match=f"{whose}: .*cannot be written to"):
            local_trainer(max_epochs=1, **options).fit(module, data())
        assert "t" not in module.events
