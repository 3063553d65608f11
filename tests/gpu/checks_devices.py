"""Which GPU a worker gets, what is on it, and what is told of it."""

from __future__ import annotations

import json
import time
from typing import Any

import torch
import torchmetrics
from harness import Net, Rows, another_process, check, fit, in_a_process, used_mib, uuids
from torch import Tensor
from workloads import WORKLOADS

import raytrainer


@check(2)
def each_index_is_its_card() -> str:
    raytrainer.Trainer(logger=False).close()
    grown = []
    for index, uuid in enumerate(uuids()):
        before, module = used_mib(), Net()
        trainer = fit(module, gpus=[index])
        assert module.uuid == uuid, (index, module.uuid, uuid)
        grown.append([i for i, (a, b) in enumerate(zip(before, used_mib(), strict=True)) if b > a + 100])
        trainer.close()
    assert all(set(found) <= {index} for index, found in enumerate(grown)), f"memory grew on {grown}"
    assert not torch.cuda.is_initialized()
    return f"gpus=[i] is PCI index i; memory grew on {grown} only; no CUDA in the driver"


@check(1, workers="all")
def all_of_them() -> str:
    trainer = fit(Net(), gpus=-1)
    assert trainer.world_size == len(uuids())
    assert not torch.cuda.is_initialized()
    return f"gpus=-1 is {trainer.world_size}; no CUDA in the driver"


@check(1)
def impossible_requests() -> str:
    said = []
    for gpus in ([0, 99], 99):
        try:
            fit(Net(), gpus=gpus, placement_timeout=5)
        except raytrainer.RaytrainerError as error:
            said.append(str(error).splitlines()[0])
        else:
            raise AssertionError(f"gpus={gpus} was accepted")
    return "; ".join(said)


@check(2)
def two_jobs_share_no_card() -> str:
    """A second driver on the same Ray holds GPU 1; this one may have 0, not 1; and any one is then not 1."""
    import ray

    fit(Net(), gpus=[0]).close()
    address = ray.get_runtime_context().gcs_address
    code = f"""
import harness, time
module = harness.Net()
trainer = harness.fit(module, gpus=[1], address={address!r})
print(module.uuid, flush=True)
time.sleep(60)"""
    with another_process(code) as theirs:
        assert theirs == uuids()[1]
        try:
            fit(Net(), gpus=[1], placement_timeout=3)
        except raytrainer.ResourceError as error:
            said = str(error)
        else:
            raise AssertionError("GPU 1 was had twice")
        fit(module := Net(), gpus=1).close()
        assert module.uuid != theirs
    return said


@check(2)
def auto_select_avoids_a_busy_card() -> str:
    raytrainer.Trainer(logger=False).close()
    busy = "import torch, time; x = torch.zeros(2**29, device='cuda:0'); print(1, flush=True); time.sleep(120)"
    with another_process(busy):
        module = Net()
        fit(module, auto_select_gpus=True).close()
        assert module.uuid != uuids()[0]
        try:
            fit(Net(), gpus=len(uuids()), auto_select_gpus=True, placement_timeout=3)
        except raytrainer.ResourceError as error:
            return str(error)
        raise AssertionError("a busy card was picked")


@check(1)
def in_the_drivers_process() -> str:
    """In a process of its own: CUDA starts there."""
    raytrainer.Trainer(logger=False).close()  # auto select wants a card without others
    last = len(uuids()) - 1
    in_a_process(f"""
import harness, torch
m = harness.Net()
t = harness.fit(m, gpus=[{last}], strategy='local', log_gpu_memory='all')
assert torch.cuda.is_initialized() and m.device.type == 'cpu'
assert sum(m.losses[:4]) > sum(m.losses[-4:]), m.losses
assert m.uuid == harness.uuids()[{last}] and len(t.peak_memory_bytes) == 1
harness.fit(m, gpus=1, strategy='local', auto_select_gpus=True)
first = m.uuid
harness.fit(m, gpus=1, strategy='local', auto_select_gpus=True)
assert m.uuid == first
harness.fit(m, gpus=0, strategy='local')""")
    return 'strategy="local": the chosen card, auto select twice, and the CPU afterwards'


class Large(Net):
    """With its gradients and its optimizer's state it takes 4 GiB."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(2**28))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + self.table.mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


@check(1, workers="one")
def idle_workers_hold_no_memory() -> str:
    fit(Net())
    before, peaks = sum(used_mib()), []
    for _ in range(2):
        peaks.append(fit(Large(), max_epochs=1).peak_memory_bytes[0])
        deadline = time.monotonic() + 10
        while (left := sum(used_mib()) - before) > 500:
            assert time.monotonic() < deadline, f"{left} MiB are still in use"
            time.sleep(0.1)
    assert max(peaks) < 1.01 * min(peaks), peaks
    in_a_process("""
