"""What a precision does to the module, to its inputs, and to a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from raytrainer.data.transfer import cast_floating
from raytrainer.metrics.metric_objects import is_metric, metrics_in
from raytrainer.worker.given_optimizer import GivenOptimizer, inner_optimizer

__all__ = ["Precision", "ScaledOptimizer"]

_TRUE = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
_MIXED = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16, "float8": torch.bfloat16}


class Precision:
    """One of "32-true", "64-true", "16-true", "bf16-true" (everything in that type), a "-mixed" one (autocast), or
    "float8": as "bf16-mixed", with linear layers that multiply in float8.

    Mixed fp16 scales the loss (`torch.amp.GradScaler`), so that small gradients survive. A step whose gradients are not
    finite leaves the weights alone and is counted in `skipped_steps`.

    Args:
        name: Which.
        device: Where steps run.
        agree: Makes numbers that are non-zero on any worker non-zero on all, where workers have different gradients.
    """

    def __init__(
        self, name: str, device: torch.device, agree: Callable[[Iterable[Tensor]], None] | None = None
    ) -> None:
        self.name, self.device, self._agree = name, device, agree
        self.dtype = _TRUE.get(name)
        self.autocast_dtype = _MIXED.get(name)
        self.scaler: torch.amp.GradScaler | None = None
        if name == "16-mixed":
            self.scaler = torch.amp.GradScaler(device.type)
        self.said: str | None = None  # what was done to the module, if that is worth a line
        self.restore_module: Callable[[], None] = lambda: None  # undoes what is not to stay with it
        self._unscaled: set[int] = set()  # optimizers whose gradients are unscaled; the scale is to be adjusted
        self._ran = False  # whether the latest step reached the optimizer
        self._found: Tensor | None = None  # of a fused optimizer: on the device, non-zero if it skipped the step
        self._unread: list[Tensor] = []  # the same, of steps that are not counted yet
        self._skipped = 0

    def convert_module(self, module: nn.Module) -> None:
        """Cast parameters and floating-point buffers, where the whole module has one type; give layers float8."""
        if self.name == "float8":
            from raytrainer.worker.float8 import to_float8  # which few runs need

            self.said, self.restore_module = to_float8(module, self.device)
        dtype = self.dtype
        if dtype is not None:
            # Module.to would throw the imaginary part of complex ones away
            def convert(tensor: Tensor) -> Tensor:
                return tensor.to(dtype) if tensor.is_floating_point() else tensor

            if not any(True for _ in metrics_in(module)):
                module._apply(convert)
                return
            for part in module.modules():
                if not is_metric(part):  # sums in half precision would soon stand still
                    part._apply(convert, recurse=False)

    @property
    def convert_input(self) -> Callable[[Any], Any] | None:
        """What to do to a batch before it is used; None: nothing."""
        dtype = self.dtype
        return None if dtype is None else lambda batch: cast_floating(batch, dtype)

    @property
    def plain(self) -> bool:
        """Whether steps run as they are, without any context."""
        return self.dtype is None and self.autocast_dtype is None

    @contextmanager
    def context(self) -> Iterator[None]:
        """The context of a step: autocast, or a default dtype for the tensors that the user makes in it."""
        if self.autocast_dtype is not None:
            with torch.autocast(self.device.type, dtype=self.autocast_dtype):
                yield
        elif self.dtype is not None:
            default = torch.get_default_dtype()
            torch.set_default_dtype(self.dtype)
            try:
                yield
            finally:
                torch.set_default_dtype(default)
        else:
            yield

    # ---------------------------------------------------------------- scaling

    def scale(self, loss: Tensor) -> Tensor:
        if self.scaler is None:
            return loss
        self.adjust()
        return self.scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Bring an optimizer's gradients to their true size, once before its step."""
        optimizer = inner_optimizer(optimizer)
        if self.scaler is not None and id(optimizer) not in self._unscaled and _has_gradient(optimizer):
            self.scaler.unscale_(optimizer)
            if self._agree is not None:
                from raytrainer.private.fsdp_private import found_infinities  # which imports much

                self._agree(found_infinities(self.scaler, optimizer))
            self._unscaled.add(id(optimizer))

    def step(self, optimizer: Optimizer) -> None:
        """Step, unless a gradient is not finite."""
        optimizer = inner_optimizer(optimizer)
        self._ran, self._found = True, None
        if self.scaler is None or not _has_gradient(optimizer):
            optimizer.step()
            return
        self.unscale(optimizer)
        self._ran = False
        # torch calls the step of an ordinary optimizer, after a look at the device, if gradients are finite; a fused
        # one always, which then looks for itself, so that nothing waits for the device
        handle = optimizer.register_step_post_hook(self._note)
        try:
            self.scaler.step(optimizer)
        finally:
            handle.remove()
        if self._found is not None:
            self._unread.append(self._found)
        elif not self._ran:
            self._skipped += 1

    def _note(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._ran = True
        found = getattr(optimizer, "found_inf", None)
        if isinstance(found, Tensor):
            self._found = found

    def adjust(self) -> None:
        """Let the scale follow what the last steps have found. Later than their steps, for all optimizers at once."""
        if self.scaler is not None and self._unscaled:
            self._unscaled.clear()
            self.scaler.update()

    @property
    def skipped(self) -> bool:
        """Whether the latest step left the weights alone. With a fused optimizer, waits for the device."""
        if self._found is not None:
            self._count()
        return not self._ran

    @property
    def skipped_steps(self) -> int:
        """Steps left out for infinite gradients. With a fused optimizer, waits for the device."""
        self._count()
        return self._skipped

    def _count(self) -> None:
        if self._unread:
            found = torch.stack(self._unread).ne(0).tolist()
            self._skipped += sum(found)
            if self._found is not None:
                self._ran, self._found = not found[-1], None
            self._unread.clear()

    def state_dict(self) -> dict[str, Any]:
        if self.scaler is None:
            return {}
        self.adjust()
        return {**self.scaler.state_dict(), "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)
            self._skipped = state.get("skipped_steps", 0)


class ScaledOptimizer(GivenOptimizer):
    """What user code is given under "16-mixed": its `step` unscales, and leaves infinite gradients out.

    Args:
        optimizer: The optimizer.
        precision: With a scaler.
        before: Called before each step, with the gradients unscaled.
        after: Called after each step, also one that was left out.
        others: As for `GivenOptimizer`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        precision: Precision,
        before: Callable[[Optimizer], Any] | None = None,
        after: Callable[[], None] | None = None,
        **others: Any,
    ) -> None:
        super().__init__(optimizer, **others)
        self.__dict__.update(precision=precision, before=before, after=after)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Run the closure, which makes the gradients, if there is one; then step."""
        own = self.__dict__
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        own["precision"].unscale(own["optimizer"])
        if own["before"] is not None:
            own["before"](own["optimizer"])
        own["precision"].step(own["optimizer"])
        if own["after"] is not None:
            own["after"]()
        return loss


def _has_gradient(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
