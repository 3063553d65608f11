"""The strategy takes part in everything that depends on who holds what: a run that uses all of it asks it each time."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny import Tiny, data

import raytrainer
from raytrainer.strategies.driver_side import DriverSide
from raytrainer.strategies.single import SingleStrategy
from raytrainer.strategies.strategy import Strategy

SEAM = (
    "place", "shape", "prepare", "check_optimizer", "sync_next", "end_backward", "clip_gradients", "begin_evaluation",
    "evaluation_step", "begin_round", "end_round", "end_evaluation", "holds_common", "own_part", "own_tensors",
    "module_state", "load_module", "optimizer_state", "load_optimizer", "take_up", "averaged_tensors", "local_part",
    "as_held",
)  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """How often each method of the strategy was called, and in which order first."""
    calls: Counter[str] = Counter()

    def count(name, method):
        def counted(self, *args, **kwargs):
            calls[name] += 1
            return method(self, *args, **kwargs)

        return counted

    for name in (*SEAM, "home_state"):
        owner = SingleStrategy if name in vars(SingleStrategy) else Strategy
        monkeypatch.setattr(owner, name, count(name, getattr(owner, name)))
    for name in ("copy_module", "take_home"):
        monkeypatch.setattr(DriverSide, name, count(name, getattr(DriverSide, name)))
    return calls


class Net(Tiny):
    def __init__(self):
        super().__init__()
        self.lr = 0.1


def test_a_run_asks_for_all_of_it(asked, local_trainer, tmp_path):
    saver = raytrainer.ModelCheckpoint(tmp_path / "saved", save_last=True)
    options = {
        "gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "enable_checkpointing": True,
        "callbacks": [saver, raytrainer.EMAWeightAveraging()],
    }  # fmt: skip
    local_trainer(max_epochs=1, **options).fit(Net(), data(), data())
    order = list(asked)
    assert order.index("shape") < order.index("prepare") < order.index("clip_gradients")
    local_trainer(max_epochs=2, callbacks=[raytrainer.EMAWeightAveraging()]).fit(
        Net(), data(), data(), ckpt_path=saver.last_model_path
    )
    assert set(SEAM) - set(asked) == set()
    assert asked["home_state"] == asked["take_home"] == 0  # the module is the driver's own


def test_a_search_trains_a_copy_of_the_strategys(asked, local_trainer):
    local_trainer().lr_find(Net(), data(), num_training=5)
    assert asked["copy_module"] == 1


def test_a_strategy_may_clip_and_shape_in_its_own_way(monkeypatch, local_trainer):
    """What a sharded strategy will do: the loops use what it returns."""
    shaped: list[str] = []

    def shape(self, module, convert, sync_batchnorm):
        shaped.append(type(module).__name__)
        module.register_parameter("added", torch.nn.Parameter(torch.zeros(1)))

    def clip(self, parameters, value, algorithm):
        shaped.append(algorithm)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()

    monkeypatch.setattr(Strategy, "shape", shape)
    monkeypatch.setattr(Strategy, "clip_gradients", clip)

    class Sees(Net):
        def configure_optimizers(self):
            assert "added" in dict(self.named_parameters())  # shaped before there are optimizers
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Sees()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    local_trainer(max_epochs=1, gradient_clip_val=1.0, gradient_clip_algorithm="value").fit(module, data())
    assert shaped[0] == "Sees" and set(shaped[1:]) == {"value"}
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())


def test_rank_and_part_of_the_data_are_two_numbers(monkeypatch, local_trainer):
    """Workers that read the same draw from the same stream, and one of them answers for what was read."""
    drawn = []

    class Draws(Net):
        def on_fit_start(self):
            drawn.append(torch.rand(1).item())

        def predict_step(self, batch):
            return self(batch[0])

    for stream in (0, 0, 1):
        monkeypatch.setattr(Strategy, "stream", property(lambda self, stream=stream: stream))
        local_trainer(max_epochs=1, limit_train_batches=1, seed=3).fit(Draws(), data())
    assert drawn[0] == drawn[1] != drawn[2]
    monkeypatch.setattr(Strategy, "counts", property(lambda self: False))
    assert local_trainer().predict(Draws(), data()) == []
