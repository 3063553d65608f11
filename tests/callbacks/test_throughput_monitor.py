from __future__ import annotations

import pickle

import pytest
import torch
from tiny import Clock, Tiny, data

from raytrainer import ConfigurationError, Logger, ThroughputMonitor
from raytrainer.callbacks import throughput_monitor
from raytrainer.gpu.peak import peak_flops
from raytrainer.metric_messages import MetricReport, StepRow
from raytrainer.metrics.metric_board import MetricBoard


class Rows(Logger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append({n.removeprefix("throughput/"): v for n, v in metrics.items() if n.startswith("throughput/")})

    def log_hyperparams(self, params):
        pass


@pytest.fixture
def clock(monkeypatch):
    clock = Clock(50.0)
    monkeypatch.setattr(throughput_monitor, "time", clock)
    return clock


class Ticking(Tiny):
    """Half a second a batch; a validation of any length."""

    def __init__(self, clock):
        super().__init__()
        self.__dict__["clock"] = clock

    def training_step(self, batch, batch_idx):
        self.clock.now += 100.0 if self.global_step == 0 else 0.5
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.clock.now += 1000.0


def rows_of(clock, local_trainer, **arguments):
    rows = Rows()
    trainer = local_trainer(
        max_epochs=1, log_every_n_steps=4, val_check_interval=3, logger=rows, callbacks=ThroughputMonitor(**arguments)
    )
    trainer.fit(Ticking(clock), data(36, batch_size=3), data(4))
    return [row for row in rows.rows if row]


def test_rates(clock, local_trainer):
    rows = rows_of(clock, local_trainer, tokens=lambda batch: 7 * len(batch[0]), flops_per_batch=30, peak_flops=240)
    expected = {"samples_per_second/sum": 6, "batches_per_second/sum": 2, "tokens_per_second/sum": 42}
    assert rows == [pytest.approx({**expected, "flops_per_second/sum": 60, "mfu/mean": 0.25})] * 3


def test_functions_of_the_batch(clock, local_trainer):
    rows = rows_of(clock, local_trainer, samples=lambda batch: 1, flops_per_batch=lambda batch: len(batch[0]))
    assert rows[0] == pytest.approx(
        {"samples_per_second/sum": 2, "batches_per_second/sum": 2, "flops_per_second/sum": 6}
    )


def test_measured_operations(clock, local_trainer):
    """Forward 2 * 3 * 4 * 2; backward as much for the weights, none for the input."""
    rows = rows_of(clock, local_trainer, flops_per_batch="measure", peak_flops=1000)
    assert rows[0]["flops_per_second/sum"] == pytest.approx(2 * 2 * (2 * 3 * 4 * 2))


def test_a_first_batch_that_fails_leaves_no_counter(local_trainer):
    class Fails(Tiny):
        def training_step(self, batch, batch_idx):
            raise ArithmeticError

    monitor = ThroughputMonitor(flops_per_batch="measure")
    with pytest.raises(ArithmeticError):
        local_trainer(max_epochs=1, callbacks=monitor).fit(Fails(), data())
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    pickle.loads(pickle.dumps(monitor))


def test_workers_come_together():
    names = {"throughput/samples_per_second/sum": 3.0, "throughput/mfu/mean": 0.25}
    reports = [MetricReport(samples=[StepRow(9, 0, {n: (r + 1) * v for n, v in names.items()})]) for r in range(2)]
    assert MetricBoard().step_values(reports) == [
        (9, 0, {"throughput/samples_per_second/sum": 9.0, "throughput/mfu/mean": 0.375})
    ]


def test_peaks():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16-mixed") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "16-true") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", "32-true", "high") == 156e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", "32-true") == 19.5e12
    assert peak_flops("Tesla T4", "32-true", "high") == 8.1e12
    assert peak_flops("NVIDIA L4", "bf16-mixed") == 121e12 and peak_flops("NVIDIA L40S", "bf16-mixed") == 362e12
    assert peak_flops("NVIDIA L4", "float8") == 242e12 and peak_flops("NVIDIA A100-SXM4-40GB", "float8") is None
    assert peak_flops("NVIDIA A100", "64-true") is None and peak_flops("GeForce", "32-true") is None


@pytest.mark.parametrize("arguments", [{"samples": 3}, {"flops_per_batch": "guess"}, {"peak_flops": 0}])
def test_bad_arguments(arguments):
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        ThroughputMonitor(**arguments)


class OwnCompiled(Tiny):
    def __init__(self, whole):
        super().__init__()
        for name, layer in list(self.named_children()):
            if whole:
                setattr(self, name, torch.compile(layer, backend="eager"))
            else:
                layer.compile(backend="eager")


@pytest.mark.parametrize(
    ("make", "options"),
    [(Tiny, {"compile": True}), (lambda: OwnCompiled(False), {}), (lambda: OwnCompiled(True), {})],
    ids=["by the trainer", "by compile()", "by torch.compile"],
)
def test_measuring_compiled_code(make, options, local_trainer):
    trainer = local_trainer(callbacks=ThroughputMonitor(flops_per_batch="measure"), **options)
    with pytest.raises(ConfigurationError, match=r"compiled: .*give the number"):
        trainer.fit(make(), data())


@pytest.mark.parametrize(
    ("device", "bf16", "half", "single"),
    [("NVIDIA RTX A1000", None, None, None), ("NVIDIA RTX A4000", None, None, None), ("NVIDIA T400", None, None, None),
     ("NVIDIA A10G", 70, 70, 31.5), ("NVIDIA A10", 125, 125, 31.2), ("NVIDIA A40", 149.7, 149.7, 37.4),
     ("NVIDIA L4", 121, 121, 30.3), ("NVIDIA L40S", 362, 362, 91.6), ("Tesla V100-SXM2-16GB", None, 125, 15.7),
     ("Tesla T4", None, 65, 8.1), ("NVIDIA H100 NVL", 835.5, 835.5, 60), ("NVIDIA B200", 2250, 2250, 75),
     ("NVIDIA GH200 480GB", 989.4, 989.4, 66.9), ("NVIDIA GB200", 2500, 2500, 80)],
)  # fmt: skip
def test_peaks_by_whole_words(device, bf16, half, single):
    found = [peak_flops(device, precision) for precision in ("bf16-mixed", "16-mixed", "32-true")]
    assert found == [None if value is None else value * 1e12 for value in (bf16, half, single)]
