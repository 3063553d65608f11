"""Damaged and forged checkpoints, files of Lightning's, configurations, reports of workers: at most a RaytrainerError.

    python tests/fuzz.py 10000 [--seed 0]

Each input is a whole one with a few seeded changes. It must not run anything (an audit hook watches), take longer than
ten seconds, or raise anything but a `RaytrainerError`; what has damage beneath its checksums must not be read at all.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
import yaml
from exact import Mortal
from forge import forge, forge_meta, in_two
from tiny import Tiny, data

import raytrainer
from raytrainer.checkpointing.checkpoint_format import read_checkpoint, write_checkpoint
from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.errors import RaytrainerError
from raytrainer.worker.answers import understood
from raytrainer.worker.worker import Worker

SECONDS = 10
_EXECUTING = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "subprocess.Popen", "socket.connect")
_watching = False
_executed: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event.startswith(_EXECUTING):
        _executed.append(f"{event} {arguments!r}")


class Net(Tiny):
    def __init__(self, width: int = 4, kind: type = torch.nn.Linear, **more: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


CONFIG = """
max_epochs: 3
gradient_clip_val: 0.5
precision: bf16-mixed
limit_val_batches: 0.5
callbacks:
  - class_path: ModelCheckpoint
    init_args: {monitor: val_loss, save_top_k: 2, filename: "{epoch}-{val_loss:.2f}"}
  - class_path: raytrainer.EarlyStopping
    init_args: {monitor: val_loss, patience: 3, mode: min}
logger: false
"""


def damage(data: bytes, draws: random.Random) -> bytes:
    """A few bits flipped, bytes set, pieces cut out, doubled or moved."""
    changed = bytearray(data)
    for _ in range(draws.choice((1, 1, 2, 5))):
        place, length = draws.randrange(len(changed) + 1), draws.choice((1, 2, 8, 64))
        match draws.randrange(5):
            case 0 if place < len(changed):
                changed[place] ^= 1 << draws.randrange(8)
            case 1 if place < len(changed):
                changed[place] = draws.choice((0, 255, 0x2E, 0x52, 0x63, 0x93, draws.randrange(256)))
            case 2:
                del changed[place : place + length]
            case 3:
                changed[place:place] = changed[place : place + length]
            case _:
                del changed[place if draws.random() < 0.2 else len(changed) :]
    return bytes(changed)


def damage_value(value: Any, draws: random.Random) -> Any:
    """Another value somewhere in nested plain ones."""
    odd = [None, -1, 0, 1e308, float("nan"), 10**30, "", "x" * 1000, "..", [], {}, [[]], True, "state-000000000000.pt"]
    if isinstance(value, dict) and value and draws.random() < 0.9:
        key = draws.choice(list(value))
        if draws.random() < 0.15:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: damage_value(value[key], draws)}
    if isinstance(value, list) and value and draws.random() < 0.9:
        index = draws.randrange(len(value))
        return [*value[:index], damage_value(value[index], draws), *value[index + 1 :]]
    return draws.choice(odd)


def damage_pickle(archive: bytes, draws: random.Random) -> bytes:
    """The pickle in a file of torch's damaged, and the zip around it whole."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(changed, "w") as new:
        for info in old.infolist():
            with old.open(info) as file:
                file._expected_crc = None  # type: ignore[attr-defined]  # torch has left it out
                content = file.read()
            new.writestr(info.filename, damage(content, draws) if info.filename.endswith("data.pkl") else content)
    return changed.getvalue()


#: As Lightning 2.5 writes it.
_PROGRESS = {"total": {"ready": 5, "completed": 5, "started": 5, "processed": 5},
             "current": {"ready": 5, "completed": 5, "started": 5, "processed": 5}, "is_last_batch": True}  # fmt: skip
LOOPS = {"fit_loop": {
    "state_dict": {}, "epoch_loop.state_dict": {"_batches_that_stepped": 5}, "epoch_loop.batch_progress": _PROGRESS,
    "epoch_progress": {name: _PROGRESS[name] for name in ("total", "current")},
    "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {"step": {
        name: {"ready": 5, "completed": 5} for name in ("total", "current")}}},
}}  # fmt: skip


