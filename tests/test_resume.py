"""A run that dies and is started again ends as if it had never died: weights, buffers, logged values, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from exact import Died, Exact, run, same

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):
    module = Exact()
    trainer, rows = run(module, tmp_path_factory.mktemp("undisturbed"))
    return module, trainer, rows


# an epoch has 14 batches, 7 steps, validations after 7 and 14 batches
@pytest.mark.parametrize("batches", [3, 7, 8, 13, 14, 15, 22, 28, 29, 41])
@pytest.mark.parametrize("save_every", [1, 3])
def test_resumed_after_dying_anywhere(undisturbed, tmp_path, batches, save_every):
    calm, calm_trainer, rows = undisturbed
    with pytest.raises(Died):
        run(Exact((0, batches), flag=f"{tmp_path}/flag"), tmp_path, save_every=save_every)
    module = Exact()
    trainer, resumed_rows = run(module, tmp_path, save_every=save_every, ckpt_path="last")
    assert same(module, calm)
    assert trainer.global_step == calm_trainer.global_step == 21
    assert trainer.current_epoch == 3
    # what was logged after the resumption is what the undisturbed run logged there
    assert resumed_rows == rows[len(rows) - len(resumed_rows) :]
    if batches > 4 * save_every:  # by then something had been logged
        assert len(resumed_rows) < len(rows)


def test_a_validation_that_dies_is_repeated(undisturbed, tmp_path):
    calm, _, rows = undisturbed
    with pytest.raises(Died):
        run(Exact((0, 21), flag=f"{tmp_path}/flag", verb="validate"), tmp_path, save_every=1)
    module = Exact()
    _, resumed_rows = run(module, tmp_path, save_every=1, ckpt_path="last")
    assert same(module, calm)
    assert resumed_rows == rows[len(rows) - len(resumed_rows) :]


def test_loader_processes_and_sigkill(tmp_path):
    """The whole process is killed while loader processes augment; the same script goes on with ckpt_path="last"."""
    script = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); from exact import *; import torch; torch.set_num_threads(1)\n"
        "die = None if sys.argv[2] == '-' else (0, int(sys.argv[2]))\n"
        "m = Exact(die, 'kill', sys.argv[1] + '/flag')\n"
        "run(m, sys.argv[1], save_every=1, ckpt_path='last', num_workers=2)\n"
        "print(m.state_dict())"
    )

    def start(folder: Path, die: str) -> subprocess.CompletedProcess[str]:
        folder.mkdir(exist_ok=True)
        return subprocess.run([sys.executable, "-c", script, folder, die], capture_output=True, text=True, timeout=120)

    calm = start(tmp_path / "calm", "-")
    assert calm.returncode == 0, calm.stderr
    struck = start(tmp_path / "struck", "17")
    assert struck.returncode == -9
    resumed = start(tmp_path / "struck", "17")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == calm.stdout
    assert "tensor" in calm.stdout


def test_last_without_a_checkpoint_begins_at_the_beginning(undisturbed, tmp_path):
    module = Exact()
    run(module, tmp_path, save_every=5, ckpt_path="last")
    assert same(module, undisturbed[0])


def test_a_checkpoint_holds_gradients_while_accumulating(undisturbed, tmp_path):
    """Saved between two batches of one step: the first batch's gradient must not be lost."""
    from raytrainer import Callback

    class SaveNow(Callback):
        def on_validation_end(self, trainer, module):
            if trainer._state.progress.total_batches == 7:  # an odd batch, in the middle of an accumulation
                trainer.save_checkpoint(f"{tmp_path}/odd.ckpt")

    run(Exact(), tmp_path, callbacks=[SaveNow()])
    module = Exact()
    run(module, tmp_path, ckpt_path=f"{tmp_path}/odd.ckpt")
    assert same(module, undisturbed[0])
