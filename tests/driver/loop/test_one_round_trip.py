"""A validation that nobody looks into takes one round trip to workers elsewhere, or comes with training's, and is the
same as with four.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import Tiny, data

from raytrainer import Callback, EarlyStopping, Logger, ModelCheckpoint, Module
from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.driver.workers.local_group import LocalGroup
from raytrainer.driver.workers.task_pickling import asked
from raytrainer.worker.actor.actor import Failure, RemoteWorker
from raytrainer.worker.verbs import verb_of
from raytrainer.worker.worker import Worker


class Apart(LocalGroup):
    """As if of another process: what workers are to do later goes with what they are told next."""

    in_process = False

    def __init__(self):
        super().__init__()
        self.told, self._later, self.together = [], [], 0

    def call(self, method, /, *args, **kwargs):
        self._tell_rest()
        self.told.append(verb_of(method).name)
        answers = super().call(method, *args, **kwargs)
        validation = getattr(answers[0], "validation", None)
        self.together += validation is not None
        for report in (answers[0], validation):  # whether one comes with training depends on how long they take
            if hasattr(report, "seconds"):
                report.seconds = 1e-3
        return answers

    def later(self, method, /, *args, **kwargs):
        self._later.append((method, args, kwargs))

    def capture(self, weights_only=False, final=False):
        self._tell_rest()
        return super().capture(weights_only, final)

    def _tell_rest(self):
        later, self._later = self._later, []
        for method, args, kwargs in later:
            super().call(method, *args, **kwargs)


class Seeing(Tiny):
    """Draws random numbers in validations, and notes what `self.trainer` shows."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def see(self, where):
        shown = self.trainer
        self.seen.append((where, {n: float(v) for n, v in shown.callback_metrics.items()}, self.training))
        self.seen.append((shown.validating, {n: float(v) for n, v in shown.logged_metrics.items()}))

    def training_step(self, batch, batch_idx):
        self.see("train")
        loss = self.loss(batch) * torch.rand(())
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.see("validate")
        self.log("val_loss", self.loss(batch) + torch.rand(()), add_dataloader_idx=False)

    def on_save_checkpoint(self, checkpoint):
        self.see("save")

    def on_train_epoch_end(self):
        self.see("end")

    on_validation_start = Module.on_validation_start


class WatchingEnds(Callback):
    def __init__(self):
        self.seen = []

    def see(self, trainer, where):
        self.seen.append((where, {n: float(v) for n, v in trainer.callback_metrics.items()}, trainer.num_val_batches))

    def on_evaluation_chunk_end(self, trainer, module, report):
        if report.done:
            self.see(trainer, f"chunk {report.batches}")

    def on_validation_epoch_end(self, trainer, module):
        self.see(trainer, "epoch_end")

    def on_validation_end(self, trainer, module):
        self.see(trainer, "end")


class Watching(WatchingEnds):
    def on_validation_start(self, trainer, module):
        self.see(trainer, "start")

    def on_validation_epoch_start(self, trainer, module):
        self.see(trainer, "epoch_start")


def with_hook(hook):
    def seeing(self, *args):
        self.see(hook)
        getattr(super(kind, self), hook)(*args)

    kind = type("Hooked", (Seeing,), {hook: seeing} if hook else {})
    return kind


class Kept(Logger):
    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params):
        pass


def seen_by(group, hook, loaders, watching, trainer_of, folder):
    torch.manual_seed(1)
    watching, kept = watching(), Kept()
    saving = ModelCheckpoint(monitor="val_loss", save_top_k=-1, dirpath=folder)
    stopping = [EarlyStopping(monitor=name, patience=9) for name in ("val_loss", "loss")]
    trainer = trainer_of(
        group, max_epochs=2, val_check_interval=2, limit_val_batches=3, num_sanity_val_steps=1, snapshot_every=None,
        callbacks=[watching, saving, *stopping], logger=kept, log_every_n_steps=1, enable_progress_bar=True,
    )  # fmt: skip
    module = with_hook(hook)()
    trainer.fit(module, data(12), [data(8, seed=2), data(4, seed=3)][:loaders])
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    state = {name: value.tolist() for name, value in module.state_dict().items()}
    seen = module.seen, watching.seen, kept.rows, [callback.state_dict() for callback in stopping]
    return *seen, state, values, Path(saving.best_model_path).name, float(torch.rand(()))


