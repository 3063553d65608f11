from __future__ import annotations

import pytest
import torch
from exact import Died, Exact, run, same
from tiny import Tiny, data, weights

from raytrainer import ConfigurationError, GradientAccumulationScheduler, ModelCheckpoint


def by_hand(module, factors):
    optimizer, steps = module.configure_optimizers(), []
    for factor in factors:
        steps.append(0)
        for index, batch in enumerate(batches := list(data())):
            if index % factor == 0:
                optimizer.zero_grad()
            loss = module.loss(batch)
            (loss / factor if factor > 1 else loss).backward()
            if (index + 1) % factor == 0 or index + 1 == len(batches):
                optimizer.step()
                steps[-1] += 1
    return weights(module), steps


class Counting(Tiny):
    def __init__(self):
        super().__init__()
        self.steps, self.estimated = [], None

    def configure_optimizers(self):
        self.estimated = self.trainer.estimated_stepping_batches if self.__dict__.get("_view") else None
        return super().configure_optimizers()

    def on_train_epoch_end(self):
        self.steps.append(self.global_step - sum(self.steps))


@pytest.mark.parametrize(
    "scheduling,factors",
    [({0: 2, 2: 4}, [2, 2, 4]), ({2: 1, 1: 3}, [1, 3, 1]), ({0: 4, 1: 1}, [4, 1, 1]), ({5: 2}, [1, 1, 1])],
)
def test_bit_for_bit(scheduling, factors, local_trainer):
    torch.manual_seed(2)
    ours = Counting()
    torch.manual_seed(2)
    expected, steps = by_hand(Counting(), factors)
    callback = GradientAccumulationScheduler(scheduling)
    trainer = local_trainer(max_epochs=3, callbacks=callback, val_check_interval=3)
    trainer.fit(ours, data(), data(4))
    assert torch.equal(weights(ours), expected)
    assert ours.steps == steps and trainer.global_step == sum(steps) == ours.estimated


def test_one_trainer_with_and_without(local_trainer):
    """What a module's own callback says holds for its fit alone."""

    class Own(Counting):
        def configure_callbacks(self):
            return GradientAccumulationScheduler({0: 5})

    trainer = local_trainer(max_epochs=1)
    for module, steps in ((Own(), 2), (Counting(), 10)):
        trainer.fit(module, data())
        assert trainer.global_step == steps


@pytest.mark.parametrize("batches", [9, 17, 31])
def test_exact_resume(batches, tmp_path):
    def options(save):
        saving = [ModelCheckpoint(tmp_path, save_top_k=0, save_last=True, every_n_train_steps=1)] if save else []
        return {"callbacks": [GradientAccumulationScheduler({0: 2, 1: 4, 2: 3}), *saving], "accumulate_grad_batches": 1}

    calm = Exact()
    run(calm, tmp_path, **options(False))
    with pytest.raises(Died):
        run(Exact((0, batches), flag=f"{tmp_path}/flag"), tmp_path, **options(True))
    module = Exact()
    run(module, tmp_path, **options(True), ckpt_path="last")
    assert same(module, calm)


@pytest.mark.parametrize("scheduling", [{}, 4, {-1: 2}, {0: 0}, {0.5: 2}])
def test_bad_schedules(scheduling):
    with pytest.raises(ConfigurationError, match="GradientAccumulationScheduler"):
        GradientAccumulationScheduler(scheduling)


def test_two_numbers(local_trainer):
    trainer = local_trainer(accumulate_grad_batches=2, callbacks=GradientAccumulationScheduler({0: 2}))
    with pytest.raises(ConfigurationError, match="accumulate_grad_batches=2"):
        trainer.fit(Tiny(), data())


def test_manual_optimization_refuses(local_trainer):
    module = Tiny()
    module.automatic_optimization = False
    with pytest.raises(ConfigurationError, match="manual optimization"):
        local_trainer(callbacks=GradientAccumulationScheduler({3: 2})).fit(module, data())
