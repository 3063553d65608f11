"""States of optimizers in types of their own: a run that goes on has them as the run before had."""

from __future__ import annotations

import copy

import pytest
import torch
from sharded_models import Net, loader, same_bits

import raytrainer as rt


class WideMoments(torch.optim.Optimizer):
    """Momentum in float32, whatever weights are."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.002})

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["moment"] = torch.zeros_like(parameter, dtype=torch.float32)
                assert state["moment"].dtype == torch.float32
                state["moment"].mul_(0.9).add_(parameter.grad.float())
                parameter.add_((-group["lr"] * state["moment"]).to(parameter.dtype))


class Typed(Net):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def configure_optimizers(self):
        return self.kind(self.parameters())


@pytest.mark.sample(3)
@pytest.mark.parametrize("strategy", ["local", "fsdp"])
@pytest.mark.parametrize("precision", ["bf16-true", 64])
@pytest.mark.parametrize("kind", [torch.optim.NAdam, WideMoments])
def test_resuming_is_equal_bit_by_bit(kind, precision, strategy, forked, tmp_path):
    torch.manual_seed(0)
    whole = Typed(kind)
    resumed = copy.deepcopy(whole)
    for module, path in ((whole, None), (resumed, tmp_path / "step=3.ckpt")):
        saver = rt.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        options = {"enable_checkpointing": True, "callbacks": [saver]} if path is None else {}
        trainer = forked(strategy=strategy, precision=precision, max_epochs=2, **options)
        trainer.fit(module, loader(48, 4, torch.float32), ckpt_path=path)
    assert all(value.isfinite().all() for value in whole.state_dict().values()) and same_bits(whole, resumed)


def test_a_checkpoint_of_another_precision_takes_the_types_of_this_one(forked, tmp_path):
    module = Typed(torch.optim.AdamW)
    first = forked(strategy="local", precision=32, max_epochs=1)
    first.fit(module, loader(16, 4, torch.float32))
    first.save_checkpoint(tmp_path / "a.ckpt")

    class Looks(Typed):
        def on_train_epoch_end(self):
            states = self.optimizers().state.values()
            self.types = {state["exp_avg"].dtype for state in states}

    other = Looks(torch.optim.AdamW)
    forked(strategy="local", precision="bf16-true", max_epochs=2).fit(
        other, loader(16, 4, torch.float32), ckpt_path=tmp_path / "a.ckpt"
    )
    assert other.types == {torch.bfloat16}
