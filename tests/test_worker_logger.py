"""`self.logger` in module code: calls are made on the driver's loggers, in order, once, on all of them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from exact import Exact, Mortal, run, same
from tiny import Tiny, data

from raytrainer import Logger, SerializationError, WorkerCallback
from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.loggers.media import as_images, draw


class Media(Logger):
    """Keeps all calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def log_rows(self, rows):
        self.calls += [("row", step) for step, _ in rows]

    def log_metrics(self, metrics, step=None):
        self.calls.append(("metrics", metrics, step))

    def log_hyperparams(self, params):
        self.calls.append(("hparams", params))

    def log_image(self, key, images, step=None, caption=None):
        self.calls.append(("image", key, images, step, caption))

    def log_histogram(self, key, values, step=None):
        self.calls.append(("histogram", key, values, step))

    def log_text(self, key, text, step=None):
        self.calls.append(("text", text, step))

    def log_own(self, *args, **kwargs):
        self.calls.append(("own", args, kwargs))

    def media(self) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] != "row"]


class Plain(Logger):
    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params):
        pass


@pytest.fixture
def said(caplog):
    root = logging.getLogger("raytrainer")
    root.addHandler(caplog.handler)
    yield caplog
    root.removeHandler(caplog.handler)


def test_every_kind_of_call_reaches_all_loggers_in_order(local_trainer):
    class Showing(Tiny):
        def on_fit_start(self):
            self.logger.log_hyperparams({"extra": 1})

        def training_step(self, batch, batch_idx):
            values = torch.full((2,), float(batch_idx), requires_grad=True) * 1.0
            self.logger.log_histogram("h", values)
            with torch.no_grad():
                values += 100.0  # what was logged stays as it was
            self.logger.log_own(batch_idx, a=[values])
            self.logger.log_metrics({"m": batch_idx}, step=70 + batch_idx)
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            self.logger.log_text("t", f"{batch_idx}")

        def on_validation_end(self):
            self.logger.log_image("i", torch.zeros(3, 4, 4), caption="black")

    loggers = [Media(), Plain(), Media()]
    local_trainer(max_epochs=1, logger=loggers).fit(Showing(), data(6), data(4))
    names = [(call[0], *(call[-1:] if call[0] != "own" else ())) for call in loggers[0].media()]
    step = [("histogram", 0), ("own",), ("metrics", 70), ("histogram", 1), ("own",), ("metrics", 71)]
    step += [("histogram", 2), ("own",), ("metrics", 72)]
    assert names == [("hparams", {"extra": 1}), *step, ("text", 2), ("text", 2), ("image", "black")]
    histograms = [call[2] for call in loggers[0].media() if call[0] == "histogram"]
    assert [h.tolist() for h in histograms] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    assert not any(h.requires_grad for h in histograms)
    own = [call[2]["a"][0].tolist() for call in loggers[0].media() if call[0] == "own"]
    assert own == [[100.0, 100.0], [101.0, 101.0], [102.0, 102.0]]
    assert [call[0] for call in loggers[2].media()] == [call[0] for call in loggers[0].media()]


