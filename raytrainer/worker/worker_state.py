"""A worker's share of a checkpoint, taken and put back."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch

from raytrainer.checkpointing.checkpoint_format import IN_MEMORY
from raytrainer.data.epoch_state import of_all_workers
from raytrainer.errors import CheckpointError
from raytrainer.hparams import keep_types
from raytrainer.metrics.metric_objects import load_states, states_of
from raytrainer.metrics.metric_slots import joined_sums
from raytrainer.seeding import capture_rng

if TYPE_CHECKING:
    from raytrainer.worker.worker_run import WorkerRun

__all__ = ["begin_epoch", "capture_state", "most_of_state", "restore_state"]

log = logging.getLogger("raytrainer")


def capture_state(run: WorkerRun, weights_only: bool, replica: bool, final: bool = False) -> dict[str, Any]:
    """Rank 0: the module's, optimizers', schedulers' and callbacks' state. Every rank: its own streams and sums.

    Keys are those that Lightning's users know: "state_dict", "optimizer_states", "lr_schedulers", "epoch",
    "global_step", "hyper_parameters". Tensors are the live ones. What differs from rank to rank is under "own".

    Args:
        run: The run.
        weights_only: Leave out what only resuming needs.
        replica: Whether a worker of a second node gives what rank 0 gives too, so that one may be lost.
        final: The fit is over: no hook is called, and what comes home anyway is left out.
    """
    view, module = run.view, run.module
    run.put_back()  # where a run goes on, what it goes on from, and not what hooks that begin one make of it
    state: dict[str, Any] = {} if weights_only else {"own": _own_state(run, final)}
    if not run.strategy.holds_common(replica):
        return state
    state |= {
        "epoch": view.current_epoch,
        "global_step": view.global_step,
        "state_dict": {} if final and run.strategy.comes_home else run.strategy.module_state(module),
        **module.hyperparameters_to_save(),
    }
    if not weights_only:
        state["optimizer_states"] = [run.strategy.optimizer_state(module, o) for o in view.optimizers]
        state["lr_schedulers"] = [_scheduler_state(c.scheduler) for c in view.lr_scheduler_configs]
        state["precision"] = run.precision.state_dict()
        state["stepped"] = run.stepped
        state["switched"] = run.switched.changes(view.optimizers, view.modes)
        state["worker_callbacks"] = {c.state_key: c.state_dict() for c in run.task.callbacks}
    if run.datamodule is not None:
        if not final:
            state["datamodule"] = run.datamodule.state_dict()
        state |= run.datamodule.hyperparameters_to_save("datamodule_")
    if not final:
        for callback in run.task.callbacks:
            callback.on_save_checkpoint(view, module, state)
        module.on_save_checkpoint(state)
    keep_types(state)
    return run.strategy.own_part(state, replica)


def most_of_state(run: WorkerRun, replica: bool) -> dict[str, Any]:
    """The large tensors of what `capture_state` would return, without calling any hook: also those of callbacks."""
    if not run.strategy.holds_common(replica):
        return {}
    strategy, module = run.strategy, run.module
    states = [strategy.optimizer_state(module, optimizer) for optimizer in run.view.optimizers]
    state = {
        "state_dict": strategy.module_state(module),
        "optimizer_states": states,
        "worker_callbacks": {c.state_key: c.state_dict() for c in run.task.callbacks},
    }
    return strategy.own_part(state, replica)


def _own_state(run: WorkerRun, final: bool) -> dict[str, Any]:
    """What this worker alone has: generators, sums of the epoch's metrics, and gradients while accumulating."""
    own: dict[str, Any] = {"rng": capture_rng() if run.rng is None else run.rng, "metrics": run.view.metrics.sums()}
    own["evaluated"], own["stepped_epoch"] = dict(run.evaluated), run.stepped_epoch
    own["metric_objects"] = states_of(run.module)
    own["loaders"] = run.data.states()
    if run.accumulating:
        own["gradients"] = run.strategy.accumulated(run.module)
    tensors = run.strategy.own_tensors(run.module)
    if tensors:
        own["tensors"] = tensors
    if run.attributes is not None and not final:
        own[IN_MEMORY] = {**run.attributes.take(run.module), "switched": run.switched.flags(run.view.modes)}
        own[IN_MEMORY]["epoch_began"] = run.epoch_began
    return own


