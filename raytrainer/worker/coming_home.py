"""What a worker's run gives the driver when it is over."""

from __future__ import annotations

import torch

from raytrainer.messages import FinishReport
from raytrainer.worker.plain_attributes import buffers_apart, plain_attributes
from raytrainer.worker.worker_run import WorkerRun

__all__ = ["finished"]


def finished(run: WorkerRun, travels: bool) -> FinishReport:
    """Tear a run down; what comes home of it. If the module `travels`, rank 0 brings the results along."""
    module, strategy = run.module, run.strategy
    report = FinishReport(profile=run.finish(), state_dict=strategy.home_state(module) if travels else None)
    if travels and strategy.ranks.rank == 0:
        report.hparams, report.attributes = dict(module.hparams), plain_attributes(module)
        report.kept_buffers, report.buffers = buffers_apart(module, report.state_dict or {})
        if run.datamodule is not None:
            report.datamodule_state = run.datamodule.state_dict()
    if strategy.device.type == "cuda":
        report.peak_memory_bytes = torch.cuda.max_memory_allocated(strategy.device)
    report.calls = run.recorder.take()
    return report
