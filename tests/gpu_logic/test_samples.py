"""Values that each worker measures of itself, on their way to the loggers."""

from __future__ import annotations

import pickle

import pytest
import torch
from fakes import FakePynvml
from tiny import Tiny, data

import raytrainer
from raytrainer import DeviceStatsMonitor, Logger
from raytrainer.callbacks import device_stats_monitor
from raytrainer.gpu.nvml import Nvml
from raytrainer.metric_messages import MetricReport, MetricSpec, StepRow
from raytrainer.metrics.metric_board import MetricBoard


class Rows(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params):
        pass


LOSS = MetricSpec("loss", True, False, False, True, False, "mean", False, None, False)


def report(rank: int, steps=(9, 19), **names: str) -> MetricReport:
    rows = [StepRow(s, 0, {"loss": 1.0}) for s in steps if rank == 0 and s != 19]
    return MetricReport(
        rows=rows,
        specs={"loss": LOSS},
        samples=[StepRow(s, 0, {n: 10.0 * rank + s for n in names.values()}) for s in steps],
    )


def test_series_of_all_workers_stand_side_by_side():
    board = MetricBoard()
    rows = board.step_values([report(r, name=f"gpu_memory/node0-gpu{r}") for r in range(2)])
    assert rows == [
        (9, 0, {"loss": 1.0, "gpu_memory/node0-gpu0": 9.0, "gpu_memory/node0-gpu1": 19.0}),
        (19, 0, {"gpu_memory/node0-gpu0": 19.0, "gpu_memory/node0-gpu1": 29.0}),
    ]
    assert board.logged["gpu_memory/node0-gpu1"] == 29.0


def test_minimum_and_maximum():
    rows = MetricBoard().step_values([report(r, a="gpu_memory/min", b="gpu_memory/max") for r in range(3)])
    assert rows[0][2] == {"loss": 1.0, "gpu_memory/min": 9.0, "gpu_memory/max": 29.0}


def test_sampled_on_logging_steps_only(local_trainer):
    class Sampling(Tiny):
        def on_train_start(self):
            self.asked = 0
            self.trainer.samplers.append(self.sample)

        def sample(self):
            self.asked += 1
            return {"own/value": float(self.asked)}

    module, rows = Sampling(), Rows()
    local_trainer(max_epochs=2, log_every_n_steps=4, logger=rows).fit(module, data())
    assert module.asked == 5
    assert [(step, row["own/value"]) for step, row in rows.rows if "own/value" in row] == [
        (3, 1.0), (7, 2.0), (11, 3.0), (15, 4.0), (19, 5.0)]  # fmt: skip


def test_device_stats_of_a_cpu_worker(local_trainer):
    rows, monitor = Rows(), DeviceStatsMonitor()
    local_trainer(max_epochs=1, log_every_n_steps=5, logger=rows, callbacks=monitor).fit(Tiny(), data())
    found = [row for _, row in rows.rows if "device_stats/rank0/rss_mib" in row]
    assert len(found) == 2 and found[0]["device_stats/rank0/rss_mib"] > 10
    assert found[1]["device_stats/rank0/cpu_percent"] >= 0
    pickle.loads(pickle.dumps(monitor))  # may go to Ray workers afterwards


def test_device_stats_can_be_off(local_trainer):
    rows = Rows()
    local_trainer(max_epochs=1, log_every_n_steps=5, logger=rows, callbacks=DeviceStatsMonitor(False)).fit(
        Tiny(), data()
    )
    assert not any("device_stats" in name for _, row in rows.rows for name in row)
    with pytest.raises(raytrainer.ConfigurationError, match="cpu_stats='yes'"):
        DeviceStatsMonitor("yes")  # type: ignore[arg-type]


def test_device_stats_of_a_gpu_worker(monkeypatch):
    monitor = DeviceStatsMonitor()
    monitor._device, monitor._index, monitor._prefix = torch.device("cuda"), 0, "device_stats/rank3"
    stats = {"allocated_bytes.all.current": 2**20, "reserved_bytes.all.current": 2**21,
             "allocated_bytes.all.peak": 3 * 2**20, "num_alloc_retries": 1}  # fmt: skip
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monkeypatch.setattr(device_stats_monitor, "open_nvml", lambda: Nvml(FakePynvml(("1", 0, 0))))
    assert monitor._sample() == {
        "device_stats/rank3/allocated_mib": 1.0, "device_stats/rank3/reserved_mib": 2.0,
        "device_stats/rank3/peak_allocated_mib": 3.0, "device_stats/rank3/alloc_retries": 1.0,
        "device_stats/rank3/utilisation_percent": 37.0}  # fmt: skip


def test_log_gpu_memory_without_a_gpu_says_so(local_trainer, caplog, monkeypatch):
    monkeypatch.setattr(raytrainer.logging.getLogger("raytrainer"), "propagate", True)
    trainer = local_trainer(max_epochs=1, log_gpu_memory="all")
    trainer.fit(Tiny(), data())
    assert "log_gpu_memory='all'" in caplog.text
    assert trainer.peak_memory_bytes == []