def test_worker_callbacks_have_it_too(local_trainer):
    class Watch(WorkerCallback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.logger.log_text("t", "seen")
            assert trainer.loggers == [trainer.logger] == module.loggers

    logger = Media()
    local_trainer(max_epochs=1, logger=logger, callbacks=Watch()).fit(Tiny(), data(6))
    assert logger.media() == [("text", "seen", step) for step in range(3)]


def test_calls_of_the_very_last_hooks_arrive(local_trainer):
    class Late(Tiny):
        def on_train_end(self):
            self.logger.log_text("t", "train end")

        def teardown(self, stage):
            self.logger.log_text("t", f"teardown {stage}")

    logger = Media()
    trainer = local_trainer(max_epochs=1, logger=logger)
    trainer.fit(Late(), data(6))
    assert logger.media() == [("text", "train end", 2), ("text", "teardown fit", 2)]
    trainer.validate(type("V", (Late,), {"on_validation_end": lambda self: self.logger.log_text("t", "v")})(), data(4))
    assert logger.media()[2:] == [("text", "v", 2), ("text", "teardown validate", 2)]


def test_the_sanity_check_logs_nothing(local_trainer):
    class Showing(Tiny):
        def validation_step(self, batch, batch_idx):
            self.logger.log_text("t", "x")

    logger = Media()
    local_trainer(max_epochs=1, logger=logger, limit_val_batches=1).fit(Showing(), data(6), data(4))
    assert len(logger.media()) == 1


@pytest.mark.parametrize(
    ("options", "there"), [({"logger": False}, False), ({"fast_dev_run": True, "logger": True}, True)]
)
def test_without_loggers(options, there, local_trainer, tmp_path):
    class Showing(Tiny):
        def training_step(self, batch, batch_idx):
            assert (self.logger is not None) == there and len(self.loggers) == there
            for logger in self.loggers:
                logger.log_image("x", batch[0])
            return self.loss(batch)

    local_trainer(**{"max_epochs": 1, **options}).fit(Showing(), data(6))
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_work_says_so(local_trainer, said):
    class Wrong(Tiny):
        def training_step(self, batch, batch_idx):
            with pytest.raises(AttributeError, match="Callback"):
                _ = self.logger.experiment
            with pytest.raises(TypeError):
                self.logger.log_image()
            with pytest.raises(SerializationError, match="generator"):
                self.logger.log_own(i for i in range(3))
            self.logger.log_image("x", torch.zeros(1, 2, 2))
            self.logger.log_figure("x", torch.zeros(1, 2, 2))
            return self.loss(batch)

    local_trainer(max_epochs=1, logger=[Plain()]).fit(Wrong(), data(6))
    assert said.text.count("self.logger.log_image(): none of the loggers (Plain) stores that.") == 1
    assert said.text.count("self.logger.log_figure(): none of the loggers") == 1


def test_a_failing_logger_is_named_once(local_trainer, said):
    class Broken(Media):
        def log_text(self, key, text, step=None):
            raise OSError("disk full")

        log_rows = log_text

    class Showing(Tiny):
        def training_step(self, batch, batch_idx):
            self.logger.log_text("t", "x")
            self.log("a", 1.0)
            return self.loss(batch)

    good = Media()
    trainer = local_trainer(max_epochs=2, logger=[Broken(), good], log_every_n_steps=1)
    trainer.fit(Showing(), data(6))
    assert trainer.state.finished and trainer.global_step == 6 and len(good.media()) == 6
    assert said.text.count("Broken failed, training goes on:") == 1


def test_a_logger_that_is_slow_to_fail_is_left_alone_for_a_while(monkeypatch):
    from raytrainer.driver.reporting import run_loggers as logs

    now = [100.0]
    monkeypatch.setattr(logs.time, "perf_counter", lambda: now[0])
    calls = []

    class Hanging(Plain):
        def log_rows(self, rows):
            calls.append(now[0])
            now[0] += 60.0
            raise TimeoutError

        def finalize(self, status):
            calls.append("finalize")

    sink = logs.Logs([Hanging()])
    for _ in range(3):
        sink.each("log_rows", [])
    now[0] += 599.0
    sink.each("log_rows", [])
    sink.each("finalize", "success")
    now[0] += 2.0
    sink.each("log_rows", [])
    assert calls == [100.0, "finalize", 761.0]


@pytest.mark.parametrize("most", [1, 16])
def test_transfer_hooks_log_at_the_step_of_their_batch(most, local_trainer, monkeypatch):
    monkeypatch.setattr("raytrainer.plan.steps_and_epochs.chunk_batches", lambda *a, **k: most)

    class Moving(Tiny):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.logger.log_text("t", self.trainer.running)
            return batch

    logger = Media()
    local_trainer(max_epochs=1, logger=logger).fit(Moving(), data(6), data(2))
    assert logger.media() == [*(("text", "train", step) for step in range(3)), ("text", "validate", 2)]


# ---------------------------------------------------------------- recovery


class Telling(Exact):
    """Logs text at every point of an epoch; what it says is a function of where it is."""

    def tell(self, where: str) -> None:
        self.logger.log_text("t", f"{where} {self.current_epoch} {int(self.batches)}")

    def on_fit_start(self):
        self.logger.log_text("t", "fit")
        self.logger.log_text("t", "fit again")

    def on_train_start(self):
        self.logger.log_text("t", "start")

    def on_train_epoch_start(self):
        self.logger.log_text("t", f"epoch {self.current_epoch}")

    def training_step(self, batch, batch_idx):
        self.tell("step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.tell(f"val {batch_idx}")

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.tell(f"before {self.trainer.running} {batch[0].sum():.6f}")
        return batch

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        self.tell(f"to device {self.trainer.running} {batch[0].sum():.6f}")
        return batch

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.tell(f"after {self.trainer.running} {batch[0].sum():.6f}")
        return batch

    def on_validation_end(self):
        self.tell("val end")

    def on_train_epoch_end(self):
        self.tell("epoch end")

    def on_train_end(self):
        self.tell("end")


def texts(monkeypatch, folder, die=None, verb="train", **options):
    logger = Media()
    monkeypatch.setattr(GroupSupply, "take", lambda self, settings: Mortal())
    module = Telling(die, flag=f"{folder}/flag", verb=verb)
    trainer, _ = run(module, folder, logger=logger, **options)
    return module, trainer, [call[1:] for call in logger.media()]


DEATHS = [(batches, "train") for batches in (0, 1, 7, 8, 14, 28, 29, 41)] + [(b, "validate") for b in (7, 14, 21)]


@pytest.mark.sample(12)
@pytest.mark.parametrize(("batches", "verb"), DEATHS)
@pytest.mark.parametrize("every", [None, 1, 3])
def test_a_recovered_run_makes_each_call_once(monkeypatch, tmp_path, batches, verb, every):
    calm, _, expected = texts(monkeypatch, tmp_path, snapshot_every=every)
    module, trainer, found = texts(monkeypatch, tmp_path, (0, batches), verb, snapshot_every=every)
    assert len(trainer.recoveries) == 1 and same(module, calm)
    assert found == expected
    assert len(expected) > 60 and len(set(expected)) == len(expected)


# ---------------------------------------------------------------- pictures


def test_pictures_become_arrays():
    red = torch.zeros(3, 2, 5)
    red[0] = 1.0
    (array,) = as_images(red)
    assert array.shape == (2, 5, 3) and array.dtype.name == "uint8"
    assert array[0, 0].tolist() == [255, 0, 0]
    assert [a.shape for a in as_images(red.permute(1, 2, 0).numpy())] == [(2, 5, 3)]
    assert [a.shape for a in as_images([red.unsqueeze(0), torch.zeros(4, 6)])] == [(2, 5, 3), (4, 6, 3)]
    assert as_images(torch.full((1, 2, 2), 7, dtype=torch.uint8))[0][0, 0].tolist() == [7, 7, 7]
    assert as_images(torch.tensor([[float("nan"), 2.0]]))[0][0].tolist() == [[0] * 3, [255] * 3]
    from PIL import Image

    assert as_images(Image.new("L", (5, 2), 9))[0].shape == (2, 5, 3)
    with pytest.raises(ValueError, match=r"of shape \(5, 2, 2\)"):
        as_images(torch.zeros(5, 2, 2))


def test_a_figure_is_drawn_without_a_display():
    figures = pytest.importorskip("matplotlib.figure")
    figure = figures.Figure(figsize=(2, 1), dpi=50)
    figure.add_subplot().plot([0, 1])
    canvas = figure.canvas
    array = draw(figure)
    assert array.shape == (50, 100, 4) and array.min() < 128 and figure.canvas is canvas
    with pytest.raises(ValueError, match="matplotlib figure"):
        draw("figure")
