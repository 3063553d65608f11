"""Averages of every step, by hand; what validations, checkpoints and the end have of them."""

from __future__ import annotations

import pytest
import torch
from exact import Died, Exact, run, same
from tiny import Tiny, data, weights
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from raytrainer import Callback, ConfigurationError, EMAWeightAveraging, LambdaCallback, WeightAveraging


class Seeing(Tiny):
    """Notes the weights after each step and in each validation."""

    def __init__(self):
        super().__init__()
        self.trained, self.validated = [], []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.trained.append(weights(self))

    def on_validation_epoch_end(self):
        self.validated.append(weights(self))


def by_hand(trained, decay, every=1, start=0):
    """The averages after each step, by torch's own."""
    averages, average = [], None
    for step, values in enumerate(trained, start=1):
        model = torch.nn.Linear(1, 1, bias=False)
        model.weight = torch.nn.Parameter(values.clone())
        if step >= start and step % every == 0:
            average = average or AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
            average.update_parameters(model)
        averages.append(None if average is None else average.module.weight.detach().clone())
    return averages


@pytest.mark.parametrize("every,start", [(1, 0), (3, 0), (2, 7)])
def test_averages(every, start, local_trainer):
    module = Seeing()
    callback = EMAWeightAveraging(0.8, every, start)
    local_trainer(max_epochs=2, callbacks=callback, num_sanity_val_steps=1).fit(module, data(), data(4))
    expected = by_hand(module.trained, 0.8, every, start)
    sanity, first, last = module.validated
    torch.testing.assert_close(first, expected[9])
    torch.testing.assert_close(last, expected[19])
    torch.testing.assert_close(weights(module), expected[19])
    assert not torch.equal(weights(module), module.trained[-1])
    # what trains is untouched by the averages
    plain = Seeing()
    plain.load_state_dict({"layer.weight": sanity[:8].view(2, 4), "layer.bias": sanity[8:]})
    local_trainer(max_epochs=2).fit(plain, data())
    assert torch.equal(torch.stack(plain.trained), torch.stack(module.trained))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_averages_are_kept_where_they_are_wanted(device, local_trainer):
    """On a CPU, say, beside a GPU's weights; tensors without storage cannot come back."""
    callback = EMAWeightAveraging(0.8, device=device)
    trainer, module = local_trainer(max_epochs=1, callbacks=callback), Seeing()
    if device == "meta":
        with pytest.raises(NotImplementedError, match="meta"):
            trainer.fit(module, data())
        return
    trainer.fit(module, data())
    torch.testing.assert_close(weights(module), by_hand(module.trained, 0.8)[-1])


def test_no_step_is_jumped_over_where_a_batch_has_several(local_trainer):
    class Two(Seeing):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for _ in range(2):
                self.optimizers().zero_grad()
                self.manual_backward(self.loss(batch))
                self.optimizers().step()

    module = Two()
    local_trainer(max_epochs=1, callbacks=EMAWeightAveraging(0.8, 3)).fit(module, data())
    due = [i for i in range(10) if any(step % 3 == 0 for step in (2 * i + 1, 2 * i + 2))]
    expected = by_hand([module.trained[i] for i in due], 0.8)
    torch.testing.assert_close(weights(module), expected[-1])


@pytest.mark.parametrize("kind", ["mean", "one by one", "all at once"])
def test_own_averages_at_own_times(kind, local_trainer):
    """After each second step, and after epochs; the last values weigh as much as all before them."""

    def one(average, value, count):
        return (average + value) / 2

    def many(averages, values, count):
        for average, value in zip(averages, values, strict=True):
            average.copy_(one(average, value, count))

    class Own(WeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return epoch_idx is not None or step_idx % 2 == 1

    functions = {"mean": {}, "one by one": {"avg_fn": one}, "all at once": {"multi_avg_fn": many}}[kind]
    module = Seeing()
    local_trainer(max_epochs=2, callbacks=Own(**functions)).fit(module, data(12))
    taken = [module.trained[i] for i in (1, 3, 5, 5, 7, 9, 11, 11)]
    expected = taken[0]
    for count, value in enumerate(taken[1:], start=1):
        expected = (expected * count + value) / (count + 1) if kind == "mean" else one(expected, value, count)
    torch.testing.assert_close(weights(module), expected)
    with pytest.raises(ConfigurationError, match="one of both"):
        Own(avg_fn=one, multi_avg_fn=many)


def test_from_an_epoch_on_its_end_counts_too(local_trainer):
    module = Seeing()
    averaging = EMAWeightAveraging(0.5, update_every_n_steps=5, update_starting_at_epoch=1)
    local_trainer(max_epochs=2, callbacks=averaging).fit(module, data(12))
    first, second, last = (module.trained[i] for i in (4, 9, 11))
    torch.testing.assert_close(weights(module), ((first + second) / 2 + last) / 2)


def test_a_second_fit_begins_anew(local_trainer):
    callback = EMAWeightAveraging(0.5)
    local_trainer(max_epochs=1, callbacks=callback).fit(Seeing(), data())
    module = Seeing()
    local_trainer(max_epochs=1, callbacks=callback).fit(module, data())
    torch.testing.assert_close(weights(module), by_hand(module.trained, 0.5)[-1])


class Tied(Tiny):
    """Two names for one tensor, a buffer that changes, and one that is no float."""

    def __init__(self):
        super().__init__()
        self.tied = torch.nn.Linear(4, 2)
        self.tied.weight = self.layer.weight
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, x):
        return self.layer(self.norm(x)) + self.tied(x)


