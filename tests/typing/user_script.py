"""What a user writes, as a type checker sees it: signatures, attributes and hooks."""

from __future__ import annotations

from typing import Any, assert_type

import torch

import raytrainer as rt


class Net(rt.Module):
    """A module with annotated hooks."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Counters and the run are typed."""
        assert_type(self.trainer.current_epoch, int)
        loss: torch.Tensor = batch.sum()
        return loss

    def configure_callbacks(self) -> list[rt.Callback]:
        """Fewer types than allowed."""
        return [Told()]


class Told(rt.Callback):
    """A hook may name the Trainer."""

    def on_train_epoch_end(self, trainer: rt.Trainer, module: rt.Module) -> None:
        """All of it is there."""
        assert_type(trainer.global_step, int)
        trainer.save_checkpoint("now.ckpt")


trainer = rt.Trainer(max_epochs=3, precision="bf16", callbacks=[Told()], logger=False, strategy=rt.DDP())
assert_type(trainer.max_epochs, int | None)
assert_type(trainer.logger, rt.Logger | None)
assert_type(trainer.default_root_dir, str)
assert_type(trainer.checkpoint_callback, rt.ModelCheckpoint | None)
trainer.fit(Net())
rt.Trainer(max_epoch=3)  # type: ignore[call-arg]
rt.Trainer(max_epochs="3")  # type: ignore[arg-type]
rt.Tranier(max_epochs=3)  # type: ignore[attr-defined]
trainer.max_epochs = 5  # type: ignore[misc]
