"""`EvaluationCalls`: what of the user's an evaluation calls, looked up and bound once, as long as it stays the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raytrainer.worker.hook_calls import overridden

if TYPE_CHECKING:
    from raytrainer.worker.worker_run import WorkerRun

__all__ = ["HOOKS", "EvaluationCalls", "calls_of"]

#: The module's step in each stage, and how the stage is called in the names of hooks.
STEPS = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}
HOOKS = {"validate": "validation", "test": "test", "predict": "predict"}

Hook = Callable[..., Any] | None


class EvaluationCalls:
    """The hooks and the step of one stage. A hook that nobody wrote is None.

    Args:
        run: The run.
        stage: "validate", "test" or "predict".
        loaders: How many there are.

    Attributes:
        steady: Whether nothing of the user's is called before the first batch.
        quiet: Whether nothing of the user's is called after the last one.
    """

    def __init__(self, run: WorkerRun, stage: str, loaders: int) -> None:
        hooks, module, name = run.hooks, run.module, HOOKS[stage]
        step_end = run.step_end(STEPS[stage]) if stage != "predict" else None
        step = run.slices.bind(run.step(STEPS[stage], loaders), step_end)
        self.step = run.strategy.evaluation_step(module, step)
        self.batch_start: Hook = hooks.bind(f"on_{name}_batch_start", loaders)
        batch_end = hooks.bind(f"on_{name}_batch_end", loaders)
        self.batch_end: Hook = batch_end if run.task.stage == "fit" else run.after_batch(batch_end)
        self.start: Hook = hooks.bind(f"on_{name}_start")
        self.epoch_start: Hook = hooks.bind(f"on_{name}_epoch_start")
        self.epoch_end: Hook = hooks.bind(f"on_{name}_epoch_end")
        self.end: Hook = hooks.bind(f"on_{name}_end")
        before = (f"on_{name}_model_eval", "on_validation_model_zero_grad")
        self.steady = not (self.start or self.epoch_start or any(overridden(module, hook) for hook in before))
        self.quiet = not (self.epoch_end or self.end or overridden(module, f"on_{name}_model_train"))


def calls_of(run: WorkerRun, stage: str, loaders: int) -> EvaluationCalls:
    """As they were in the evaluation before, unless a hook, or a function that is one, is another by now."""
    names = _NAMES[stage]
    found = [loaders, *(getattr(owner, name, None) for owner in (run.module, *run.hooks.callbacks) for name in names)]
    known = run.evaluation_calls.get(stage)
    if known is None or known[0] != found:
        known = run.evaluation_calls[stage] = found, EvaluationCalls(run, stage, loaders)
    calls: EvaluationCalls = known[1]
    return calls


_NAMES = {
    stage: (
        STEPS[stage],
        f"{STEPS[stage]}_end",
        "on_validation_model_zero_grad",
        *(
            f"on_{name}_{moment}"
            for moment in ("model_eval", "model_train", "start", "epoch_start", "batch_start", "batch_end", "epoch_end")
        ),
        f"on_{name}_end",
    )
    for stage, name in HOOKS.items()
}
