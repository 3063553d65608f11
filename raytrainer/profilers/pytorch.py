"""A trace of operations and kernels, by torch.profiler."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from raytrainer.errors import ConfigurationError
from raytrainer.profilers.profiler import Profiler

__all__ = ["PyTorchProfiler"]


class PyTorchProfiler(Profiler):
    """torch.profiler over a few batches, as a Chrome trace for each worker (chrome://tracing, Perfetto).

    Hooks are spans named "raytrainer/<hook>". On GPUs kernels are recorded too. In `fit` batches are those of training.

    Args:
        wait: Batches to leave out first.
        warmup: Batches in which the profiler runs but records nothing.
        active: Batches to record.
        repeat: How often; the trace has the last time. 0: until the end.
        record_shapes: Record the shapes of operations' inputs.
        profile_memory: Record memory.
        with_stack: Record Python stacks; slow.

    Raises:
        ConfigurationError: A negative number, or no batch to record.
    """

    suffix: ClassVar[str] = "json"
    summary: ClassVar[bool] = False

    def __init__(
        self,
        wait: int = 1,
        warmup: int = 1,
        active: int = 3,
        repeat: int = 1,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
    ) -> None:
        super().__init__()
        if min(wait, warmup, repeat) < 0 or active < 1:
            raise ConfigurationError(
                f"PyTorchProfiler(wait={wait}, warmup={warmup}, active={active}, repeat={repeat}): give numbers of "
                f"batches, active at least 1, the others at least 0."
            )
        self.schedule = {"wait": wait, "warmup": warmup, "active": active, "repeat": repeat}
        self.options: dict[str, Any] = {
            "record_shapes": record_shapes,
            "profile_memory": profile_memory,
            "with_stack": with_stack,
        }
        self._profile: torch.profiler.profile | None = None
        self._trace: bytes | None = None

    def start(self, rank: int, device: torch.device) -> None:
        """Wait for the first batches."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._trace = None
        self._profile = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(**self.schedule),
            on_trace_ready=self._take,
            **self.options,
        )
        self._profile.start()

    def _take(self, profile: torch.profiler.profile) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            self._trace = path.read_bytes()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as a span."""
        label, span = f"raytrainer/{name}", torch.profiler.record_function

        def spanned(*args: Any, **kwargs: Any) -> Any:
            with span(label):
                return function(*args, **kwargs)

        return spanned

    def step(self) -> None:
        """Go on in the schedule."""
        if self._profile is not None:
            self._profile.step()

    def stop(self) -> bytes | None:
        """The trace; None if the run was over before the schedule recorded anything."""
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.stop()
        return self._trace

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_profile": None, "_trace": None}
