"""Every form that `configure_optimizers` may return."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import Tiny, data
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from raytrainer.errors import ConfigurationError
from raytrainer.view.added_groups import cover_groups
from raytrainer.view.scheduler_config import SchedulerConfig
from raytrainer.worker.optimizers import parse_optimizers


def _things() -> SimpleNamespace:
    a, b = (SGD([torch.nn.Parameter(torch.zeros(1))], 0.1) for _ in "ab")
    return SimpleNamespace(a=a, b=b, sa=StepLR(a, 1), sb=StepLR(b, 1), plateau=ReduceLROnPlateau(a))


T = _things()


def config(scheduler, **options):
    return SchedulerConfig(scheduler, **options)


@pytest.mark.parametrize(
    ("answer", "optimizers", "schedulers"),
    [
        (None, [], []),
        (T.a, [T.a], []),
        ([T.a], [T.a], []),
        ([T.a, T.b], [T.a, T.b], []),
        ((T.a, T.b), [T.a, T.b], []),
        (([T.a], [T.sa]), [T.a], [config(T.sa)]),
        (([T.a, T.b], []), [T.a, T.b], []),
        ([[T.a, T.b], [T.sa, T.sb]], [T.a, T.b], [config(T.sa), config(T.sb)]),
        (([T.a], [{"scheduler": T.sa, "interval": "step"}]), [T.a], [config(T.sa, interval="step")]),
        (([T.a], T.sa), [T.a], [config(T.sa)]),
        ({"optimizer": T.a}, [T.a], []),
        ({"optimizer": T.a, "lr_scheduler": T.sa}, [T.a], [config(T.sa)]),
        ({"optimizer": T.a, "lr_scheduler": None}, [T.a], []),
        (
            {"optimizer": T.a, "lr_scheduler": T.plateau, "monitor": "val_loss"},
            [T.a],
            [config(T.plateau, monitor="val_loss", on_metric=True)],
        ),
        (
            {"optimizer": T.a, "lr_scheduler": {"scheduler": T.plateau, "interval": "step"}, "monitor": "x"},
            [T.a],
            [config(T.plateau, interval="step", monitor="x", on_metric=True)],
        ),
        ({"optimizer": T.a, "monitor": "val_loss"}, [T.a], []),
        (
            {"optimizer": T.a, "lr_scheduler": {"scheduler": T.sa, "interval": "step", "frequency": 3, "name": "lr"}},
            [T.a],
            [config(T.sa, interval="step", frequency=3, name="lr")],
        ),
        (
            {"optimizer": T.a, "lr_scheduler": {"scheduler": T.plateau, "monitor": "val_loss", "strict": False}},
            [T.a],
            [config(T.plateau, monitor="val_loss", strict=False, on_metric=True)],
        ),
        (
            {"optimizer": T.a, "lr_scheduler": {"scheduler": T.sa, "reduce_on_plateau": True, "monitor": "x"}},
            [T.a],
            [config(T.sa, monitor="x", on_metric=True)],
        ),
        (
            [{"optimizer": T.a, "lr_scheduler": T.sa}, {"optimizer": T.b}],
            [T.a, T.b],
            [config(T.sa)],
        ),
        (({"optimizer": T.a, "lr_scheduler": T.sa}, {"optimizer": T.b, "lr_scheduler": T.sb}), [T.a, T.b],
         [config(T.sa), config(T.sb)]),
    ],
)  # fmt: skip
def test_forms(answer, optimizers, schedulers):
    assert parse_optimizers(answer) == (optimizers, schedulers)


class HandWritten:
    """No LRScheduler, but steps and has a state."""

    def step(self): ...
    def state_dict(self): ...


def test_any_object_that_steps_is_a_scheduler():
    scheduler = HandWritten()
    assert parse_optimizers(([T.a], [scheduler]))[1] == [SchedulerConfig(scheduler)]


class Stateful:
    """Has a state, and is stepped by who knows."""

    def state_dict(self): ...


def test_who_steps_by_hand_needs_neither_a_metric_nor_a_step():
    other = Stateful()
    found = parse_optimizers(([T.a], [T.plateau, other]), manual=True)[1]
    assert found == [config(T.plateau), config(other)]
    assert parse_optimizers(([T.a], [other]), own_step=True)[1] == [config(other)]
    with pytest.raises(ConfigurationError, match="monitor"):
        parse_optimizers(([T.a], [T.plateau]), own_step=True)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (([T.a], [Stateful()]), r"step\(\) and state_dict\(\).*lr_scheduler_step"),
        (([T.a], [T.sb]), r"a StepLR of a SGD that it did not return"),
        ({"optimizer": T.b, "lr_scheduler": {"scheduler": T.plateau, "monitor": "x"}}, r"a ReduceLROnPlateau of a SGD"),
        (3, r"returned 3: return an optimizer, a list"),
        ("sgd", r"'sgd' as an optimizer|returned 'sgd'|returned 's'"),
        ([T.a, T.sa], r"as an optimizer: return"),
        ({"optimiser": T.a}, r"keys \['optimiser'\]: it needs 'optimizer'"),
        ({"optimizer": T.a, "scheduler": T.sa}, r"keys \['optimizer', 'scheduler'\].*'lr_scheduler'"),
        ({"optimizer": T.a, "lr_scheduler": {"scheduler": T.sa, "intervall": "step"}}, r"\['intervall'\] are unknown"),
        ({"optimizer": T.a, "lr_scheduler": {"scheduler": T.sa, "interval": "batch"}}, r"interval='batch'.*\"step\""),
        ({"optimizer": T.a, "lr_scheduler": {"scheduler": T.sa, "frequency": 0}}, r"frequency=0.*at least 1"),
        ({"optimizer": T.a, "lr_scheduler": {"interval": "step"}}, r"None.*step\(\) and state_dict"),
        ({"optimizer": T.a, "lr_scheduler": T.plateau}, r"ReduceLROnPlateau steps with a metric.*monitor"),
        (([T.a], [T.plateau]), r"monitor"),
    ],
)
def test_refused(answer, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_optimizers(answer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_sgd_updates_all_weights_or_is_refused(dtype):
    weights = torch.nn.Parameter(torch.ones(64, dtype=dtype))
    optimizer = SGD([weights], 0.5, fused=True)
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    if (weights != 1).all():
        assert parse_optimizers(optimizer) == ([optimizer], [])
    else:
        with pytest.raises(ConfigurationError, match="Leave fused out"):
            parse_optimizers(optimizer)


EXCHANGES = {
    "another": lambda trainer, new: setattr(trainer, "optimizers", [new]),
    "in place": lambda trainer, new: trainer.optimizers.__setitem__(0, new),
    "one more": lambda trainer, new: trainer.optimizers.append(new),
}


class Exchanges(Tiny):
    def __init__(self, how, automatic):
        super().__init__()
        self.how, self.automatic_optimization = how, automatic

    def training_step(self, batch, batch_idx):
        return self.loss(batch) if self.automatic_optimization else None

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            EXCHANGES[self.how](self.trainer, SGD(self.parameters(), 0.0))


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("how", EXCHANGES)
def test_a_run_keeps_its_optimizers(how, automatic, local_trainer):
    """Others would be stepped by nobody."""
    with pytest.raises(ConfigurationError, match=r"trainer.optimizers has been given \['SGD'.*add_param_group"):
        local_trainer(max_epochs=3).fit(Exchanges(how, automatic), data())


class Phases(torch.optim.lr_scheduler.LRScheduler):
    """One of a user's, whose list of peaks is one of phases; a group may say how low it is to go."""

    def __init__(self, optimizer, peaks):
        self.max_lrs = list(peaks)
        super().__init__(optimizer)

    def get_lr(self):
        peak = self.max_lrs[self.last_epoch % len(self.max_lrs)]
        return [max(peak, group.get("min_lr", 0.0)) for group in self.optimizer.param_groups]


@pytest.mark.parametrize("adds", [False, True])
def test_only_added_groups_are_covered_in_what_schedulers_keep_for_groups(adds):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(5)]
    groups = [{"params": parameters[:1], "min_lr": 0.2}, {"params": parameters[1:2]}, {"params": parameters[2:3]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    of_phases = Phases(optimizer, [0.1, 0.3])
    if adds:
        optimizer.add_param_group({"params": parameters[3:4], "lr": 0.05})
        optimizer.add_param_group({"params": parameters[4:], "lr": 0.05})
    cover_groups([config(of_phases)])
    assert of_phases.max_lrs == [0.1, 0.3]
    assert ["min_lr" in group for group in optimizer.param_groups] == [True, False, False, *[True, True] * adds]
    assert len(of_phases.base_lrs) == len(optimizer.param_groups)
