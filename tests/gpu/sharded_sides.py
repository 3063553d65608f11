"""One and the same Llama, trained in shards by hand, by Lightning and by raytrainer: a side a process, told by JSON.

`sharded.py` starts this: python tests/gpu/sharded_sides.py '<Job as JSON>' (by hand under torch.distributed.run).
Each side writes what it has seen to the job's file.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

CLIP, LR = 1.0, 3e-4


@dataclass
class Job:
    """What to train, and where to tell of it.

    Attributes:
        side: "hand", "lightning" or "ours".
        size: Of the example's sizes.
        batch: Windows a step on each worker.
        length: Tokens in a window.
        workers: How many; GPUs, unless `cpu`.
        compiled: Whether blocks are compiled.
        warm: Steps that are not timed.
        steps: Steps that are.
        precision: "bf16-mixed", or "float8" (torchao).
        all_gather: By hand, gather weights in float8 too.
        saving: Save a whole state twice, after each third of the steps, and load it.
        folder: Where to.
        result: The file to write.
        cpu: Over gloo, to try the scripts out.
    """

    side: str
    size: str
    batch: int
    length: int
    workers: int
    compiled: bool
    warm: int
    steps: int
    precision: str
    all_gather: bool
    saving: bool
    folder: str
    result: str
    cpu: bool

    @property
    def device(self) -> str:
        return "cpu" if self.cpu else "cuda"

    @property
    def total(self) -> int:
        return self.warm + self.steps

    @property
    def save_every(self) -> int:
        """The steps after which the state is saved: twice in all."""
        return self.total // 3 + 1


def llama() -> Any:
    """The example's module."""
    folder = str(Path(__file__).parents[2] / "examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import llama

    return llama


class Model(nn.Module):
    """The example's network, as a plain module; gives the loss of windows."""

    def __init__(self, size: str, length: int) -> None:
        super().__init__()
        example = llama()
        shape = example.SIZES[size]
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.dim)
        self.layers = nn.ModuleList(example.Block(shape, length) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim, 1e-5)
        self.lm_head = nn.Linear(shape.dim, shape.vocabulary, bias=False)

    def forward(self, windows: Tensor) -> Tensor:
        x = self.embed_tokens(windows[:, :-1])
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.lm_head(self.norm(x)).flatten(0, 1).float(), windows[:, 1:].flatten())


class Windows(torch.utils.data.Dataset[Tensor]):
    """Random tokens, the same at each place on every side."""

    def __init__(self, job: Job) -> None:
        self.count = job.batch * job.workers * job.total
        self.length, self.vocabulary = job.length, llama().SIZES[job.size].vocabulary

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.randint(self.vocabulary, (self.length + 1,), generator=torch.Generator().manual_seed(index))


def loader(job: Job, sampler: Any = None) -> Any:
    return torch.utils.data.DataLoader(
        Windows(job), batch_size=job.batch, sampler=sampler, num_workers=0 if job.cpu else 2, pin_memory=not job.cpu
    )


def optimizer_of(job: Job, parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, LR, betas=(0.9, 0.95), weight_decay=0.1, fused=not job.cpu)


