"""The complete order of hooks, as Lightning 2.6 has it. `tests/ray` runs the same scenarios on workers."""

from __future__ import annotations

import hook_order
import pytest
import torch

from raytrainer import ModelCheckpoint, Module
from raytrainer.data.data_hooks import DataHooks


@pytest.mark.parametrize("name", hook_order.SCENARIOS)
def test_order(name, tmp_path, local_trainer):
    scenario = hook_order.SCENARIOS[name]
    assert hook_order.run_scenario(scenario, tmp_path / "calls", local_trainer) == scenario.expected


def test_every_hook_is_recorded():
    public = {n for c in (Module, DataHooks) for n in vars(c) if n.startswith("on_") or n in vars(DataHooks)}
    hooks = {n for n in public if not n.startswith("_")}
    assert hooks <= set(dir(hook_order.RecordingModule))
    data = {f"{stage}_{kind}" for stage in hook_order.STAGES for kind in ("dataloader", "dataset")}
    assert hooks - set(vars(hook_order.RecordingModule)) <= data


def test_checkpoint_hooks(tmp_path, local_trainer):
    """Saving comes after the module's `on_train_epoch_end`; loading before there are optimizers."""
    first, second = tmp_path / "first", tmp_path / "second"
    options = {"limit_train_batches": 1, "limit_val_batches": 0, "callbacks": ModelCheckpoint(dirpath=tmp_path / "c")}
    local_trainer(max_epochs=1, **options).fit(hook_order.RecordingModule(first))
    calls = first.read_text().split()
    assert calls[calls.index("on_save_checkpoint") - 1] == "on_train_epoch_end"
    assert calls[calls.index("on_save_checkpoint") + 1] == "on_train_end"
    path = options["callbacks"].best_model_path
    local_trainer(max_epochs=2, **options).fit(hook_order.RecordingModule(second), ckpt_path=path)
    calls = second.read_text().split()
    start = [c for c in calls if c not in ("configure_callbacks", "prepare_data")][:5]
    assert start == ["setup(fit)", "configure_model", "on_load_checkpoint", "configure_optimizers", "on_fit_start"]
    assert calls.count("on_train_epoch_start") == calls.count("on_train_epoch_end") == 1


def test_hooks_set_on_the_instance_count(local_trainer):
    seen = []
    module = Module()
    module.layer = torch.nn.Linear(1, 1)
    module.training_step = lambda batch: module.layer(batch).sum()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    module.on_train_batch_end = lambda outputs, batch, batch_idx: seen.append(batch_idx)
    local_trainer(max_epochs=1).fit(module, torch.utils.data.DataLoader(torch.ones(3, 1)))
    assert seen == [0, 1, 2]
