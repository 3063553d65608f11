"""Checks on real NVIDIA GPUs: prints one table, exits non-zero if a check fails.

Run on a machine with one or more GPUs: python tests/gpu/check.py [--only NAME ...]
Checks that need more GPUs than there are are skipped.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import raytrainer

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "seed": 7,
}
CHECKS: list[tuple[str, int, Callable[[], str]]] = []


def check(gpus: int) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a check that needs `gpus` GPUs; it returns what it saw, and raises if that is wrong."""

    def register(function: Callable[[], str]) -> Callable[[], str]:
        CHECKS.append((function.__name__, gpus, function))
        return function

    return register


def count() -> int:
    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetCount())


def used_mib() -> list[int]:
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count())]
    return [int(pynvml.nvmlDeviceGetMemoryInfo(h).used) >> 20 for h in handles]


def data(rows: int = 64, batch_size: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 16, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=batch_size)


class Net(raytrainer.Module):
    """A small regression; records where it ran and its losses."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 1))
        self.register_buffer("scale", torch.ones((), device=self.device))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.losses: list[float] = []
        self.seen: dict[str, Any] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.calls += 1
        loss = F.mse_loss(self.layers(x) * self.scale, y)
        self.losses.append(loss.detach().float().item())
        self.log("loss", loss)
        return loss

    def on_train_end(self) -> None:
        properties = torch.cuda.get_device_properties(self.device)
        self.seen["uuid"] = str(properties.uuid)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fit(module: raytrainer.Module, loader: Any = None, **options: Any) -> raytrainer.Trainer:
    trainer = raytrainer.Trainer(**{**QUIET, "strategy": "ddp", "gpus": 1, "max_epochs": 2, **options})
    trainer.fit(module, data() if loader is None else loader)
    return trainer


def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max((x.double() - y.double()).abs().max().item() for x, y in pairs)


# ---------------------------------------------------------------- devices


class Placement(Net):
    """Asserts that everything is where it should be, without a single .to()."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        assert self.device.type == "cuda"
        assert self.scale.device == self.calls.device == self.device

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert batch["nested"][0]["x"].device == self.device
        made = torch.zeros(2, device=self.device)
        assert made.type_as(batch["y"]).device == self.device
        assert torch.ones(1).cuda().device == self.device  # a stray .cuda() ends up here too
        return super().training_step((batch["nested"][0]["x"], batch["y"]), batch_idx)

    def on_train_end(self) -> None:
        pass


@check(1)
def device_placement() -> str:
    batches = [{"nested": [{"x": torch.randn(8, 16)}], "y": torch.randn(8, 1)} for _ in range(4)]
    fit(Placement(), batches)
    return "parameters, buffers, nested batches, self.device, type_as, stray .cuda()"


@check(1)
def driver_has_no_context() -> str:
    fit(Net())
    assert not torch.cuda.is_initialized()
    return "torch.cuda is not initialised in the driver"


@check(2)
def chosen_index() -> str:
    uuids = [pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count())]
    last = count() - 1
    module = Net()
    before = used_mib()
    trainer = fit(module, gpus=[last])
    assert module.seen["uuid"].removeprefix("GPU-") in uuids[last], (module.seen, uuids)
    grown = [i for i, (a, b) in enumerate(zip(before, used_mib(), strict=True)) if b > a + 100]
    assert set(grown) <= {last}, f"memory grew on {grown}"
    trainer.close()
    return f"gpus=[{last}] is PCI index {last}; memory grew on {grown} only"


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


@check(1)
def auto_select() -> str:
    fit(Net(), gpus=1, auto_select_gpus=True).close()
    return "gpus=1, auto_select_gpus=True trains"