@pytest.mark.sample(8)
@pytest.mark.parametrize("watching", [Watching, WatchingEnds])
@pytest.mark.parametrize("loaders", [1, 2])
@pytest.mark.parametrize(
    ("hook", "start", "end"),
    [
        ("", 1, 1),
        ("on_train_epoch_end", 1, 1),
        ("on_validation_epoch_start", 6, 1),
        ("on_validation_model_zero_grad", 6, 1),
        ("on_validation_epoch_end", 1, 6),
        ("on_validation_model_train", 1, 6),
    ],
)
def test_all_that_anybody_sees_is_the_same(hook, start, end, loaders, watching, local_trainer, monkeypatch, tmp_path):
    def trainer_of(group, **options):
        monkeypatch.setattr(GroupSupply, "take", lambda self, settings: group)
        return local_trainer(**options)

    apart = Apart()
    expected = seen_by(LocalGroup(), hook, loaders, watching, trainer_of, tmp_path / "here")
    found = seen_by(apart, hook, loaders, watching, trainer_of, tmp_path / "apart")
    assert found == expected
    # of seven evaluations the sanity check comes first, then six validations
    starts, ends = (apart.told.count(f"{verb}_evaluation") for verb in ("start", "end"))
    assert (starts, ends) == (1 + start, 1 if end == 1 else 7)
    # two of each epoch's three are within it; the very first one starts seen
    assert apart.together == (3 if start == 1 and watching is WatchingEnds else 0)


def test_the_last_of_several_loaders_does_not_say_how_fast_the_first_one_is(local_trainer, monkeypatch):
    """Else many slow batches would be one message, in which nobody hears Ctrl-C and workers count as hanging."""
    group, sizes = Apart(), []
    call = group.call

    def noting(method, /, *args, **kwargs):
        if method is Worker.evaluate and len(args) > 1:
            sizes.append(args[0])
        return call(method, *args, **kwargs)

    group.call = noting
    monkeypatch.setattr(GroupSupply, "take", lambda self, settings: group)
    trainer = local_trainer(max_epochs=2, val_check_interval=2, num_sanity_val_steps=0)
    trainer.fit(with_hook("")(), data(12), [data(8, seed=2), data(40, seed=3)])
    assert sizes and set(sizes) == {1}


@pytest.mark.parametrize("slow", ["", "train", "evaluate"])
def test_a_slow_batch_is_a_message_of_its_own(slow, local_trainer, monkeypatch):
    """Two together would be silent for longer than any one batch takes, so that workers would count as hanging."""
    group, call = Apart(), Apart.call

    def timed(method, /, *args, **kwargs):
        (answer,) = call(group, method, *args, **kwargs)
        if verb_of(method).name in ("train", "evaluate"):
            answer.seconds = 400.0 if verb_of(method).name == slow else answer.seconds
        return [answer]

    group.call = timed
    monkeypatch.setattr(GroupSupply, "take", lambda self, settings: group)
    trainer = local_trainer(max_epochs=2, val_check_interval=2, num_sanity_val_steps=0)
    trainer.fit(with_hook("")(), data(20), data(8, seed=2))
    assert (group.together > 0) is (slow == "")


def test_workers_obey_several_verbs_up_to_the_first_failure():
    class Obeying(RemoteWorker):
        def __init__(self):
            self.told = []

        def obey(self, name, *args, **kwargs):
            self.told.append((name, args, kwargs))
            failed = Failure(0, "", "ValueError", "", "", None)
            return failed if args == ("fails",) else name

        class Remote:
            def __init__(self, worker):
                self.remote = worker.obey_packed

    worker = Obeying()
    actor = type("Actor", (), {"obey_packed": Obeying.Remote(worker)})
    leave, cursor = verb_of(Worker.leave_evaluation), verb_of(Worker.cursor)
    assert asked([actor], [(leave, (1,), {"metrics": 2})], cursor, (), {}) == ["cursor"]
    assert worker.told == [("leave_evaluation", (1,), {"metrics": 2}), ("cursor", (), {})]
    worker.told = []
    (answer,) = asked([actor], [(leave, ("fails",), {})], cursor, (), {})
    assert isinstance(answer, Failure) and [name for name, _, _ in worker.told] == ["leave_evaluation"]
