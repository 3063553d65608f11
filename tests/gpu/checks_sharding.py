"""Modules in shards (FSDP2 over NCCL): beside one GPU, after a killed worker, compiled, and what they take."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import torch
from checks_failures import Victim
from harness import Net, Rows, check, data, distance, fit, uuids
from shared_memory import segment_names, shared_bytes

import raytrainer
from raytrainer.gpu.shared_buffer import SharedBuffer


@check(2, workers="both")
def fsdp_equals_one_process() -> str:
    k, worst = len(uuids()), 0.0
    for options in ({}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}, {"max_epochs": 2}):
        one, many = Net(), Net()
        fit(one, data(64 * k, 8 * k), **options)
        fit(many, data(64 * k, 8), gpus=k, strategy="fsdp", **options)
        worst = max(worst, distance(one, many))
    assert worst < 1e-5, worst
    return f"{k} GPUs against one, also accumulating and clipping: weights differ by {worst:.1e} at most"


@check(2, workers="both")
def fsdp_precisions() -> str:
    k, said = len(uuids()), []
    for options in (
        {"precision": "bf16-mixed"},
        {"precision": "16-mixed"},
        {"precision": "bf16-mixed", "compile": True},
    ):
        ours, theirs = Rows(), Rows()
        fit(Net(), data(64 * k), gpus=k, strategy="fsdp", logger=ours, log_every_n_steps=1, **options)
        fit(Net(), data(64 * k), gpus=k, strategy="ddp", logger=theirs, log_every_n_steps=1, **options)
        pairs = [(a["loss"], b["loss"]) for a, b in zip(ours.rows, theirs.rows, strict=True) if "loss" in a]
        worst = max(abs(a - b) for a, b in pairs)
        assert len(pairs) == 16 and worst < 2e-2, (options, pairs)
        said.append(f"{', '.join(f'{k}={v}' for k, v in options.items())}: {worst:.1e}")
    return f"losses beside ddp's differ by at most {'; '.join(said)}"


@check(2, workers="all")
def fsdp_lost_workers_and_resumed_runs() -> str:
    gpus, folder = len(uuids()), tempfile.mkdtemp()
    options: dict[str, Any] = {"gpus": gpus, "strategy": "fsdp", "deterministic": True, "max_epochs": 3}
    calm = Victim()
    fit(calm, data(64 * gpus), **options)
    struck = Victim("kill", f"{folder}/flag")
    (recovery,) = fit(struck, data(64 * gpus), snapshot_every=5, **options).recoveries
    assert distance(calm, struck) == 0.0, distance(calm, struck)
    saver = raytrainer.ModelCheckpoint(folder, save_last=True, every_n_train_steps=5)
    fit(Victim(), data(64 * gpus), callbacks=saver, **{**options, "max_epochs": None, "max_steps": 13})
    resumed, elsewhere = Victim(), Victim()
    fit(resumed, data(64 * gpus), ckpt_path=f"{folder}/last.ckpt", **options)
    assert distance(calm, resumed) == 0.0, distance(calm, resumed)
    fit(elsewhere, data(64 * gpus), ckpt_path=f"{folder}/last.ckpt", **{**options, "strategy": "ddp"})
    assert distance(calm, elsewhere) < 1e-5, distance(calm, elsewhere)
    assert Path(folder, "last.ckpt").is_dir()
    off = distance(calm, elsewhere)
    return f"killed: {recovery.seconds:.1f} s, bit-equal; resumed: bit-equal, and as ddp to {off:.1e}"


class Wide(Net):
    """A gigabyte of parameters, in blocks; notes what its worker holds after the last step."""

    def __init__(self) -> None:
        super().__init__(fused=True)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(4096, 4096, bias=False) for _ in range(16))
        self.held = 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        wide = torch.nn.functional.pad(x, (0, 4096 - x.size(1)))
        for block in self.blocks:
            wide = wide + block(wide) * 1e-3
        return torch.nn.functional.mse_loss(self.layers(wide[:, :16]), y)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.held = torch.cuda.memory_allocated()


@check(2, workers="all")
def fsdp_takes_a_share() -> str:
    k, held = len(uuids()), {}
    for strategy in ("ddp", "fsdp"):
        module = Wide()
        fit(module, data(16 * k), gpus=k, strategy=strategy, max_epochs=1)
        held[strategy] = module.held / 2**20
    assert held["fsdp"] < held["ddp"] / k * 1.15, held
    return f"of 1 GiB of parameters and AdamW's state a worker holds {held['fsdp']:.0f} MiB, with ddp {held['ddp']:.0f}"


class Struck(Wide):
    """Half a gigabyte of parameters; rank 0 is killed once, and notes in the end where copies of its state go."""

    def __init__(self, flag: str = "") -> None:
        super().__init__()
        del self.blocks[8:]
        self.flag = flag
        self.copies: list[tuple[str, bool]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.flag and self.global_rank == 0 and self.global_step == 17 and not Path(self.flag).exists():
            Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)

    def on_train_end(self) -> None:
        buffers = [each for each in gc.get_objects() if type(each) is SharedBuffer]
        whole = [
            each.tensor(key, torch.uint8, (size,)) for each in buffers for key, (_, size) in each.layout.at.items()
        ]
        self.copies = [(each.segment.name, all(t.is_pinned() for t in whole)) for each in buffers]


class Watch(raytrainer.Callback):
    """Notes the most memory that is shared, and what there was at first."""

    def __init__(self) -> None:
        self.before, self.most, self.first = shared_bytes(), [0, 0], set[str]()

    def on_train_chunk_end(self, trainer: Any, module: Any, report: Any) -> None:
        new = [now - then for now, then in zip(shared_bytes(), self.before, strict=True)]
        self.most = [max(*pair) for pair in zip(self.most, new, strict=True)]
        if report.step < 17:
            self.first = segment_names()


@check(2, workers="all")
def fsdp_states_are_in_memory_once() -> str:
    gpus = len(uuids())
    options: dict[str, Any] = {
        "gpus": gpus, "strategy": "fsdp", "deterministic": True, "max_epochs": 3, "snapshot_every": 4, "spares": 1
    }  # fmt: skip
    calm, struck = Struck(), Struck(f"{tempfile.mkdtemp()}/flag")
    fit(calm, data(64 * gpus), **options)
    gc.collect()
    watch = Watch()
    (recovery,) = fit(struck, data(64 * gpus), callbacks=[watch], **options).recoveries
    assert distance(calm, struck) == 0.0, distance(calm, struck)
    state = 3 * 4 * sum(parameter.numel() for parameter in struck.parameters())
    segments, store = watch.most
    sent = state / 3  # the module's weights, to workers that begin
    assert state < segments and segments + max(0, store - sent) <= 1.1 * 2 * state, (segments, store, state)
    names = {name for name, _ in struck.copies}
    assert len(names) == 2 and names <= watch.first, (struck.copies, watch.first)  # which the process did not make
    assert all(pinned for _, pinned in struck.copies), struck.copies
    return (
        f"{gpus} GPUs, killed: {recovery.seconds:.1f} s, bit-equal; two states of {state / 2**30:.2f} GiB: at most "
        f"{segments / 2**30:.2f} GiB shared, {store / 2**30:.2f} more of Ray's; the lost one's memory is copied to"
    )


class SplitNet(Net):
    """Its hidden layer is split, where the strategy splits layers."""

    def configure_model(self) -> None:
        mesh = None if self.device_mesh is None else self.device_mesh["tensor_parallel"]
        if mesh is None or mesh.size() == 1:
            return
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        parallelize_module(self.layers, mesh, {"0": ColwiseParallel(), "3": RowwiseParallel()})


@check(2, workers="both")
def split_layers_equal_one_gpu() -> str:
    k, worst, last = len(uuids()), 0.0, 0.0
    for options in ({}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}):
        ours, theirs = Rows(), Rows()
        one, many = SplitNet(), SplitNet()
        fit(one, data(64, 8), logger=theirs, log_every_n_steps=1, **options)
        strategy = raytrainer.ModelParallel(tensor=k)
        fit(many, data(64, 8), gpus=k, strategy=strategy, logger=ours, log_every_n_steps=1, **options)
        worst = max(worst, distance(one, many))
        pairs = [(a["loss"], b["loss"]) for a, b in zip(ours.rows, theirs.rows, strict=True) if "loss" in a]
        assert len(pairs) == 16 // options.get("accumulate_grad_batches", 1), (len(ours.rows), options)
        last = max(last, *(abs(a - b) for a, b in pairs))
    assert worst < 1e-5 and last < 1e-5, (worst, last)
    seen = f"weights differ by {worst:.1e}, losses by {last:.1e}"
    return f"layers split over {k} GPUs, also accumulating and clipping: {seen}"


@check(2, workers="both")
def shards_go_on_on_fewer_and_on_more_gpus() -> str:
    k, folder = len(uuids()), tempfile.mkdtemp()
    straight = SplitNet()
    fit(straight, data(64, 8 * k), max_epochs=4)
    runs: list[tuple[int, Any]] = [
        (k, "fsdp"),
        (1, "fsdp"),
        (k, raytrainer.ModelParallel(tensor=k)),
        (k, raytrainer.FSDP()),
    ]
    path = None
    for epoch, (gpus, strategy) in enumerate(runs, 1):
        module = SplitNet()
        saver = raytrainer.ModelCheckpoint(f"{folder}/{epoch}", save_last=True)
        parts = k if strategy in ("fsdp", raytrainer.FSDP()) and gpus > 1 else 1
        loader = data(64, 8 * k // parts)
        fit(module, loader, gpus=gpus, strategy=strategy, max_epochs=epoch, callbacks=saver, ckpt_path=path)
        path = f"{folder}/{epoch}/last.ckpt"
    off = distance(straight, module)
    assert off < 1e-5, off
    return f"fsdp on {k} -> fsdp on 1 -> layers split over {k} -> fsdp on {k}, an epoch each: as one GPU to {off:.1e}"