def shard(job: Job, model: Any, mesh: Any) -> None:
    """Blocks compiled, then sharded, then the root: as one writes it by hand."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if job.precision == "float8":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig(emulate=job.cpu, enable_fsdp_float8_all_gather=job.all_gather)
        convert_to_float8_training(model, module_filter_fn=lambda _, name: name != "lm_head", config=config)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        if job.compiled:
            layer.compile()
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


class Watch:
    """The moments at which steps are done, on the device; what the process has held at most."""

    def __init__(self, job: Job) -> None:
        self.job, self.done = job, 0
        self.marks: list[Any] = []
        self.losses: list[Tensor] = []
        self.saves: list[float] = []  # when each save was about to begin
        self.begun = time.perf_counter()
        self.first: float | None = None

    def step(self, loss: Tensor) -> None:
        """A step is done."""
        self.done += 1
        self.losses.append(loss.detach())
        if self.first is None:
            if not self.job.cpu:
                torch.cuda.synchronize()
            self.first = time.perf_counter() - self.begun
        if self.done < self.job.warm:
            return
        if self.done == self.job.warm and not self.job.cpu:
            torch.cuda.reset_peak_memory_stats()
        if self.job.saving and not self.job.cpu:
            torch.cuda.synchronize()  # so that what stands still shows in wall clock time
        if self.job.saving and self.done % self.job.save_every == 0:
            self.saves.append(time.time())
        if self.job.cpu or self.job.saving:
            self.marks.append(time.perf_counter())
        else:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()

    def times(self) -> list[float]:
        """Milliseconds of each timed step."""
        if self.job.cpu or self.job.saving:
            return [1e3 * (b - a) for a, b in pairwise(self.marks)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(self.marks)]

    def tell(self, **more: Any) -> None:
        """Write what was seen; all ranks call it."""
        times = self.times()
        peak = torch.zeros(1, device=self.job.device)
        peak += 0.0 if self.job.cpu else torch.cuda.max_memory_allocated() / 2**30
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            seen = {
                "median": statistics.median(times), "mean": statistics.fmean(times), "peak": float(peak),
                "first": self.first, "losses": [float(loss) for loss in self.losses], **more,
            }  # fmt: skip
            if self.job.saving:
                # whatever stands still, in whichever step: the saved state's cost to training
                usual, second = statistics.median(times), 2 * self.job.save_every - self.job.warm - 1
                over = [(t - usual) / 1e3 if t > 1.5 * usual else 0.0 for t in times]
                seen["blocked"], seen["blocked_first"] = sum(over[second:]), sum(over[:second])
                seen["saves"] = self.saves
                seen["slow"] = {step: round(seconds, 3) for step, seconds in enumerate(over) if seconds}
            Path(self.job.result).write_text(json.dumps(seen))


# ---------------------------------------------------------------- by hand


def by_hand(job: Job) -> None:
    watch = Watch(job)
    rank = int(os.environ["RANK"])
    device = torch.device("cpu") if job.cpu else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if not job.cpu:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if job.cpu else "cpu:gloo,cuda:nccl", device_id=None if job.cpu else device)
    mesh = dist.init_device_mesh(job.device, (job.workers,))
    with torch.device("meta"):
        model = Model(job.size, job.length)
    shard(job, model, mesh)
    model.to_empty(device=device)
    torch.manual_seed(7)
    for part in model.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    optimizer = optimizer_of(job, model.parameters())
    sampler = torch.utils.data.distributed.DistributedSampler(Windows(job), job.workers, rank, shuffle=False)
    seen: dict[str, float] = {}
    if job.all_gather:
        from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp
    for step, windows in enumerate(loader(job, sampler), 1):
        loss = model(windows.to(device, non_blocking=True))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if job.all_gather:
            precompute_float8_dynamic_scale_for_fsdp(model)
        watch.step(loss)
        if job.saving and step == job.total:
            seen = saved_by_hand(job, model, optimizer)
    watch.tell(**seen)
    dist.destroy_process_group()


def saved_by_hand(job: Job, model: Any, optimizer: Any) -> dict[str, float]:
    """Seconds of a bare copy into pinned buffers that are kept, of DCP's async_save, save and load."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.tensor import DTensor

    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": states}
    held = [t.to_local() if isinstance(t, DTensor) else t for t in _tensors(state)]
    kept = [torch.empty_like(t, device="cpu", pin_memory=not job.cpu) for t in held]
    copies = [_seconds(job, lambda: _copy(held, kept)) for _ in range(3)]
    kept.clear()
    pending: list[Any] = []
    folder = f"{job.folder}/dcp"
    blocked = _seconds(job, lambda: pending.append(dcp.async_save(state, checkpoint_id=f"{folder}-async")))
    pending[0].result()
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(f"{folder}-async")  # 17 GiB, which the disk may not have twice
    save = _seconds(job, lambda: dcp.save(state, checkpoint_id=folder))
    load = _seconds(job, lambda: dcp.load(state, checkpoint_id=folder))
    gib = sum(t.numel() * t.element_size() for t in held) * job.workers / 2**30
    return {"copy": min(copies), "async_save": blocked, "save": save, "load": load, "gib": gib}


