"""Faults in hooks over two workers (the rest is in tests/test_ends.py); Ctrl-C while resources are waited for."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from injection import Bench, Plan
from ray_models import eventually

from raytrainer.driver.workers import idle_pool

WORKERS = ["Module.setup", "Module.on_train_batch_end", "WorkerCallback.on_train_end", "DataModule.teardown"]
DRIVER = ["Callback.on_train_epoch_end", "Callback.teardown", "Logger.finalize", "Callback.on_exception"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("fault", ["error", "exit", "control-c"])
def test_faults_in_hooks(fault, ray_trainer, tmp_path):
    """The workers stay, unless Ctrl-C has left them in the midst of something."""
    for index, place in enumerate([*WORKERS, *DRIVER]):
        if fault == "control-c" and place == "Module.setup":
            continue  # which ends the workers: see test_ray_waits
        folder = tmp_path / str(index)
        folder.mkdir()
        assert Bench(Plan(place, fault, folder), ray_trainer).check() != "not called"


@pytest.mark.sample(0)
@pytest.mark.late(2)
def test_control_c_while_resources_are_waited_for(ray_session, ray_trainer, caplog):
    """Nothing is asked of Ray any more afterwards."""
    import ray
    from ray_models import Net, loader

    idle_pool.close_idle()

    @ray.remote(num_cpus=3)
    class Holder:
        def there(self):
            return True

    holder = Holder.remote()
    ray.get(holder.there.remote())

    def states() -> set[str]:
        return {group["state"] for group in ray.util.placement_group_table().values()}

    def press() -> None:
        eventually(lambda: "PENDING" in states(), "the workers are asked for")
        os.kill(os.getpid(), signal.SIGINT)

    presses = threading.Thread(target=press)
    presses.start()
    trainer = ray_trainer(max_epochs=1, placement_timeout=600)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(Net(), loader(16, 4))
    presses.join()
    assert trainer.interrupted and "PENDING" not in states()
    ray.kill(holder)
    trainer.fit(Net(), loader(16, 4))
    assert trainer.state.finished
