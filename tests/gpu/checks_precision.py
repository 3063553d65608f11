"""Types, scaled losses, and the flags of speed and determinism."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from typing import Any

import torch
from harness import Net, Rows, Skipped, check, data, distance, fit, uuids
from torch import Tensor
from torch.nn import functional as F


class Curve(Net):
    """At the end, trains a copy by hand on the same device and batches; keeps both curves."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.hand: list[Tensor] = []
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
        optimizer = model.configure_optimizers()
        mixed = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(self.mode)
        scaler = torch.amp.GradScaler("cuda", enabled=self.mode == "16-mixed")
        for _ in range(2):
            for x, y in data():
                x, y = (t.to(self.device, dtype=true or t.dtype) for t in (x, y))
                with torch.autocast("cuda", dtype=mixed or torch.float16, enabled=mixed is not None):
                    loss = F.mse_loss(model.layers(x) * model.scale, y)
                self.hand.append(loss.detach().clone())
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()


@check(1, workers="one")
def loss_curves() -> str:
    seen = []
    for mode in ("32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"):
        module, folder = Curve(mode), tempfile.mkdtemp()
        fit(module, precision=mode)
        worst = max(abs(float(a - b)) for a, b in zip(module.losses, module.hand, strict=True))
        assert worst == 0.0, (mode, worst)
        assert sum(module.losses[-4:]) < sum(module.losses[:4]), (mode, module.losses)
        kind = {"64-true": "float64", "16-true": "float16", "bf16-true": "bfloat16"}.get(mode, "float32")
        assert module.kinds["scale"] == module.kinds["layers.0.weight"] == f"torch.{kind}", module.kinds
        assert module.kinds["calls"] == "torch.int64"
        path = os.path.join(folder, "weights.pt")
        module.export_weights(path)
        saved = torch.load(path, weights_only=True)
        assert saved["layers.0.weight"].dtype == getattr(torch, kind) and saved["calls"].dtype == torch.int64
        seen.append(mode)
    return f"{', '.join(seen)}: equal to a loop by hand, bit for bit; buffers and exports have the type"


class Float8Curve(Curve):
    """The copy is converted by torchao, as its documentation has it."""

    def on_train_end(self) -> None:
        from torchao.float8 import convert_to_float8_training

        model = Net().to(self.device)
        model.load_state_dict(self.__dict__.pop("start"))
        convert_to_float8_training(model, module_filter_fn=lambda _, name: name == "layers.0")
        optimizer = model.configure_optimizers()
        for _ in range(2):
            for batch in data(batch_size=16):
                x, y = (t.to(self.device) for t in batch)
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = F.mse_loss(model.layers(x) * model.scale, y)
                self.hand.append(loss.detach().clone())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


@check(1, workers="one")
def float8() -> str:
    if find_spec("torchao") is None:
        raise Skipped("needs torchao")
    module = Float8Curve("float8")
    fit(module, data(batch_size=16), precision="float8")
    off = max(abs(float(a - b)) for a, b in zip(module.losses, module.hand, strict=True))
    assert off == 0.0, off
    assert type(module.layers[0]) is torch.nn.Linear and module.kinds["layers.0.weight"] == "torch.float32"
    far = []
    for options in ({}, {"strategy": "fsdp"}, {"compile": True}, {"strategy": "fsdp", "compile": True}):
        curves = []
        for precision in ("float8", "bf16"):
            rows = Rows()
            # batches of 12 and 4 rows, neither of which is a multiple of 16
            trainer = fit(Net(), data(64, 12), precision=precision, logger=rows, log_every_n_steps=1, **options)
            curves.append([row["loss"] for row in rows.rows if "loss" in row])
            assert trainer.global_step == len(curves[-1]) == 12
        far.append(max(abs(a - b) for a, b in zip(*curves, strict=True)) / max(curves[1]))
        assert curves[0] != curves[1] and far[-1] < 0.05, (options, curves)
    shown = ", ".join(f"{value:.1e}" for value in far)
    return f"equal to torchao by hand, bit for bit; beside bf16 {shown} of the largest loss (ddp, fsdp, each compiled)"


@check(1, workers="one")
def overflow_is_counted_and_schedulers_rest() -> str:
    for fused in (False, True):
        module = Net(fused=fused, bursts=(1, 3), schedule=True)
        trainer = fit(module, precision=16, gradient_clip_val=0.5, max_epochs=1)
        assert (trainer.global_step, trainer.skipped_steps) == (8, 2), (trainer.global_step, trainer.skipped_steps)
        assert [r * 2**8 for r in module.rates[:5]] == [0.5, 0.5, 0.25, 0.25, 0.125], module.rates
        assert all(p.isfinite().all() for p in module.parameters())
        module = Net(fused=fused, bursts=(1, 3))
        assert fit(module, precision=16, max_epochs=1).skipped_steps == 2
    return "2 of 8 steps left out and counted, schedulers rest; ordinary and fused AdamW"


class Alert(Net):
    """Fails if a step waits for the GPU."""

    def on_before_zero_grad(self, optimizer: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if self.global_step > 2 else "default")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        torch.cuda.set_sync_debug_mode("default")


@check(1, workers="one")
def steps_do_not_wait() -> str:
    fit(Alert(fused=True), precision="16-mixed")
    fit(Alert(fused=False), precision="bf16-mixed")
    fit(Alert(fused=True), precision="16-mixed", gradient_clip_val=1.0)
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


@check(1, workers="one")
def own_steps_are_scaled_too() -> str:
    modules = [kind(fused=False, bursts=(3,)) for kind in (Net, OwnStep, Manual)]
    for module in modules:
        clip = {} if isinstance(module, Manual) else {"gradient_clip_val": 0.5}
        trainer = fit(module, precision=16, deterministic=True, max_epochs=1, **clip)
        assert trainer.skipped_steps == 1, type(module).__name__
    assert all(distance(modules[0], module) == 0.0 for module in modules[1:])
    return "automatic, own optimizer_step and manual: the same weights"


@check(1, workers="all")
def deterministic() -> str:
    gpus = len(uuids())
    first, second = Net(dropout=0.2), Net(dropout=0.2)
    for module in (first, second):
        fit(module, data(64 * gpus, 8, shuffle=True), gpus=gpus, deterministic=True)
    assert distance(first, second) == 0.0
    return f"bit-identical twice on {gpus} GPU(s), dropout and shuffling included"


class Flags(Net):
    def on_train_start(self) -> None:
        self.flags = [torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()]


@check(1, workers="one")
def speed_flags() -> str:
    module = Flags()
    fit(module, benchmark=True, float32_matmul_precision="high")
    assert module.flags == [True, "high"], module.flags
    fit(module)  # on the same workers, which are as they were again
    assert module.flags == [False, "highest"], module.flags
    return "benchmark and float32_matmul_precision are set in the workers, and put back"


@check(1, workers="all")
def compiled() -> str:
    gpus = len(uuids())
    plain, fast = Net(), Net()
    fit(plain, data(64 * gpus), gpus=gpus)
    fit(fast, data(64 * gpus), gpus=gpus, compile=True)
    assert list(plain.state_dict()) == list(fast.state_dict())
    worst = distance(plain, fast)
    assert worst < 1e-4, worst
    return f"{gpus} GPU(s): weights differ from eager by {worst:.1e}; plain names in the state dict"