def _copy(held: list[Tensor], kept: list[Tensor]) -> None:
    for here, there in zip(held, kept, strict=True):
        there.copy_(here, non_blocking=True)


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    members = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [tensor for member in members for tensor in _tensors(member)]


def _seconds(job: Job, call: Any) -> float:
    if not job.cpu:
        torch.cuda.synchronize()
    dist.barrier()
    begun = time.perf_counter()
    call()
    if not job.cpu:
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - begun


# ---------------------------------------------------------------- Lightning


def by_lightning(job: Job) -> None:
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Run(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.watch = Watch(job)

        def configure_model(self) -> None:
            if hasattr(self, "model"):
                return
            with torch.device("meta"):
                self.model = Model(job.size, job.length)
            shard(job, self.model, self.device_mesh["data_parallel"])

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss: Tensor = self.model(batch)
            self.log("loss", loss)
            return loss

        def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
            self.watch.step(outputs["loss"])

        def on_train_end(self) -> None:
            self.watch.tell()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(job, self.parameters())

    trainer = lightning.Trainer(
        strategy=ModelParallelStrategy(data_parallel_size=job.workers, tensor_parallel_size=1),
        accelerator="cpu" if job.cpu else "gpu", devices=job.workers, max_steps=job.total, gradient_clip_val=CLIP,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=job.folder,
    )  # fmt: skip
    trainer.fit(Run(), loader(job))


# ---------------------------------------------------------------- ours


def by_us(job: Job) -> None:
    import raytrainer as rt

    class Run(rt.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model(job.size, job.length)
            self.seen: dict[str, float] = {}

        def on_fit_start(self) -> None:
            self.watch = Watch(job)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss: Tensor = self.model(batch)
            self.log("loss", loss)
            return loss

        def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
            self.watch.step(outputs["loss"])

        def on_train_end(self) -> None:
            if self.watch.marks:
                self.watch.tell()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.asked = time.perf_counter()

        def on_train_start(self) -> None:
            if not job.cpu:
                torch.cuda.synchronize()
            if hasattr(self, "asked") and self.global_rank == 0:
                path = Path(job.result)
                seen = json.loads(path.read_text())
                path.write_text(json.dumps({**seen, "load": time.perf_counter() - self.asked}))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(job, self.parameters())

    def trainer(steps: int, callbacks: list[Any]) -> rt.Trainer:
        return rt.Trainer(
            strategy="fsdp", gpus=None if job.cpu else job.workers, num_processes=job.workers if job.cpu else None,
            max_steps=steps, gradient_clip_val=CLIP, precision=job.precision, compile=job.compiled, seed=7,
            logger=False, enable_checkpointing=bool(callbacks), enable_progress_bar=False, enable_model_summary=False,
            callbacks=callbacks, default_root_dir=job.folder, snapshot_every=None,
        )  # fmt: skip

    saver = rt.ModelCheckpoint(
        f"{job.folder}/ours", every_n_train_steps=job.save_every, save_top_k=-1, filename="{step}"
    )
    trainer(job.total, [saver] if job.saving else []).fit(rt.on_meta(Run), loader(job))
    if job.saving:
        paths = sorted(Path(f"{job.folder}/ours").glob("*.ckpt"))
        seen = json.loads(Path(job.result).read_text())
        whole = [(path / "meta.json").stat().st_mtime for path in paths]  # which is written last
        took = [end - begun for begun, end in zip(seen["saves"], whole, strict=True)]
        Path(job.result).write_text(json.dumps({**seen, "save": min(took)}))
        trainer(job.save_every + 1, []).fit(rt.on_meta(Run), loader(job), ckpt_path=paths[0])


if __name__ == "__main__":
    given = Job(**json.loads(sys.argv[1]))
    {"hand": by_hand, "lightning": by_lightning, "ours": by_us}[given.side](given)