@check(1)
def in_process() -> str:
    """The one check that initialises CUDA in a process of its own: strategy="local" on a GPU."""
    import subprocess

    code = (
        "import sys; sys.path.insert(0, 'tests/gpu'); import check, torch; m = check.Net(); "
        "check.fit(m, strategy='local'); print(sum(m.losses[:4]) > sum(m.losses[-4:]), torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("True True"), done.stdout + done.stderr[-2000:]
    return 'strategy="local" on a GPU'


@check(1)
def gpu_memory_log() -> str:
    rows: list[dict[str, float]] = []

    class Rows(raytrainer.Logger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            rows.append(dict(metrics))

        def log_hyperparams(self, params: Any) -> None:
            pass

    gpus = min(2, count())
    fit(Net(), gpus=gpus, log_gpu_memory="all", log_every_n_steps=2, logger=Rows())
    every = {name for row in rows for name in row if "gpu" in name and "mem" in name}
    assert len(every) == gpus, every
    rows.clear()
    trainer = fit(Net(), gpus=gpus, log_gpu_memory="min_max", log_every_n_steps=2, logger=Rows())
    both = {name for row in rows for name in row if "gpu" in name and "mem" in name}
    assert len(both) == 2, both
    return f"{sorted(every)}; {sorted(both)}; peak {trainer.peak_memory_bytes}"


# ---------------------------------------------------------------- strategies


@check(2)
def ddp_equals_one_process() -> str:
    k = count()
    worst = 0.0
    for options in ({}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}):
        one, many = Net(), Net()
        fit(one, data(64 * k, 8 * k), **options)
        fit(many, data(64 * k, 8), gpus=k, **options)
        one.losses, many.losses = [], []
        worst = max(worst, distance(one, many))
    assert worst < 1e-5, worst
    return f"{k} GPUs against one, also accumulating and clipping: weights differ by {worst:.1e} at most"


class Contrastive(raytrainer.Module):
    """In-batch negatives: the loss of a sample depends on the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, _ = batch
        return {"a": self.encoder(x), "b": self.encoder(x.roll(1, dims=1))}

    def training_step_end(self, outputs: dict[str, Tensor]) -> Tensor:
        a, b = F.normalize(outputs["a"]), F.normalize(outputs["b"])
        return F.cross_entropy(a @ b.T / 0.1, torch.arange(len(a), device=a.device))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@check(2)
def node_strategies_oracle() -> str:
    k, worst = count(), 0.0
    for strategy in ("ddp2", "dp"):
        for rows, batch in ((64, 16), (66, 11)):  # the second does not divide evenly
            one, many = Contrastive(), Contrastive()
            fit(one, data(rows, batch))
            fit(many, data(rows, batch), gpus=k, strategy=strategy)
            worst = max(worst, distance(one, many))
    assert worst < 1e-5, worst
    return f"ddp2 and dp on {k} GPUs against one, uneven slices too: weights differ by {worst:.1e} at most"


class Normed(Net):
    """With a BatchNorm, to be synchronised."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
        torch.manual_seed(0)
        for parameter in self.layers.parameters():
            nn.init.normal_(parameter, std=0.1)


@check(2)
def sync_batchnorm() -> str:
    k = count()
    one, many = Normed(), Normed()
    fit(one, data(64 * k, 8 * k))
    fit(many, data(64 * k, 8), gpus=k, sync_batchnorm=True)
    worst = distance(one, many)
    assert worst < 1e-4, worst
    return f"{k} GPUs against one: weights differ by {worst:.1e} at most"


@check(2)
def ddp_options() -> str:
    k = count()
    plain, compressed = Net(), Net()
    fit(plain, data(64 * k, 8), gpus=k)
    fit(compressed, data(64 * k, 8), gpus=k, strategy=raytrainer.DDP(gradient_compression="bf16", bucket_cap_mb=5))
    worst = distance(plain, compressed)
    assert 0 < worst < 5e-2, worst
    return f"bf16 gradients change weights by {worst:.1e}"


# ---------------------------------------------------------------- precision and flags


class Curve(Net):
    """At the end, trains a copy by hand on the same device and batches; keeps both curves."""

    hand: list[float]

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.hand = []
        self.kinds: dict[str, str] = {}

    def on_train_start(self) -> None:
        self.__dict__["start"] = {k: v.detach().clone() for k, v in self.state_dict().items()}
        self.kinds = {k: str(v.dtype) for k, v in self.state_dict().items()}

    def on_train_end(self) -> None:
        model = Net().to(self.device)
        true = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}.get(self.mode)
        if true is not None:
            model.to(true)
        model.load_state_dict(self.__dict__.pop("start"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        mixed = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(self.mode)
        scaler = torch.amp.GradScaler("cuda", enabled=self.mode == "16-mixed")
        for _ in range(2):
            for x, y in data():
                x, y = (t.to(self.device, dtype=true or t.dtype) for t in (x, y))
                with torch.autocast("cuda", dtype=mixed or torch.float16, enabled=mixed is not None):
                    loss = F.mse_loss(model.layers(x) * model.scale, y)
                self.hand.append(loss.detach().float().item())
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()


@check(1)
def precision_curves() -> str:
    seen = []
    for mode in ("32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"):
        module = Curve(mode)
        fit(module, precision=mode)
        worst = max(abs(a - b) for a, b in zip(module.losses, module.hand, strict=True))
        assert worst <= 1e-6 * max(module.hand), (mode, worst)
        wanted = {"64-true": "float64", "16-true": "float16", "bf16-true": "bfloat16"}.get(mode, "float32")
        assert module.kinds["scale"] == module.kinds["layers.0.weight"] == f"torch.{wanted}", module.kinds
        assert module.kinds["calls"] == "torch.int64"
        seen.append(f"{mode} {worst:.0e}")
    return "loss curves beside a loop by hand: " + ", ".join(seen)


class Overflow(Net):
    """Makes the gradients of one batch infinite."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 3 else loss


@check(1)
def infinite_gradients() -> str:
    module = Overflow()
    fit(module, precision="16-mixed", gradient_clip_val=1.0, max_epochs=1)
    assert all(v.isfinite().all() for v in module.state_dict().values())
    return "a step with infinite gradients is skipped; weights stay finite"


@check(1)
def deterministic() -> str:
    gpus = min(2, count())
    first, second = Net(dropout=0.2), Net(dropout=0.2)
    for module in (first, second):
        fit(module, gpus=gpus, deterministic=True)
    assert distance(first, second) == 0.0
    return f"bit-identical twice on {gpus} GPU(s), dropout included"


@check(1)
def benchmark_and_tf32() -> str:
    fit(Net(), benchmark=True, float32_matmul_precision="high")
    return "benchmark=True, float32_matmul_precision='high'"


@check(1)
def compiled() -> str:
    plain, fast = Net(), Net()
    fit(plain)
    fit(fast, compile=True)
    assert list(plain.state_dict()) == list(fast.state_dict())
    worst = distance(plain, fast)
    assert worst < 1e-3, worst
    return f"compile=True: weights differ from eager by {worst:.1e}; plain names"


# ---------------------------------------------------------------- failures and start-up


class Victim(Net):
    """Rank 1 (or the only one) kills itself, once, in the middle of training."""

    def __init__(self, flag: str) -> None:
        super().__init__()
        self.flag = flag

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        victim = self.global_rank == self.trainer.world_size - 1
        if self.flag and self.global_step == 7 and victim and not os.path.exists(self.flag):
            Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


@check(1)
def killed_worker() -> str:
    gpus = min(2, count())
    options = {"gpus": gpus, "snapshot_every": 5, "deterministic": True, "max_epochs": 4}
    calm, struck = Victim(""), Victim(f"{tempfile.mkdtemp()}/flag")
    fit(calm, **options)
    trainer = fit(struck, **options)
    assert len(trainer.recoveries) == 1
    assert distance(calm, struck) == 0.0
    return f"{gpus} GPU(s): {trainer.recoveries[0]}; weights bit-equal to the undisturbed run"


class FirstStep(Net):
    """Notes the moment of its first step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.setdefault("first", time.time())
        return super().training_step(batch, batch_idx)


@check(1)
def time_to_first_step() -> str:
    said = []
    raytrainer.Trainer(**QUIET).close()
    for name in ("cold workers", "warm workers"):
        module, begun = FirstStep(), time.time()
        fit(module, gpus=count())
        said.append(f"{name} {module.seen['first'] - begun:.2f} s")
    return f"{count()} GPU(s): " + ", ".join(said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[])
    arguments = parser.parse_args()
    logging.getLogger("raytrainer").setLevel(logging.ERROR)
    have, failed = count(), 0
    name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
    print(f"{have} x {name}, torch {torch.__version__}\n\n| check | result | seen | s |\n|---|---|---|---|", flush=True)
    for title, gpus, function in CHECKS:
        if arguments.only and title not in arguments.only:
            continue
        begun = time.time()
        result, seen = "skipped", f"needs {gpus} GPUs"
        if gpus <= have:
            try:
                result, seen = "ok", function()
            except Exception as error:
                result, seen = "FAILED", f"{type(error).__name__}: {error}".replace("\n", " ")[:600]
                failed += 1
                traceback.print_exc()
        print(f"| {title} | {result} | {seen} | {time.time() - begun:.1f} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