def restore_state(run: WorkerRun, checkpoint: dict[str, Any]) -> None:
    """The reverse of `capture_state`, on every rank; `checkpoint["own"]` is a list by rank.

    With another number of workers than the checkpoint was made with, or other parts of the data, each worker's own
    streams begin anew (those of all workers together go on), and what has been summed up of an epoch is handed on.

    Raises:
        CheckpointError: The checkpoint does not fit the module or its optimizers.
    """
    view, module = run.view, run.module
    checkpoint = run.strategy.take_up(checkpoint)
    module.on_load_checkpoint(checkpoint)
    run.strategy.load_module(module, checkpoint["state_dict"], module.strict_loading)
    if run.datamodule is not None:
        # Lightning has it under the class's name
        own = checkpoint.get(type(run.datamodule).__qualname__) if "made_by" in checkpoint else None
        run.datamodule.load_state_dict(checkpoint.get("datamodule") or own or {})
    run.configure()
    if run.task.stage != "fit" or "optimizer_states" not in checkpoint:
        return
    for callback in run.task.callbacks:
        callback.on_load_checkpoint(view, module, checkpoint)
    run.switched.take_up(checkpoint.get("switched") or {}, view.optimizers, view.lr_scheduler_configs)
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
    run.precision.load_state_dict(checkpoint.get("precision") or {})
    _restore_parts(run, checkpoint)
    view.global_step, view.current_epoch = checkpoint["global_step"], checkpoint["epoch"]
    run.stepped = checkpoint.get("stepped", checkpoint["global_step"])
    by_rank = checkpoint.get("own") or []
    run.stepped_epoch = by_rank[0].get("stepped_epoch", -1) if by_rank else -1
    as_before = checkpoint.get("parts") in (None, run.strategy.share.count)
    if as_before and len(by_rank) == view.ranks.world_size:
        _restore_own(run, by_rank[view.ranks.rank])
    elif by_rank:
        # the state dict may have those of one worker; where each has a part of the data, as before, sums are handed on
        rank, size = view.ranks.rank, view.ranks.world_size
        alone = checkpoint.get("parts") in (None, len(by_rank)) and run.strategy.share.count == size
        theirs = by_rank[rank::size] if alone else []
        loaders = zip(*(own.get("loaders") or [] for own in by_rank), strict=False)
        run.data.take_states([of_all_workers(states) for states in loaders])
        load_states(module, theirs[0].get("metric_objects") or {} if theirs else {})
        if len(theirs) > 1 and any(own.get("metric_objects") for own in theirs[1:]):
            log.warning(
                "%d workers go on with an epoch of %d: metric objects of it lack what some of them had seen.", size,
                len(by_rank),
            )  # fmt: skip
        view.metrics.take_sums(joined_sums([own["metrics"] for own in theirs]))
    if by_rank and IN_MEMORY in by_rank[0] and run.attributes is not None:
        of_rank = by_rank[view.ranks.rank if view.ranks.rank < len(by_rank) else 0]
        run.put_back = lambda: _put_back(run, checkpoint, of_rank)
        run.epoch_began = of_rank[IN_MEMORY]["epoch_began"]


def begin_epoch(run: WorkerRun, skip: int, resumed: bool) -> None:
    """Call the hooks that begin an epoch; see `TrainingLoop.start_epoch`.

    Where a run goes on after a loss, within an epoch, they are called anew, and what they change is put back. Where it
    goes on between two epochs they are called as ever, on what is put back.
    """
    if not run.epoch_began:
        run.go_on()
        if skip == 0:
            run.resume_generators()
    if not resumed:
        run.hooks.call("on_train_epoch_start")
    run.go_on()
    run.resume_generators()
    run.epoch_began = True


def _restore_parts(run: WorkerRun, checkpoint: dict[str, Any]) -> None:
    """Optimizers, schedulers and callbacks."""
    view = run.view
    held, weights = run.strategy.module_state(run.module), checkpoint["state_dict"].items()
    as_saved = all(held[name].dtype == value.dtype for name, value in weights if _is_typed(held.get(name), value))
    for optimizer, state in zip(view.optimizers, checkpoint["optimizer_states"], strict=True):
        run.strategy.load_optimizer(run.module, optimizer, copy.deepcopy(state), as_saved)
    for config, state in zip(view.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True):
        config.scheduler.load_state_dict(copy.deepcopy(state))
    saved_callbacks = checkpoint.get("worker_callbacks") or {}
    for callback in run.task.callbacks:
        if callback.state_key in saved_callbacks:
            callback.load_state_dict(copy.deepcopy(saved_callbacks[callback.state_key]))


def _put_back(run: WorkerRun, checkpoint: dict[str, Any], own: dict[str, Any]) -> None:
    """What hooks may have changed that begin a run, and are called anew where it goes on after a loss."""
    run.strategy.load_module(run.module, checkpoint["state_dict"], run.module.strict_loading)
    for callback in run.task.callbacks:  # which may have others in store: those that an average was saved in place of
        callback.on_load_checkpoint(run.view, run.module, checkpoint)
    _restore_tensors(run, own)
    _restore_parts(run, checkpoint)
    assert run.attributes is not None
    run.switched.put_back(*own[IN_MEMORY]["switched"])
    run.attributes.put_back(run.module, own[IN_MEMORY])


def _restore_tensors(run: WorkerRun, own: dict[str, Any]) -> None:
    with torch.no_grad():
        live = run.strategy.own_tensors(run.module)
        for name, value in (own.get("tensors") or {}).items():
            if name in live:
                live[name].copy_(value)


def _is_typed(*values: Any) -> bool:
    return all(isinstance(getattr(value, "dtype", None), torch.dtype) for value in values)


def _restore_own(run: WorkerRun, own: dict[str, Any]) -> None:
    run.rng = own["rng"]
    run.evaluated.update(own["evaluated"])
    load_states(run.module, own.get("metric_objects") or {})
    run.data.take_states(own.get("loaders") or [])
    run.view.metrics.take_sums(own["metrics"])
    gradients = own.get("gradients") or {}
    run.strategy.put_accumulated(run.module, gradients)
    _restore_tensors(run, own)
    run.accumulating = bool(gradients)


def _scheduler_state(scheduler: Any) -> dict[str, Any]:
    state: dict[str, Any] = scheduler.state_dict() or {}
    # some torch schedulers put callables there, which a checkpoint must not hold
    return {name: value for name, value in state.items() if not callable(value)}