def damage_report(value: Any, draws: random.Random) -> Any:
    """The same for what a worker reports: one of its parts is another, down to any depth."""
    if dataclasses.is_dataclass(value) and draws.random() < 0.95:
        changed = copy.copy(value)
        name = draws.choice(dataclasses.fields(value)).name
        object.__setattr__(changed, name, damage_report(getattr(value, name), draws))
        return changed
    if isinstance(value, dict) and value and draws.random() < 0.8:
        key = draws.choice(list(value))
        new = key if draws.random() < 0.7 else draws.choice(("", "x", 3, None))
        return {**{k: v for k, v in value.items() if k != key}, new: damage_report(value[key], draws)}
    if isinstance(value, (list, tuple)) and value and draws.random() < 0.8:
        index = draws.randrange(len(value))
        items = [*value[:index], damage_report(value[index], draws), *value[index + 1 :]]
        return type(value)(items[: draws.choice((len(items), index))])
    return damage_value(value, draws)


class Damaging(Mortal):
    """Two workers' worth of answers, one of which is damaged, once.

    Args:
        draws: Say which, and how.
    """

    size = 2

    def __init__(self, draws: random.Random) -> None:
        super().__init__()
        self.draws, self.left = draws, draws.randrange(14)

    def setup(self, task: Any) -> list[Any]:
        return self.told(Worker.setup, super().setup(task))

    def call(self, method: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return self.told(method, [method(self.worker, *args, **kwargs)])

    def told(self, method: Any, answers: list[Any]) -> list[Any]:
        both = [answers[0], copy.deepcopy(answers[0])]
        self.left -= 1
        if self.left == 0:
            rank = self.draws.randrange(2)
            both[rank] = damage_report(both[rank], self.draws)
        understood(method, both)
        return both


class Reporting(Tiny):
    """Reports of each kind."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("large", loss, reduce_fx="max", prog_bar=True)
        return loss


class Fuzzer:
    """Makes inputs in a folder, and reads them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draws = folder, random.Random(seed)
        module = Net(3, torch.nn.Conv1d, path=Path("a/b"), shape=(1, 2), when={"a": [1.5, None]})
        self.state = {
            "epoch": 1, "global_step": 5, "state_dict": module.state_dict(), **module.hyperparameters_to_save(),
            "callbacks": {"Timer": {"seconds": 1.0}}, "own": [{"rng": torch.get_rng_state()}],
        }  # fmt: skip
        write_checkpoint(folder / "whole.ckpt", self.state)
        write_checkpoint(folder / "shards.ckpt", {**self.state, **in_two(dict(module.state_dict()))})
        self.expected = repr(read_checkpoint(folder / "shards.ckpt"))
        self.file = io.BytesIO()
        torch.save(
            {"epoch": 1, "global_step": 5, "pytorch-lightning_version": "2.5.0", "state_dict": module.state_dict(),
             "loops": LOOPS, "optimizer_states": [], "lr_schedulers": [], "hyper_parameters": {"width": 3}}, self.file
        )  # fmt: skip

    def copy(self, name: str = "whole.ckpt") -> Path:
        path = self.folder / "x.ckpt"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.folder / name, path)
        return path

    def damaged(self, path: Path) -> Path:
        """The file that has been damaged."""
        file = self.draws.choice(sorted(path.iterdir()))
        whole = file.read_bytes()
        while (damaged := damage(whole, self.draws)) == whole:
            pass
        file.write_bytes(damaged)
        return file

    def damaged_checkpoint(self) -> None:
        path = self.copy()
        file = self.damaged(path)
        read_checkpoint(path)
        raise AssertionError(f"damage to {file.name} was not noticed")

    def damaged_shards(self) -> None:
        """A header of safetensors is for others; here the index says what is where."""
        path = self.copy("shards.ckpt")
        file = self.damaged(path)
        if repr(read_checkpoint(path)) != self.expected or file.suffix != ".safetensors":
            raise AssertionError(f"damage to {file.name} was not noticed")

    def forged_shards(self) -> None:
        """Another index, or other marks of what is in shards, beneath correct checksums."""
        path = self.copy("shards.ckpt")
        meta = json.loads((path / "meta.json").read_text())
        forged = path / meta[self.draws.choice(("pieces", "state"))]
        if forged.suffix == ".json":
            index = json.loads(forged.read_text())
            change = json.dumps(damage_value(index, self.draws)).encode()
        else:
            change = io.BytesIO()
            state = torch.load(forged, weights_only=True)
            torch.save({**state, "state_dict": damage_value(state["state_dict"], self.draws)}, change)
            change = change.getvalue()
        forged.write_bytes(change)
        record = {"bytes": len(change), "checksum": "xxh3_128:" + xxhash.xxh3_128(change).hexdigest()}
        forge_meta(path, files={**meta["files"], forged.name: record})
        Net.load_from_checkpoint(path)

    def forged_state(self) -> None:
        path = self.copy()
        state = next(path.glob("state-*")).read_bytes()
        forge(path, damage(state, self.draws) if self.draws.random() < 0.3 else damage_pickle(state, self.draws))
        Net.load_from_checkpoint(path)

    def forged_meta(self) -> None:
        path = self.copy()
        meta = json.loads((path / "meta.json").read_text())
        key = self.draws.choice(list(meta))
        forge_meta(path, **{key: damage_value(meta[key], self.draws)})
        Net.load_from_checkpoint(path)

    def lightning_file(self) -> None:
        path, whole = self.folder / "file.ckpt", self.file.getvalue()
        path.write_bytes(damage(whole, self.draws) if self.draws.random() < 0.3 else damage_pickle(whole, self.draws))
        Net.load_from_checkpoint(path)

    def worker_report(self) -> None:
        before = GroupSupply.take
        GroupSupply.take = lambda *_: Damaging(self.draws)  # type: ignore[method-assign]
        try:
            raytrainer.Trainer(
                max_epochs=2, logger=raytrainer.CSVLogger(self.folder / "rows"), enable_progress_bar=False,
                enable_model_summary=False, max_failures=0, log_every_n_steps=1, strategy="local",
                default_root_dir=self.folder, enable_checkpointing=False,
            ).fit(Reporting(), data(6, 2), data(2, 2))  # fmt: skip
        finally:
            GroupSupply.take = before  # type: ignore[method-assign]

    def configuration(self) -> None:
        if self.draws.random() < 0.5:
            try:
                config = yaml.safe_load(damage(CONFIG.encode(), self.draws))
            except (yaml.YAMLError, ValueError):
                return  # of the YAML reader, before it comes to us
        else:
            config = damage_value(yaml.safe_load(CONFIG), self.draws)
        raytrainer.Trainer.from_config(config)

    def run(self, count: int) -> Counter[str]:
        """Try so many inputs; what became of them, by kind."""
        global _watching
        kinds: list[Callable[[], None]] = [
            self.damaged_checkpoint, self.forged_state, self.forged_meta, self.lightning_file, self.configuration,
            self.worker_report, self.damaged_shards, self.forged_shards,
        ]  # fmt: skip
        found: Counter[str] = Counter()
        for number in range(count):
            kind = kinds[number % len(kinds)]
            _watching = True
            signal.alarm(SECONDS)
            try:
                kind()
                outcome = "read"
            except RaytrainerError as error:
                outcome = type(error).__name__
            except BaseException as error:
                outcome = "WRONG"
                found[f"{kind.__name__}: WRONG: {type(error).__name__}: {error}"] += 1
            finally:
                signal.alarm(0)
                _watching = False
            if _executed:
                found[f"{kind.__name__}: WRONG: input {number} has executed {_executed}"] += 1
                _executed.clear()
            found[f"{kind.__name__}: {outcome}"] += 1
        return found


def fuzz(count: int, seed: int, folder: Path) -> Counter[str]:
    sys.addaudithook(_audit)
    previous = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("ten seconds are over")))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Fuzzer(folder, seed).run(count)
    finally:
        signal.signal(signal.SIGALRM, previous)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        for what, times in sorted(fuzz(given.count, given.seed, Path(place)).items()):
            print(f"{times:7d}  {what}")
