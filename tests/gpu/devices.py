"""Checks of devices, precision and copying on real GPUs; each returns what it saw and raises if that is wrong.

DEVICE_CHECKS lists (GPUs needed, function). `check.py` may register them; or: python tests/gpu/devices.py [NAME ...]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import pynvml
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import raytrainer
from raytrainer.data import prefetch
from raytrainer.data.transfer import move

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "seed": 7,
    "default_root_dir": tempfile.gettempdir(),
}
DEVICE_CHECKS: list[tuple[int, Callable[[], str]]] = []


def needs(gpus: int) -> Callable[[Callable[[], str]], Callable[[], str]]:
    def register(function: Callable[[], str]) -> Callable[[], str]:
        DEVICE_CHECKS.append((gpus, function))
        return function

    return register


def uuids() -> list[str]:
    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    return [str(pynvml.nvmlDeviceGetUUID(h)).removeprefix("GPU-") for h in handles]


def loader(rows: int = 64, width: int = 16, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=batch_size, **options)


class Net(raytrainer.Module):
    """A regression that can be told to overflow, and remembers where it ran."""

    def __init__(
        self, width: int = 16, fused: bool = False, bursts: tuple[int, ...] = (), schedule: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 1))
        self.fused, self.bursts, self.schedule = fused, bursts, schedule
        self.uuid, self.rates, self.index = "", [], -1  # type: ignore[var-annotated]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        assert x.device == self.device
        loss = F.mse_loss(self.net(x).float(), y) / 100
        return loss * float("inf") if batch_idx in self.bursts else loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_end(self) -> None:
        if self.device.type == "cuda":
            self.uuid = str(torch.cuda.get_device_properties(self.device).uuid).removeprefix("GPU-")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2**-8, fused=self.fused)
        if not self.schedule:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(module: raytrainer.Module, data: Any = None, **options: Any) -> raytrainer.Trainer:
    trainer = raytrainer.Trainer(**{**QUIET, "strategy": "ddp", "gpus": 1, "max_epochs": 1, **options})
    trainer.fit(module, loader() if data is None else data)
    return trainer


class Rows(raytrainer.Logger):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.names |= set(metrics)

    def log_hyperparams(self, params: Any) -> None:
        pass


# ---------------------------------------------------------------- choice


@needs(2)
def each_index_is_its_card() -> str:
    seconds = []
    for index, uuid in enumerate(uuids()):
        began, module = time.perf_counter(), Net()
        fit(module, gpus=str(index) + ",").close()
        seconds.append(time.perf_counter() - began)
        assert module.uuid == uuid, (index, module.uuid, uuid)
    return f"{len(seconds)} cards by index; seconds each {[round(s, 1) for s in seconds]}"


@needs(1)
def all_of_them() -> str:
    trainer = fit(Net(), gpus=-1)
    assert trainer.world_size == len(uuids())
    return f"gpus=-1 is {trainer.world_size}, before and after Ray is there"


@needs(2)
def two_jobs_share_no_card() -> str:
    """A second driver on the same Ray holds GPU 1; this one may have 0, not 1; and any one is then not 1."""
    import ray

    module = Net()
    fit(module, gpus=[0]).close()
    address = ray.get_runtime_context().gcs_address
    code = (
        "import sys; sys.path.insert(0, 'tests/gpu'); import devices, time; m = devices.Net(); "
        f"t = devices.fit(m, gpus=[1], address='{address}'); print(m.uuid, flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline().strip() == uuids()[1]
        try:
            fit(Net(), gpus=[1], placement_timeout=3)
        except raytrainer.ResourceError as error:
            said = str(error)
        else:
            raise AssertionError("GPU 1 was had twice")
        fit(module := Net(), gpus=1).close()
        assert module.uuid != uuids()[1]
    finally:
        other.kill()
        other.wait()
    return said


@needs(2)
def auto_select_avoids_a_busy_card() -> str:
    code = "import torch, time; x = torch.zeros(2**29, device='cuda:0'); print(1, flush=True); time.sleep(120)"
    raytrainer.Trainer(logger=False).close()
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        module = Net()
        fit(module, auto_select_gpus=True).close()
        assert module.uuid != uuids()[0]
        try:
            fit(Net(), gpus=len(uuids()), auto_select_gpus=True, placement_timeout=3)
        except raytrainer.ResourceError as error:
            return str(error)
        raise AssertionError("a busy card was picked")
    finally:
        other.kill()
        other.wait()


@needs(1)
def in_the_driver() -> str:
    """In a process of its own: CUDA starts there."""
    last = len(uuids()) - 1
    code = (
        "import sys; sys.path.insert(0, 'tests/gpu'); import devices, torch; m = devices.Net(); "
        f"t = devices.fit(m, gpus=[{last}], strategy='local', log_gpu_memory='all'); assert m.device.type == 'cpu'; "
        f"assert m.uuid == devices.uuids()[{last}], m.uuid; assert len(t.peak_memory_bytes) == 1; "
        "u = m.uuid; devices.fit(m, gpus=1, strategy='local', auto_select_gpus=True); "
        "v = m.uuid; devices.fit(m, gpus=1, strategy='local', auto_select_gpus=True); assert m.uuid == v; "
        "devices.fit(m, gpus=0, strategy='local'); print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "fine" in done.stdout, done.stdout + done.stderr[-3000:]
    return 'strategy="local": chosen card, auto select twice, CPU afterwards'


# ---------------------------------------------------------------- monitors


@needs(1)
def monitors() -> str:
    rows, gpus = Rows(), min(2, len(uuids()))
    options = {"gpus": gpus, "logger": rows, "log_every_n_steps": 2}
    trainer = fit(Net(), log_gpu_memory="all", callbacks=raytrainer.DeviceStatsMonitor(cpu_stats=True), **options)
    assert {f"gpu_memory/node0-gpu{i}" for i in range(gpus)} <= rows.names, rows.names
    wanted = ("allocated_mib", "reserved_mib", "peak_allocated_mib", "utilisation_percent", "cpu_percent", "rss_mib")
    assert {f"device_stats/rank{r}/{name}" for r in range(gpus) for name in wanted} <= rows.names, rows.names
    assert len(trainer.peak_memory_bytes) == gpus and min(trainer.peak_memory_bytes) > 0
    return f"peak {trainer.peak_memory_bytes}"


# ---------------------------------------------------------------- precision


@needs(1)
def overflow_is_counted_and_schedulers_rest() -> str:
    for fused in (False, True):
        module = Net(fused=fused, bursts=(1, 3), schedule=True)
        trainer = fit(module, precision=16, gradient_clip_val=0.5)
        assert (trainer.global_step, trainer.skipped_steps) == (8, 2), (trainer.global_step, trainer.skipped_steps)
        assert [r * 2**8 for r in module.rates[:5]] == [0.5, 0.5, 0.25, 0.25, 0.125], module.rates
        assert all(p.isfinite().all() for p in module.parameters())
        module = Net(fused=fused, bursts=(1, 3))
        assert fit(module, precision=16).skipped_steps == 2
    return "2 of 8 steps left out and counted, ordinary and fused AdamW"


class Quiet(Net):
    """Fails if a step waits for the GPU."""

    def on_before_zero_grad(self, optimizer: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if self.global_step > 2 else "default")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        torch.cuda.set_sync_debug_mode("default")


@needs(1)
def steps_do_not_wait() -> str:
    fit(Quiet(fused=True), precision="16-mixed")
    fit(Quiet(), precision="bf16-mixed")
    fit(Quiet(fused=True), precision="16-mixed", gradient_clip_val=1.0)
    return "no synchronisation in a step: 16-mixed with fused AdamW (also clipped), bf16-mixed"


class OwnStep(Net):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)


class Manual(Net):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 0.5)
        optimizer.step()


@needs(1)
def own_steps_are_scaled_too() -> str:
    modules = [Net(bursts=(3,)), OwnStep(bursts=(3,)), Manual(bursts=(3,))]
    for module in modules:
        clip = {} if isinstance(module, Manual) else {"gradient_clip_val": 0.5}
        trainer = fit(module, precision=16, deterministic=True, **clip)
        assert trainer.skipped_steps == 1, type(module).__name__
    for module in modules[1:]:
        for a, b in zip(modules[0].parameters(), module.parameters(), strict=True):
            assert torch.equal(a, b), type(module).__name__
    return "automatic, own optimizer_step and manual: the same weights"


# ---------------------------------------------------------------- copying


class Copying(raytrainer.Module):
    """Large batches, and a step that computes about as long as they take to copy. Notes checksums and its time."""

    def __init__(self, aside: bool) -> None:
        super().__init__()
        self.aside, self.sums, self.seconds, self.peak = aside, [], 0.0, 0  # type: ignore[var-annotated]
        torch.manual_seed(0)
        self.layer = nn.Linear(2048, 2048)

    def setup(self, stage: str) -> None:
        # without the stream of its own: what every loop does
        prefetch.LEAST = 64 * 1024 if self.aside else 2**60

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            torch.cuda.synchronize()
            self._began = time.perf_counter()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].view(-1, 2048)
        self.sums.append(x.double().sum())
        for _ in range(20):
            x = self.layer(x)
        return x.square().mean()

    def on_train_end(self) -> None:
        torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._began
        self.sums = [s.item() for s in self.sums]
        self.peak = torch.cuda.max_memory_allocated()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@needs(1)
def copying_aside() -> str:
    """64 MiB batches: right in every byte, and no slower; the figures say how much faster."""
    kept = [torch.randn(8192, 2048, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    said = []
    for pinned in (False, True):
        batches = [[t] for t in kept]
        found = {}
        for aside in (False, True):
            module = Copying(aside)
            data = _Batches(batches, 45, pinned)
            fit(module, data)
            found[aside] = module
        assert found[True].sums == found[False].sums
        a, b = (found[k].seconds / 40 * 1e3 for k in (False, True))
        said.append(f"{'pinned' if pinned else 'pageable'} {a:.1f} -> {b:.1f} ms a step, "
                    f"peak {found[False].peak >> 20} -> {found[True].peak >> 20} MiB")  # fmt: skip
        assert b < a * 1.03, said
    return "; ".join(said)


class _Batches:
    """The same few batches again and again; pinned in the worker."""

    def __init__(self, batches: list[list[Tensor]], count: int, pinned: bool) -> None:
        self.batches, self.count, self.pinned = batches, count, pinned

    def __iter__(self) -> Any:
        kept = [[t.pin_memory() for t in b] for b in self.batches] if self.pinned else self.batches
        return (kept[i % len(kept)] for i in range(self.count))


@needs(1)
def nested_batches_arrive_whole() -> str:
    """Every kind of batch, copied aside while the GPU is busy, is what was sent."""
    device = torch.device("cuda", 0)
    code = "import sys; sys.path.insert(0, 'tests/gpu'); import devices; devices._compare()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "fine" in done.stdout, done.stdout + done.stderr[-3000:]
    return f"200 batches of changing sizes on {device}, freed and allocated again under load"


def _compare() -> None:
    device = torch.device("cuda", 0)
    copy, load = prefetch.CopyStream(device), torch.randn(4096, 4096, device=device)
    sums, expected = [], []
    for i in range(200):
        x = torch.full((1 + i * 37 % 1000, 1000), float(i))
        moved = copy({"a": [x, "text"], "b": (x + 1,)}, device, 0)
        for _ in range(5):
            load = load @ load * 1e-4
        sums.append(moved["a"][0].sum(dtype=torch.float64) + moved["b"][0].sum(dtype=torch.float64))
        expected.append(x.double().sum().item() * 2 + x.numel())
        del moved
    assert torch.stack(sums).tolist() == expected
    assert move([torch.ones(2)], device)[0].device == device
    print("fine")


if __name__ == "__main__":
    failed = 0
    for gpus, function in DEVICE_CHECKS:
        if sys.argv[1:] and function.__name__ not in sys.argv[1:]:
            continue
        if gpus > len(uuids()):
            print(f"skipped  {function.__name__}: needs {gpus} GPUs")
            continue
        try:
            print(f"passed   {function.__name__}: {function()}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED   {function.__name__}:\n{traceback.format_exc()}", flush=True)
    sys.exit(bool(failed))
