"""What a loop drops is gone at once: no circle that this package makes keeps a module or a Trainer."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import Tiny, data

from raytrainer import CSVLogger, EarlyStopping, ModelCheckpoint, Trainer


class Loop(Tiny):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("x", self(batch[0]).mean())


def resumed(trainer: Trainer, module: Loop) -> None:
    trainer.fit(module, data(), data(4))
    trainer.save_checkpoint(f"{trainer.default_root_dir}/x.ckpt", wait=True)
    trainer.fit(module, data(), data(4), ckpt_path=f"{trainer.default_root_dir}/x.ckpt")


RUNS: list[Callable[[Trainer, Loop], Any]] = [
    lambda trainer, module: trainer.fit(module, data(), data(4)),
    lambda trainer, module: trainer.validate(module, data(4), verbose=False),
    lambda trainer, module: trainer.test(module, data(4), verbose=False),
    lambda trainer, module: trainer.predict(module, data(4)),
    resumed,
]


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def dropped(run: Callable[[Trainer, Loop], Any], options: dict[str, Any]) -> list[weakref.ref[Any]]:
    trainer, module = Trainer(max_epochs=1, **options), Loop()
    run(trainer, module)
    return [weakref.ref(trainer), weakref.ref(module), weakref.ref(module.layer.weight)]


@pytest.mark.parametrize("index", range(len(RUNS)))
def test_in_this_process(index: int, tmp_path: Path, no_collector: None) -> None:
    options: list[dict[str, Any]] = [
        {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
        {"logger": CSVLogger(tmp_path), "callbacks": [ModelCheckpoint(tmp_path / "c"), EarlyStopping("val_loss")]},
    ]
    for given in options:
        given = {"strategy": "local", "default_root_dir": tmp_path, **given}
        dropped(RUNS[index], given)  # what is imported while a run starts makes circles with it, once
        gc.collect()
        assert [reference() for reference in dropped(RUNS[index], given)] == [None] * 3
