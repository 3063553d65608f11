"""`snapshot_every=1` over real Ray: a killed worker costs the step in progress, with a spare and without."""

from __future__ import annotations

import pytest
from exact import Rows, same
from struck import Struck, loaders, repeated, rows

import raytrainer

pytestmark = pytest.mark.usefixtures("ray_session")


def fit(module, folder, **options):
    logger = Rows()
    trainer = raytrainer.Trainer(
        strategy="ddp", num_processes=2, max_epochs=3, seed=5, val_check_interval=0.5, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        logger=logger, **options,
    )  # fmt: skip
    trainer.fit(module, *loaders())
    return trainer, logger.rows


@pytest.mark.late(1.6)
@pytest.mark.sample(1)
@pytest.mark.parametrize("spares", [0, 1])
@pytest.mark.parametrize("moment", ["forward", "backward", "before step", "after step", "batch end"])
def test_a_killed_worker_costs_the_step_in_progress(moment, spares, tmp_path):
    calm = Struck(seen=f"{tmp_path}/calm")
    _, expected = fit(calm, tmp_path, snapshot_every=None)
    module = Struck(1, 9, moment, f"{tmp_path}/flag", f"{tmp_path}/seen")
    trainer, logged = fit(module, tmp_path, snapshot_every=1, spares=spares)
    assert same(module, calm) and (module.count, module.history) == (calm.count, calm.history)
    assert logged == expected and rows(module.seen) == rows(calm.seen)
    (found,) = trainer.recoveries
    assert found.source == "what each worker had recorded" and found.kept == 1
    assert max(repeated(module.seen)) <= 1
