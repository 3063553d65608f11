"""Names that were probably meant."""

import inspect

import pytest

import raytrainer as rt
from raytrainer.plan.names_elsewhere import OF_A_TRAINER
from raytrainer.plan.nearest_names import did_you_mean, nearest, nearly, perhaps

TRAINER = list(inspect.signature(rt.Trainer).parameters)
CHECKPOINT = list(inspect.signature(rt.ModelCheckpoint).parameters)


@pytest.mark.parametrize(
    ("given", "known", "meant"),
    [
        ("max_epoch", TRAINER, ["max_epochs"]),
        ("Callbacks", TRAINER, ["callbacks"]),
        ("maxEpochs", TRAINER, ["max_epochs"]),
        ("callbaks", TRAINER, ["callbacks"]),
        ("every_n_steps", CHECKPOINT, ["every_n_train_steps"]),
        ("dataloader", ["model", "train_dataloaders", "val_dataloaders"], ["train_dataloaders", "val_dataloaders"]),
        ("tensor_parallel", ["blocks", "tensor", "data"], ["tensor"]),
        ("gpus_per_node", TRAINER, ["gpus"]),
        ("DDP", ["auto", "ddp", "ddp2", "dp"], ["ddp"]),
        ("fspd", ["ddp", "dp", "fsdp"], ["fsdp"]),
        ("xyz", TRAINER, []),
        ("", TRAINER, []),
        ("a", ["a_b", "a_c"], []),
    ],
)
def test_nearest(given, known, meant):
    assert nearest(given, known) == meant


def test_as_words():
    assert did_you_mean("dir", ["save_dir", "name"]) == "did you mean 'save_dir'?"
    assert did_you_mean("on_epoch_end", ["on_train_epoch_end", "on_test_epoch_end"]) == (
        "did you mean 'on_train_epoch_end' or 'on_test_epoch_end'?"
    )
    assert perhaps("epocs", ["epochs"]) == " Did you mean 'epochs'?"
    assert perhaps(3, ["epochs"]) == perhaps("xyz", ["epochs"]) == ""


def test_names_of_ones_own_are_no_misspellings():
    assert [nearly(name, TRAINER) for name in ("max_epoch", "gpuss", "started", "my_callbacks", "note")] == [
        "max_epochs", "gpus", "", "", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train", "Here: trainer.fit(model, train_loader, val_loader)."),
        ("tune", "Here: trainer.lr_find(model) and trainer.scale_batch_size(model)."),
        ("curent_epoch", "did you mean 'current_epoch'?"),
        ("_private", "'Trainer' object has no attribute '_private'"),
    ],
)
def test_a_trainers_attributes(name, said):
    trainer = rt.Trainer(logger=False)
    with pytest.raises(AttributeError) as error:
        getattr(trainer, name)
    assert said in str(error.value)


def test_what_fails_within_a_trainers_property_is_told_as_it_is():
    class Own(rt.Logger):
        def log_metrics(self, metrics, step):
            """Nowhere."""

        def log_hyperparams(self, params):
            """Nowhere."""

        @property
        def log_dir(self):
            return self.folder

    with pytest.raises(AttributeError, match="'Own' object has no attribute 'folder'"):
        rt.Trainer(logger=Own()).log_dir  # noqa: B018


def test_what_a_trainer_has_not_is_not_set_by_mistake():
    trainer = rt.Trainer(logger=False)
    for name, meant in {"max_epoch": "max_epochs", "should_sotp": "should_stop"}.items():
        with pytest.raises(AttributeError, match=f"has no '{name}'; did you mean '{meant}'"):
            setattr(trainer, name, 1)
    trainer.note = trainer.should_stop = True  # one of one's own is taken
    assert not [name for name in OF_A_TRAINER if hasattr(trainer, name)]
