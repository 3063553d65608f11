"""A worker's share of a checkpoint, taken and put back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raytrainer.checkpoint import load_into
from raytrainer.errors import CheckpointError
from raytrainer.seeding import capture_rng
from raytrainer.worker.evaluation import to_cpu

if TYPE_CHECKING:
    from raytrainer.worker.run import Run

__all__ = ["capture_state", "restore_state"]


def capture_state(run: Run, weights_only: bool) -> dict[str, Any]:
    """Rank 0: the module's, optimizers', schedulers' and callbacks' state. Every rank: its generators.

    Keys are those that Lightning's users know: "state_dict", "optimizer_states", "lr_schedulers", "epoch",
    "global_step", "hyper_parameters".
    """
    view, module = run.view, run.module
    rng = {} if weights_only else {"rng": capture_rng()}
    if view.ranks.rank != 0:
        return rng
    checkpoint: dict[str, Any] = {
        "epoch": view.current_epoch,
        "global_step": view.global_step,
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
    }
    if not weights_only:
        checkpoint["optimizer_states"] = [o.state_dict() for o in view.optimizers]
        checkpoint["lr_schedulers"] = [_scheduler_state(c.scheduler) for c in view.lr_scheduler_configs]
        checkpoint["precision"] = run.precision.state_dict()
        checkpoint["stepped"] = run.stepped
        checkpoint["worker_callbacks"] = {c.state_key: c.state_dict() for c in view.callbacks}
    if run.datamodule is not None:
        checkpoint["datamodule"] = run.datamodule.state_dict()
        checkpoint["datamodule_hyper_parameters"] = dict(run.datamodule.hparams)
    module.on_save_checkpoint(checkpoint)
    return {**to_cpu(checkpoint), **rng}


def restore_state(run: Run, checkpoint: dict[str, Any]) -> None:
    """The reverse of `capture_state`, on every rank; `checkpoint["rng"]` is a list by rank.

    Raises:
        CheckpointError: The checkpoint does not fit the module or its optimizers.
    """
    view, module = run.view, run.module
    module.on_load_checkpoint(checkpoint)
    load_into(module, checkpoint["state_dict"], module.strict_loading)
    if run.datamodule is not None:
        run.datamodule.load_state_dict(checkpoint.get("datamodule") or {})
    if run.task.stage != "fit" or "optimizer_states" not in checkpoint:
        return
    states, schedulers = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
    for what, saved, own in (
        ("optimizers", states, view.optimizers),
        ("schedulers", schedulers, view.lr_scheduler_configs),
    ):
        if len(saved) != len(own):
            raise CheckpointError(
                f"the checkpoint has {len(saved)} {what}, configure_optimizers() gives {len(own)}; resume with the "
                f"same optimizers, or load the weights alone with Module.load_from_checkpoint."
            )
    for optimizer, state in zip(view.optimizers, states, strict=True):
        optimizer.load_state_dict(state)
    for config, state in zip(view.lr_scheduler_configs, schedulers, strict=True):
        config.scheduler.load_state_dict(state)
    run.precision.load_state_dict(checkpoint.get("precision") or {})
    saved_callbacks = checkpoint.get("worker_callbacks") or {}
    for callback in view.callbacks:
        if callback.state_key in saved_callbacks:
            callback.load_state_dict(saved_callbacks[callback.state_key])
    view.global_step, view.current_epoch = checkpoint["global_step"], checkpoint["epoch"]
    run.stepped = checkpoint.get("stepped", checkpoint["global_step"])
    generators = checkpoint.get("rng") or []
    if view.ranks.rank < len(generators) and len(generators) == view.ranks.world_size:
        run.rng = generators[view.ranks.rank]


def _scheduler_state(scheduler: Any) -> dict[str, Any]:
    state: dict[str, Any] = scheduler.state_dict()
    # some torch schedulers put callables there, which a checkpoint must not hold
    return {name: value for name, value in state.items() if not callable(value)}
