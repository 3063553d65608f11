"""Training in shards beside a loop that is written by hand with torch's `fully_shard`: equal bit by bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from sharded_models import Net, loader, table
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

EPOCHS, ROWS, BATCH, CLIP = 2, 48, 4, 0.05


def by_hand(start, rank, size, precision, accumulate):
    """The same, in the workers' own group; the losses, and the trained model."""
    half = precision in ("bf16-mixed", "bf16-true")
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16-mixed" else None,
        reduce_dtype=torch.float32 if half else None,
    )
    model = Net()
    model.load_state_dict(start)
    model.to(dtype)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=dataclasses.replace(policy, cast_forward_inputs=False))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    rows = [part[rank::size].to(dtype) for part in table(ROWS, torch.float32).tensors]
    losses = []
    for _ in range(EPOCHS):
        for index, (x, y) in enumerate(zip(*(part.split(BATCH) for part in rows), strict=True)):
            steps = index % accumulate == accumulate - 1
            model.set_requires_gradient_sync(steps)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = F.mse_loss(model(x), y)
            losses.append(float(loss))
            (loss / accumulate).backward()
            if steps:
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
    return losses, model


class BesideIt(Net):
    """Trains a second time, by hand, when it has been trained."""

    def __init__(self, precision, accumulate):
        super().__init__()
        self.how, self.losses = (precision, accumulate), []
        self.start = {name: value.clone() for name, value in self.state_dict().items()}

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(float(loss))
        return loss

    def on_train_end(self):
        losses, model = by_hand(self.start, self.global_rank, self.trainer.world_size, *self.how)
        assert losses == self.losses and losses[0] != losses[-1]
        for (name, theirs), ours in zip(model.named_parameters(), self.parameters(), strict=True):
            assert torch.equal(theirs.to_local(), ours.to_local()), name


@pytest.mark.sample(3)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "bf16-true"])
def test_equal_bit_by_bit(precision, accumulate, forked):
    options = {"precision": precision, "accumulate_grad_batches": accumulate, "gradient_clip_val": CLIP}
    trainer = forked(max_epochs=EPOCHS, **options)
    trainer.fit(BesideIt(precision, accumulate), loader(ROWS, BATCH, torch.float32))
    assert trainer.global_step == EPOCHS * ROWS // (2 * BATCH * accumulate)
