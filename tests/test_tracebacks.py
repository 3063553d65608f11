"""What is left of a traceback: the user's own lines, and where it was raised."""

from __future__ import annotations

import inspect
import traceback

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import raytrainer
from raytrainer.errors import MetricError, WorkerError
from raytrainer.tracebacks import FULL, OWN, fold, folds_tracebacks


class Net(raytrainer.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(3, 1))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Wrong(Net):
    def training_step(self, batch, batch_idx):
        self.log("name", "text")


class Failing(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int):
        try:
            return {}["missing"]
        except KeyError as error:
            raise ValueError("no such sample") from error


def where(error: BaseException) -> list[str]:
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


def caught(trainer, module, loader) -> BaseException:
    with pytest.raises(Exception) as info:
        trainer.fit(module, loader)
    return info.value


def test_an_error_in_torch_shows_the_way_there(local_trainer):
    error = caught(local_trainer(max_epochs=1), Net(), [torch.ones(2, 4)])
    # this test, the user's two lines, and the last one, in torch
    assert where(error) == ["caught", "training_step", "forward", "forward"]
    assert error.__notes__ == [f"{FULL}=1 shows the frames of raytrainer and torch too."]


def test_what_it_came_from_is_folded_too(local_trainer):
    error = caught(local_trainer(max_epochs=1), Net(), DataLoader(Failing(), 2))
    assert where(error) == ["caught", "__getitem__"]
    assert where(error.__cause__) == ["__getitem__"]


@pytest.mark.parametrize("failing", [ValueError, KeyError])
def test_an_error_in_a_loader_process_shows_its_own_traceback_only(failing, local_trainer):
    def collate(samples):
        raise failing("odd samples")

    error = caught(local_trainer(max_epochs=1), Net(), DataLoader([1, 2], num_workers=1, collate_fn=collate))
    shown = "".join(traceback.format_exception(error))
    assert type(error) is failing and "in collate" in shown and "odd samples" in shown
    assert where(error) == ["caught"] and OWN not in shown


def test_our_own_errors_show_the_users_line(local_trainer):
    error = caught(local_trainer(max_epochs=1), Wrong(), [torch.ones(2, 4)])
    assert isinstance(error, MetricError) and where(error) == ["caught", "training_step"]


def test_all_of_it_when_asked(local_trainer, monkeypatch):
    monkeypatch.setenv(FULL, "1")
    error = caught(local_trainer(max_epochs=1), Net(), [torch.ones(2, 4)])
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    assert len([name for name in files if name.startswith(OWN)]) > 5 and not hasattr(error, "__notes__")


def test_a_fault_of_this_package_keeps_its_frames():
    try:
        raytrainer.ModelSummary().show(None, None, None)
    except AttributeError as error:
        before = where(error)[1:]
        error.__traceback__ = error.__traceback__.tb_next  # as where only this package's code was running
        fold(error)
        assert where(error) == before and len(before) > 0


def test_signatures_stay():
    assert list(inspect.signature(raytrainer.Trainer.fit).parameters)[:3] == ["self", "model", "train_dataloaders"]
    assert "Train." in (raytrainer.Trainer.fit.__doc__ or "")


@pytest.mark.parametrize(
    ("verb", "wrong"), [("fit", {"train_loader": []}), ("predict", {"loader": []}), ("test", {"x": 1}), ("fit", None)]
)
def test_a_verb_that_is_called_wrongly_says_what_it_takes(local_trainer, verb, wrong):
    with pytest.raises(TypeError) as caught:
        getattr(local_trainer(), verb)(*([Net()] if wrong is not None else []), **(wrong or {}))
    (note,) = caught.value.__notes__
    assert note.startswith(f"{verb} takes model, ") and "dataloaders" in note and "self" not in note


OURS = """
def verb():
    try:
        raise WorkerError(1, "node", "the user's lines")
    except WorkerError as where:
        raise ValueError("of a step") from where
"""


def test_of_a_workers_error_no_frame_of_this_package_is_left():
    names = {"WorkerError": WorkerError}
    exec(compile(OURS, f"{OWN}made_up.py", "exec"), names)
    with pytest.raises(ValueError, match="of a step") as caught:
        folds_tracebacks(names["verb"])()
    files = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert f"{OWN}made_up.py" not in files and len(files) <= 2  # this test, and what the verb is wrapped in
