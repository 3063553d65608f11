"""Modules of a script's `__main__` and of a notebook's cells; SIGTERM, and what a script leaves behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from ray_models import PATIENCE, alive, eventually
from scripts import MODULE, script

MAIN = (
    MODULE
    + """
class Tells(raytrainer.Callback):
    def on_train_chunk_end(self, trainer, module, report):
        if trainer.global_step > 6:
            print("under way", flush=True)

    def teardown(self, trainer, module, stage):
        print("torn down", flush=True)

if __name__ == "__main__":
    address = sys.argv[1]
    module = Net()
    before = module.layer.weight.clone()
    trainer(address=address).fit(module, loader())
    assert not torch.equal(before, module.layer.weight) and module.batches == 4, module.batches
    print("script", flush=True)

    # a cell changes the class and runs again, as in a notebook
    cell = {"__name__": "__main__", "Net": Net}
    exec("class Cell(Net):\\n    def on_train_end(self):\\n        self.ended = True\\nmodule = Cell()", cell)
    trainer().fit(cell["module"], loader())
    assert cell["module"].ended and cell["module"].batches == 4

    # what of this process travels: where modules are found, torch's default dtype, the level of a logger
    sys.path.insert(0, sys.argv[2])
    import found_elsewhere
    import logging
    logging.getLogger("of_the_script").setLevel(logging.ERROR)
    torch.set_default_dtype(torch.float64)
    module = found_elsewhere.Net()
    trainer().fit(module, torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=2))
    assert module.seen == ["torch.float64", logging.ERROR], module.seen
    print("cell", flush=True)

    # a run that goes on until it is told to end, and has much to write then
    module = Net(pause=0.02)
    module.register_buffer("large", torch.zeros(20_000_000))
    saves = raytrainer.OnExceptionCheckpoint(sys.argv[2])
    trainer(
        address=address, max_epochs=100, snapshot_every=2, callbacks=[Tells(), saves],
        enable_checkpointing=True, default_root_dir=saves.dirpath,
    ).fit(module, loader(batches=2000))
    # neither closed nor shut down: the end of the process does it
"""
)


ELSEWHERE = """
import logging, torch, raytrainer

class Net(raytrainer.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        self.seen = [str(torch.get_default_dtype()), logging.getLogger("of_the_script").level]
        return self.layer(batch + torch.zeros(2)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""


@pytest.mark.late(2)
def test_main_and_notebook_cells_until_sigterm(ray_session, tmp_path):
    """Ray would have the process aborted three seconds after SIGTERM; what is being written then would be half a file.

    (That workers end with a script that ends by itself, tests of other clusters see: `test_ray_attach`.)
    """
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "found_elsewhere.py").write_text(ELSEWHERE)
    (tmp_path / "scripts").mkdir()
    with script(tmp_path / "scripts" / "main.py", MAIN, ray_session, str(elsewhere)) as running:
        running.wait_for("cell")
        assert running.lines("script")
        running.wait_for("under way")  # so that there is a snapshot
        os.kill(running.process.pid, signal.SIGTERM)
        assert running.process.wait(PATIENCE) == 128 + signal.SIGTERM, running.output.read_text()
        assert running.lines("torn down")
        (said,) = running.lines("Preempted at step")
        # user's lines arrive, and none of ours from workers
        workers = [
            line for line in running.output.read_text().splitlines() if "(rank " in line or "RemoteWorker" in line
        ]
        assert len(running.pids()) == 2
        assert all(any(word in line for word in ("pids ", "running", "pausing")) for line in workers), workers
        eventually(lambda: not any(map(alive, running.pids())), "the workers end with the script")
    saved = elsewhere / "checkpoints" / "preempted.ckpt"
    assert json.loads((saved / "meta.json").read_text())["global_step"] == int(said.split()[3].rstrip(",")) > 6
    assert Path(elsewhere, "on_exception.ckpt", "meta.json").exists()
