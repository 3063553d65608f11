"""Faults in hooks over two workers (the rest is in tests/test_ends.py); Ctrl-C and SIGTERM as scripts meet them."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest
from injection import Bench, Plan
from ray_models import eventually
from scripts import MODULE, script

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
        eventually(lambda: "PENDING" in states(), 60, "the workers are asked for")
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


TERMINATED = (
    MODULE
    + """
class Tells(raytrainer.Callback):
    def on_train_chunk_end(self, trainer, module, report):
        if trainer.global_step > 6:
            print("under way", flush=True)

    def teardown(self, trainer, module, stage):
        print("torn down", flush=True)

if __name__ == "__main__":
    module = Net(pause=0.02)
    module.register_buffer("large", torch.zeros(20_000_000))
    saves = raytrainer.OnExceptionCheckpoint(os.path.dirname(os.path.abspath(__file__)))
    over_ray = trainer(
        address=sys.argv[1], max_epochs=100, snapshot_every=2, callbacks=[Tells(), saves],
        enable_checkpointing=True, default_root_dir=saves.dirpath,
    )
    over_ray.fit(module, loader(batches=2000))
"""
)


@pytest.mark.late(2)
def test_sigterm_ends_in_order(ray_session, tmp_path):
    """Ray would have the process aborted after three seconds; what is being written then would be half a file."""
    with script(tmp_path / "terminated.py", TERMINATED, ray_session) as running:
        running.wait_for("under way")  # so that there is a snapshot
        os.kill(running.process.pid, signal.SIGTERM)
        assert running.process.wait(60) == 128 + signal.SIGTERM, running.output.read_text()
        assert running.lines("torn down")
        (said,) = (line for line in running.output.read_text().splitlines() if line.startswith("Preempted at step"))
    saved = Path(tmp_path, "checkpoints", "preempted.ckpt")
    assert json.loads((saved / "meta.json").read_text())["global_step"] == int(said.split()[3].rstrip(",")) > 6
    assert Path(tmp_path, "on_exception.ckpt", "meta.json").exists()