import harness, torch
from checks_devices import Large
peak = harness.fit(Large(), max_epochs=1, strategy='local').peak_memory_bytes[0]
assert peak > 2**32 and torch.cuda.memory_reserved() < 2**28, (peak, torch.cuda.memory_reserved())""")
    again = peaks[1] / peaks[0]
    return f"of {peaks[1] >> 20} MiB, {left} are in use afterwards; a second run's peak is {again:.3f} of the first's"


class Placed(Net):
    """Asserts that everything is where it should be, without a single .to()."""

    def __init__(self) -> None:
        super().__init__()
        self.error = torchmetrics.MeanSquaredError()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        assert self.device.type == "cuda"
        assert self.scale.device == self.calls.device == self.error.sum_squared_error.device == self.device

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch["nested"][0]["x"], batch["y"]
        assert x.device == self.device
        made = torch.zeros(2, device=self.device)
        assert made.type_as(y).device == self.device
        assert torch.ones(1).cuda().device == self.device  # a stray .cuda() ends up here too
        self.error(self.layers(x).detach(), y)
        self.log("error", self.error, on_epoch=True)
        return super().training_step((x, y), batch_idx)


@check(1, workers="all")
def everything_is_on_the_device() -> str:
    gpus = min(2, len(uuids()))
    batches = [{"nested": [{"x": torch.randn(8, 16)}], "y": torch.randn(8, 1)} for _ in range(4)]
    trainer = fit(Placed(), batches, gpus=gpus)
    assert trainer.callback_metrics["error_epoch"] > 0
    return "parameters, buffers, a torchmetrics object, nested batches, self.device, type_as, stray .cuda()"


@check(1, workers="all")
def memory_is_logged() -> str:
    gpus, rows = min(2, len(uuids())), Rows()
    options = {"gpus": gpus, "logger": rows, "log_every_n_steps": 2}
    trainer = fit(Net(), log_gpu_memory="all", callbacks=raytrainer.DeviceStatsMonitor(cpu_stats=True), **options)
    assert {f"gpu_memory/node0-gpu{i}" for i in range(gpus)} <= rows.names, rows.names
    wanted = ("allocated_mib", "reserved_mib", "peak_allocated_mib", "utilisation_percent", "cpu_percent", "rss_mib")
    assert {f"device_stats/rank{r}/{name}" for r in range(gpus) for name in wanted} <= rows.names, rows.names
    assert len(trainer.peak_memory_bytes) == gpus and min(trainer.peak_memory_bytes) > 0
    rows.rows.clear()
    fit(Net(), log_gpu_memory="min_max", **options)
    both = [(row["gpu_memory/min"], row["gpu_memory/max"]) for row in rows.rows if "gpu_memory/min" in row]
    assert both and all(0 < low <= high for low, high in both), rows.rows
    return f"a series a GPU; least and greatest {both[-1]} MiB; peaks {trainer.peak_memory_bytes} bytes"


class Gpt(raytrainer.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = WORKLOADS["gpt"].model()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(batch[0])
        return loss

    def configure_optimizers(self) -> Any:
        return WORKLOADS["gpt"].optimizer(self.model.parameters())


@check(1, workers="one")
def throughput_and_mfu() -> str:
    rows = Rows()
    monitor = raytrainer.ThroughputMonitor(tokens=lambda batch: batch[0].numel(), flops_per_batch="measure")
    fit(
        Gpt(), WORKLOADS["gpt"].loader(1), precision="bf16-mixed", max_steps=30, max_epochs=None, logger=rows,
        log_every_n_steps=10, callbacks=monitor,
    )  # fmt: skip
    mfu = [row["throughput/mfu/mean"] for row in rows.rows if "throughput/mfu/mean" in row][-1]
    tokens = [row["throughput/tokens_per_second/sum"] for row in rows.rows if "throughput/mfu/mean" in row][-1]
    # 6 FLOPs a parameter and token, and attention's share on top
    by_hand = tokens * 6 * 124e6 / 989.4e12
    assert 0.9 < mfu / by_hand < 1.6, (mfu, by_hand)
    return f"GPT, eager, one card: {tokens:,.0f} tokens/s, MFU {mfu:.3f}"


@check(1, workers="one")
def profiler_sees_kernels() -> str:
    trainer = fit(Net(), profiler="pytorch")
    with open(trainer.profiler.files[0]) as file:
        events = json.load(file)["traceEvents"]
    kernels = {event["name"] for event in events if event.get("cat") == "kernel"}
    spans = {event["name"] for event in events if str(event.get("name", "")).startswith("raytrainer/")}
    assert kernels and "raytrainer/training_step" in spans, (len(kernels), spans)
    return f"{len(kernels)} kernels and {len(spans)} spans in the trace"