class Save(Callback):
    def __init__(self, path, times=99):
        self.path, self.times = path, times

    def on_validation_end(self, trainer, module):
        trainer.save_checkpoint(f"{self.path}/full.ckpt")
        trainer.save_checkpoint(f"{self.path}/weights.ckpt", weights_only=True)

    def on_evaluation_chunk_end(self, trainer, module, report):
        self.times -= 1
        if self.times >= 0:
            trainer.save_checkpoint(f"{self.path}/within.ckpt")


@pytest.mark.parametrize("use_buffers", [True, False])
def test_checkpoints_hold_what_was_validated(use_buffers, tmp_path, local_trainer):
    module = Tied()
    callbacks = [EMAWeightAveraging(0.7, use_buffers=use_buffers), Save(tmp_path)]
    trainer = local_trainer(max_epochs=1, callbacks=callbacks, num_sanity_val_steps=0)
    trainer.fit(module, data(), data(4))
    score = trainer.callback_metrics["val_loss"]
    for name in ("full", "weights", "within"):
        loaded = Tied.load_from_checkpoint(tmp_path / f"{name}.ckpt")
        assert same(loaded, module), name  # training has ended with the validation
        assert local_trainer().validate(loaded, data(4), verbose=False)[0]["val_loss"] == pytest.approx(float(score))
    assert loaded.tied.weight is loaded.layer.weight


def test_a_checkpoint_within_a_validation_has_the_sums_of_training(tmp_path, local_trainer):
    class Sums(Tiny):
        def training_step(self, batch, batch_idx):
            self.log("train_loss", loss := self.loss(batch), on_step=False, on_epoch=True)
            return loss

    options = {"max_epochs": 1, "val_check_interval": 5, "num_sanity_val_steps": 0}
    calm = local_trainer(callbacks=[EMAWeightAveraging(0.5), Save(tmp_path, 1)], **options)
    calm.fit(module := Sums(), data(), data(8))
    trainer, other = local_trainer(callbacks=EMAWeightAveraging(0.5), **options), Sums()
    trainer.fit(other, data(), data(8), ckpt_path=tmp_path / "within.ckpt")
    assert same(other, module)
    assert trainer.callback_metrics["train_loss"] == calm.callback_metrics["train_loss"]


def test_buffers_are_averaged_or_not(local_trainer):
    found = {}
    for use_buffers in (True, False, None):
        torch.manual_seed(1)
        module = Tied()
        callbacks = None if use_buffers is None else EMAWeightAveraging(0.7, use_buffers=use_buffers)
        local_trainer(max_epochs=1, callbacks=callbacks).fit(module, data())
        found[use_buffers] = module.norm
    assert torch.equal(found[False].running_mean, found[None].running_mean)
    assert not torch.equal(found[True].running_mean, found[None].running_mean)
    assert found[True].num_batches_tracked == found[None].num_batches_tracked == 10


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    module = Exact()
    _, rows = run(module, tmp_path_factory.mktemp("calm"), callbacks=[EMAWeightAveraging(0.9)])
    return module, rows


@pytest.mark.parametrize("batches,verb", [(9, "train"), (22, "train"), (21, "validate")])
def test_exact_resume(batches, verb, undisturbed, tmp_path):
    from raytrainer import ModelCheckpoint

    calm, rows = undisturbed

    def callbacks():
        saving = ModelCheckpoint(tmp_path, save_top_k=0, save_last=True, every_n_train_steps=1)
        return [EMAWeightAveraging(0.9), saving]

    with pytest.raises(Died):
        run(Exact((0, batches), flag=f"{tmp_path}/flag", verb=verb), tmp_path, callbacks=callbacks())
    module = Exact()
    _, resumed = run(module, tmp_path, callbacks=callbacks(), ckpt_path="last")
    assert same(module, calm)
    assert 0 < len(resumed) < len(rows) and resumed == rows[-len(resumed) :]


@pytest.mark.parametrize("hook", [None, "on_validation_start", "on_validation_epoch_end"])
def test_an_error_in_validation_leaves_the_trained_weights(hook, local_trainer):
    """Of the module, or of a driver's callback, where workers are well."""

    def fail(*args):
        raise ArithmeticError

    class Fails(Seeing):
        def validation_step(self, batch, batch_idx):
            if hook is None:
                fail()

    module, failing = Fails(), LambdaCallback(**({hook: fail} if hook else {}))
    averages = EMAWeightAveraging(0.5)
    trainer = local_trainer(max_epochs=1, callbacks=[averages, failing], num_sanity_val_steps=0)
    with pytest.raises(ArithmeticError):
        trainer.fit(module, data(), data(4))
    assert torch.equal(weights(module), module.trained[-1])


@pytest.mark.parametrize("arguments", [{"decay": 1.1}, {"update_every_n_steps": 0}, {"update_starting_at_step": -1}])
def test_bad_arguments(arguments):
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        EMAWeightAveraging(**arguments)
