"""Copying batches to the device: right in every byte, and beside the computing."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from harness import check, fit, in_a_process, is_mapped, uuids
from torch import Tensor, nn

import raytrainer
from raytrainer.data import prefetch
from raytrainer.gpu import pinned
from raytrainer.worker import way_home
from raytrainer.worker.staging import Staging, arrived

ROWS, WIDTH = 8192, 2048


class Copying(raytrainer.Module):
    """Large batches, and a step that computes about as long as they take to copy. Notes checksums and its time."""

    def __init__(self, aside: bool = True) -> None:
        super().__init__()
        self.aside, self.seconds, self.peak = aside, 0.0, 0
        self.sums: list[Any] = []
        self.pinned: list[bool] = []
        torch.manual_seed(0)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def setup(self, stage: str) -> None:
        # without the stream of its own: what every loop does
        prefetch.LEAST = 64 * 1024 if self.aside else 2**60

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.pinned.append((batch["x"] if isinstance(batch, dict) else batch[0]).is_pinned())
        return batch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            torch.cuda.synchronize()
            self._began = time.perf_counter()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch["x"] if isinstance(batch, dict) else batch[0]
        assert x.device == self.device
        self.sums.append(x.double().sum())
        for _ in range(20):
            x = self.layer(x)
        return x.square().mean()

    def on_train_end(self) -> None:
        torch.cuda.synchronize()
        self.seconds = (time.perf_counter() - self._began) / (len(self.sums) - 5)
        self.sums = [s.item() for s in self.sums]
        self.peak = torch.cuda.max_memory_allocated()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Batches:
    """The same few batches again and again; pinned in the worker."""

    def __init__(self, batches: list[list[Tensor]], count: int, pinned: bool) -> None:
        self.batches, self.count, self.pinned = batches, count, pinned

    def __iter__(self) -> Any:
        kept = [[t.pin_memory() for t in b] for b in self.batches] if self.pinned else self.batches
        return (kept[i % len(kept)] for i in range(self.count))


@check(1, workers="one")
def copying_beside_computing() -> str:
    """64 MiB batches: no slower than on the computing stream; the figures say how much faster."""
    kept = [[torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(i))] for i in range(4)]
    said = []
    for from_pinned in (False, True):
        found = {}
        for aside in (False, True):
            module = Copying(aside)
            fit(module, Batches(kept, 45, from_pinned), max_epochs=1)
            found[aside] = module
        assert found[True].sums == found[False].sums
        a, b = (found[aside].seconds * 1e3 for aside in (False, True))
        said.append(f"{'pinned' if from_pinned else 'pageable'} {a:.1f} -> {b:.1f} ms a step, "
                    f"peak {found[False].peak >> 20} -> {found[True].peak >> 20} MiB")  # fmt: skip
        assert b < a * 1.05, said
    return "; ".join(said)


@check(1, workers="both")
def ray_datasets_arrive_pinned() -> str:
    """Every row once over all GPUs, in order on one; from pinned memory."""
    import ray.data

    gpus, rows = len(uuids()), 20 * 1024
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0))
    source = ray.data.from_numpy(x.numpy()).rename_columns({"data": "x"})
    said = []
    for keep in (True, False):
        module = Copying()
        dataset = raytrainer.RayDataset(source, batch_size=1024, keep_in_memory=keep)
        fit(module, dataset, gpus=1, max_epochs=1)
        expected = [part.double().sum().item() for part in x.split(1024)]
        assert all(abs(a - b) < 1e-6 * rows for a, b in zip(module.sums, expected, strict=True))
        assert all(module.pinned), module.pinned
        said.append(f"{'kept' if keep else 'streamed'} {module.seconds * 1e3:.1f} ms a step of 8 MiB")
    module = Copying()
    counted = fit(module, raytrainer.RayDataset(source, batch_size=512), gpus=gpus, max_epochs=1)
    assert counted.global_step == rows // 512 // gpus
    return "; ".join(said)


@check(1)
def nested_batches_arrive_whole() -> str:
    """Every kind of batch, copied aside while the GPU is busy, is what was sent; also where it is kept for later."""
    in_a_process("import checks_data; checks_data.compare()")
    return "200 batches of changing sizes, freed and allocated again under load, some of them kept meanwhile"


def compare() -> None:
    device = torch.device("cuda", 0)
    copy, load = prefetch.CopyStream(device), torch.randn(4096, 4096, device=device)
    sums, expected, kept = [], [], []
    for i in range(200):
        x = torch.full((1 + i * 37 % 1000, 1000), float(i))
        moved = copy({"a": [x, "text"], "b": (x + 1,)}, device, 0)
        for _ in range(5):
            load = load @ load * 1e-4
        sums.append(moved["a"][0].sum(dtype=torch.float64) + moved["b"][0].sum(dtype=torch.float64))
        expected.append(x.double().sum().item() * 2 + x.numel())
        if i % 3 == 0:
            kept.append((moved["a"][0][1:], x[1:].double().sum().item()))
        if len(kept) > 4:
            part, total = kept.pop(0)
            sums.append(part.sum(dtype=torch.float64))
            expected.append(total)
            del part
        del moved
    assert torch.stack(sums).tolist() == expected


@check(1)
def copies_of_states_are_whole() -> str:
    """As they were before training went on, pinned, in memory that CUDA forgets in time; with room there or not."""
    return in_a_process("import checks_data; checks_data.stage()").strip()


def stage() -> None:
    device, known, forgotten = torch.device("cuda", 0), set(), []
    register, unregister = pinned.register, pinned.unregister

    def count(address: int, size: int, device: torch.device) -> bool:
        known.add(address)
        return register(address, size, device)

    def forget(address: int, device: torch.device) -> bool:
        known.remove(address)
        done = is_mapped(address) and unregister(address, device)
        forgotten.append(done)
        return done

    pinned.register, pinned.unregister = count, forget
    state: dict[str, Any] = {f"rows{n}": torch.randn(n, 1000, device=device) for n in (1, 7, 9000, 40000)}
    state |= {"half": [torch.randn(1000, device=device).bfloat16()], "flags": torch.rand(77, device=device) > 0.5}
    state["strided"] = torch.randn(8, 64, 32, 32, device=device).to(memory_format=torch.channels_last)
    staging, load = Staging(device), torch.randn(4096, 4096, device=device)

    def copy(asks: bool = True) -> tuple[Any, float]:
        before = {name: [here.clone() for here in value] for name, value in state.items()}
        for _ in range(5):
            load.copy_(load @ load * 1e-4)  # the GPU is busy when the copy is asked for
        begun = time.perf_counter()
        copied = staging.copy(state)
        waited = time.perf_counter() - begun
        for value in state.values():
            for here in value:
                here.copy_(~here if here.dtype is torch.bool else here + 1)
        if asks:
            arrived(copied)
            for name, value in before.items():
                for there, here in zip(copied[name], value, strict=True):
                    assert torch.equal(there, here.cpu()) and there.is_pinned(), name
        return copied, waited

    def turns() -> None:
        for asks in (True, False) * 10:  # also copies that nobody asks for, whose memory the next one takes
            copied, _ = copy(asks)
            del copied

    staging.reserve(state)
    (first, reserved), (second, alone) = copy(), copy()  # the second, since the first is held, takes its memory itself
    place = first["rows40000"].data_ptr()
    del first
    third, again = copy()
    assert third["rows40000"].data_ptr() == place and known
    del second, third
    turns()
    way_home.PARTS = 2**60
    turns()
    staging._free.clear()
    staging._returned.clear()
    gc.collect()
    assert not known and all(forgotten)
    print(f"198 MB: {reserved:.2f} s right after a thread was asked, {alone:.2f} s without, {again:.3f} s again")
