"""The example notebook in a real Jupyter kernel, and what a notebook does besides: change cells, interrupt."""

from __future__ import annotations

import ast
import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from ray_models import PATIENCE, alive, eventually

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"

Outputs = list[dict[str, Any]]

# what the tests below need in cells: helpers and constants that change, and a fit that does not end by itself
PROBE = """
FACTOR = 2.0

def value():
    return FACTOR

class Probe(Digits):
    def on_fit_start(self):
        self.seen = value()
        self.pids = [int(pid) for pid in self.all_gather(__import__("os").getpid())]

def probe(**options):
    module = Probe()
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
    trainer = rt.Trainer(strategy="ddp_cpu", num_processes=2, **options)
    trainer.fit(module, train_loader, val_loader)
    return module, trainer

first, _ = probe()
first.seen, first.pids
"""
# a helper function and a constant are defined anew; the class, whose code uses them, is not
CHANGED = """
FACTOR = 3.0

def value():
    return FACTOR + 0.5

second, _ = probe()
second.seen, second.pids
"""
ENDLESS = """
module, trainer = probe(max_epochs=-1)
trainer.interrupted, trainer.state.status, trainer.global_step > 0
"""
AFTERWARDS = """
(metrics,) = trainer.validate(module, val_loader, verbose=False)
short = rt.Trainer(strategy="ddp_cpu", num_processes=2, max_epochs=1, logger=False, enable_checkpointing=False)
short.fit(module, train_loader)
sorted(metrics), short.interrupted, short.global_step, module.pids
"""
HANGING = """
class Hanging(Digits):
    def training_step(self, batch, batch_idx):
        print("hanging", flush=True)
        __import__("time").sleep(600)

trainer = rt.Trainer(strategy="ddp_cpu", num_processes=2, max_epochs=1, logger=False, enable_checkpointing=False)
trainer.fit(Hanging(), train_loader)
"""


class Kernel:
    """Runs the notebook's cells, and others, one after the other."""

    def __init__(self, client: NotebookClient) -> None:
        self.client = client

    async def run(self, cell: Any) -> Outputs:
        if isinstance(cell, str):
            cell = nbformat.v4.new_code_cell(cell)
            self.client.nb.cells.append(cell)
        index = self.client.nb.cells.index(cell)
        await self.client.async_execute_cell(cell, index)
        return cell.outputs  # type: ignore[no-any-return]

    async def value(self, code: str) -> Any:
        """The value of a cell's last expression."""
        return result(await self.run(code))

    async def interrupted(self, code: str, *moments: Callable[[Outputs], bool]) -> Outputs:
        """Run a cell; press "stop" at each of these moments, which its outputs tell."""
        cell = nbformat.v4.new_code_cell(code)
        self.client.nb.cells.append(cell)
        running = asyncio.create_task(self.run(cell))
        for moment in moments:
            async with asyncio.timeout(PATIENCE):
                while not moment(cell.outputs):
                    assert not running.done(), cell.outputs
                    await asyncio.sleep(0.05)
            await self.client.km.interrupt_kernel()
        async with asyncio.timeout(PATIENCE):
            return await running


def result(outputs: Outputs) -> Any:
    (found,) = [output for output in outputs if output["output_type"] == "execute_result"]
    return ast.literal_eval(found["data"]["text/plain"])


def shown(outputs: Outputs) -> list[str]:
    """The text of what was displayed."""
    return [output["data"]["text/plain"] for output in outputs if output["output_type"] == "display_data"]


def written(outputs: Outputs) -> str:
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


def batches_done(outputs: Outputs) -> bool:
    return any(int(done) > 0 for text in shown(outputs) for done in re.findall(r"^Epoch \d+  (\d+)/", text))


async def the_notebook(kernel: Kernel) -> None:
    """Every cell, unchanged: fits, validation, the class defined anew, the plot."""
    fits: list[Outputs] = []
    for cell in [cell for cell in kernel.client.nb.cells if cell.cell_type == "code"]:
        outputs = await kernel.run(cell)
        if ".fit(" in cell.source:
            fits.append(outputs)
            # the module's summary, and one display for all epochs and validations, a line an epoch; few streams
            *summary, text = shown(outputs)
            assert len(summary) <= 1 and all("parameters" in table for table in summary)
            lines = [line.split("  ")[:2] for line in text.splitlines()]
            assert lines == [[f"Epoch {epoch}/4", "23/23"] for epoch in range(5)]
            assert len(outputs) <= 9, [output["output_type"] for output in outputs]
        if ".validate(" in cell.source:
            bar, table = shown(outputs)
            assert bar.startswith("Validation  2/2  ") and "val_loss" in table
        if ".plot(" in cell.source:
            (figure,) = outputs
            assert len(figure["data"]["image/png"]) > 20_000
        if ".tolist()" in cell.source:
            predicted, digits = result(outputs)
            assert sum(one == other for one, other in zip(predicted, digits, strict=True)) >= 3
    assert len(fits) == 3
    # the workers are warm, and yet the class that was defined anew is what they trained
    assert ["val_accuracy" in shown(outputs)[-1] for outputs in fits] == [False, False, True]
    assert await kernel.value("float(trainer.callback_metrics['val_accuracy']) > 0.8")


async def changed_cells(kernel: Kernel) -> list[int]:
    value, pids = await kernel.value(PROBE)
    assert value == 2.0
    changed, same = await kernel.value(CHANGED)
    assert changed == 3.5 and same == pids
    return list(pids)


async def stopped(kernel: Kernel, pids: list[int]) -> None:
    """Once: the cell ends without an error. Twice: at once, with KeyboardInterrupt. Both leave a usable trainer."""
    outputs = await kernel.interrupted(ENDLESS, batches_done)
    assert result(outputs) == (True, "interrupted", True)
    assert "stopping after the batches" in written(outputs)
    *_, text = shown(outputs)
    assert "Epoch " in text
    assert await kernel.value(AFTERWARDS) == (["val_accuracy", "val_loss"], False, 23, pids)

    with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
        await kernel.interrupted(
            HANGING, lambda outputs: "hanging" in written(outputs), lambda outputs: "Once more" in written(outputs)
        )
    assert await kernel.value("trainer.interrupted, trainer.state.status") == (True, "interrupted")
    status, value, others = await kernel.value("third, again = probe()\nagain.state.status, third.seen, third.pids")
    assert (status, value) == ("finished", 3.5)
    assert not set(others) & set(pids)
    pids += others


async def session(folder: Path) -> list[int]:
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    client = NotebookClient(notebook, timeout=PATIENCE, resources={"metadata": {"path": str(folder)}})
    async with client.async_setup_kernel():
        kernel = Kernel(client)
        await the_notebook(kernel)
        pids = await changed_cells(kernel)
        await stopped(kernel, pids)
        assert all(map(alive, pids[2:]))
    return pids


def test_the_notebook_is_committed_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if "outputs" in cell)


def test_a_notebook_in_a_real_kernel(tmp_path: Path) -> None:
    pids = asyncio.run(session(tmp_path))
    assert len(set(pids)) == 4
    eventually(lambda: not any(map(alive, pids)), "the workers end with the kernel")
