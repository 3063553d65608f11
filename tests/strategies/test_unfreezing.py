"""Parameters that begin to train while a run is on, in groups of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sharded_models import Net, assert_equal, joined, loader, same_bits

import raytrainer as rt


class Adds(Net):
    """Its first block trains from an epoch's third step on, with a rate of its own, which a scheduler lowers too."""

    def configure_optimizers(self) -> Any:
        self.blocks[0].requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 0.01)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda steps: 0.9**steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        (optimizer,) = self.trainer.optimizers
        if self.trainer.global_step == 3:
            self.blocks[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(self.blocks[0].parameters()), "lr": 0.003})


AVERAGES = {
    "none": list,
    "swa": lambda: [rt.StochasticWeightAveraging(0.002, 1, 2)],
    "ema": lambda: [rt.EMAWeightAveraging(0.9, update_starting_at_step=2)],
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("averages", AVERAGES)
@pytest.mark.parametrize("strategy,workers", [("fsdp", 2), (rt.FSDP(replicate=2), 4)])
def test_within_an_epoch_in_shards(strategy, workers, averages, forked, tmp_path):
    """As in one process; and a run goes on as the one that it goes on from."""
    torch.manual_seed(0)
    alone = Adds()
    shared, again = copy.deepcopy(alone), copy.deepcopy(alone)
    options: dict[str, Any] = {"precision": 64, "max_epochs": 2, "callbacks": AVERAGES[averages]()}
    forked(strategy="local", **options).fit(alone, joined(8 * workers, 2, workers))
    saver = rt.ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    options |= {"strategy": strategy, "num_processes": workers}
    saves = {**options, "callbacks": [*AVERAGES[averages](), saver], "enable_checkpointing": True}
    forked(**saves).fit(shared, loader(8 * workers, 2))
    assert_equal(alone, shared)
    options["callbacks"] = AVERAGES[averages]()
    forked(**options).fit(again, loader(8 * workers, 2), ckpt_path=tmp_path / "step=5.ckpt")
    assert same_bits(shared, again)


def test_within_an_epoch_with_ddp(forked):
    """Whose gradients nobody would average."""
    with pytest.raises(rt.ConfigurationError, match=r"blocks.0.norm.weight, .* and 1 more began to train in the midst"):
        forked(strategy=rt.DDP(check_replicas=False), precision=64, max_epochs=2).fit(Adds(), loader(32, 2))


class LeavesOneOut(Adds):
    """Also has a part that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.never = torch.nn.Linear(2, 2)


def test_one_ddp_worker_is_a_plain_loop(forked):
    """It averages with nobody, so nobody waits for gradients that are not there, or not yet."""
    torch.manual_seed(0)
    alone = LeavesOneOut()
    shared = copy.deepcopy(alone)
    options: dict[str, Any] = {"precision": 64, "max_epochs": 2}
    forked(strategy="local", **options).fit(alone, loader(16, 2))
    forked(strategy="ddp", num_processes=1, **options).fit(shared, loader(16, 2))
    assert same_bits(alone, shared)
