"""The package, and a fit in this process, do without what Windows has not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WITHOUT = """
import signal, sys
import torch  # the libraries do as they do
import pyarrow.fs, rich.console, torch.utils.data
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # an import is an ImportError
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGCHLD"):
    delattr(signal, name)
for name in ("fork", "getuid", "geteuid", "getpgid", "killpg", "sysconf", "register_at_fork", "sched_getaffinity"):
    if hasattr(__import__("os"), name):
        delattr(__import__("os"), name)

import raytrainer as rt


class Net(rt.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        self.log("loss", self.net(batch).square().mean(), on_epoch=True)
        return self.net(batch).square().mean()

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


loader = torch.utils.data.DataLoader(torch.ones(8, 4), 2)
trainer = rt.Trainer(max_epochs=2, log_every_n_steps=1, callbacks=[rt.ModelCheckpoint("saved", save_last=True)])
trainer.fit(Net(), loader, loader)
rt.Trainer(max_epochs=3).fit(Net(), loader, loader, ckpt_path="saved/last.ckpt")
assert trainer.global_step == 8 and trainer.where() == []
print("trained")
"""


def test_a_fit_where_posix_is_not(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", WITHOUT], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and ran.stdout.endswith("trained\n"), ran.stderr
