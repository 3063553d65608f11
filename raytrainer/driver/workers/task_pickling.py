"""A task on its way to other processes, and what is said where something in it cannot be sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import ray
from ray import cloudpickle

from raytrainer.checkpointing.piece_files import brought_along
from raytrainer.driver.cluster.inherited import changed_environment
from raytrainer.errors import SerializationError
from raytrainer.task import Task
from raytrainer.tensor_packing import pack
from raytrainer.worker.actor.module_pickling import Pickled, dumps
from raytrainer.worker.actor.surroundings import Surroundings
from raytrainer.worker.verbs import Verb

__all__ = ["Told", "asked", "pickle_task", "shared"]

#: A verb, with its args and kwargs.
Told: TypeAlias = tuple[Verb, Sequence[Any], Mapping[str, Any]]

#: Bytes of a verb's arguments, from which on they go through Ray's object store: once a node.
LARGE = 2**16


def shared(args: Sequence[Any], hosts: Sequence[str]) -> list[Any]:
    """Large arguments, which are sent once for all workers of these hosts."""
    return [ray.put(pack(brought_along(value, hosts))) for value in args]


def asked(
    actors: Sequence[Any], before: Sequence[Told], verb: Verb, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Any]:
    """Have workers obey verbs, the last of which answers, pickled once for all of them; references to the answers."""
    if not before and verb.shares:
        return [actor.obey.remote(verb.name, *args, **kwargs) for actor in actors]
    packed = cloudpickle.dumps([(each.name, *given) for each, *given in (*before, (verb, args, kwargs))])
    sent = ray.put(packed) if len(packed) > LARGE else packed
    return [actor.obey_packed.remote(sent) for actor in actors]


def pickle_task(task: Task) -> Pickled:
    """The task, pickled by value where workers could not import it, and what they take over of this process.

    Raises:
        SerializationError: Names the attribute that cannot be pickled.
    """
    try:
        return Pickled(dumps(task), Surroundings.of_this_process(changed_environment()))
    except Exception as error:
        culprit = _unpicklable(task)
        if ".hparams." in culprit:
            remedy = "Leave it out of the hyperparameters: save_hyperparameters(ignore=[...])."
        else:
            remedy = (
                "Create it in setup(stage), which runs in each worker, or leave it out of pickling with __getstate__."
            )
        raise SerializationError(
            f"{culprit} cannot be sent to the workers: {type(error).__name__}: {error}. {remedy}"
        ) from None


def _unpicklable(task: Task) -> str:
    """The innermost attribute that cannot be pickled, as a path such as "MyModule.reader.handle"."""
    roots = {"module": task.module, "datamodule": task.datamodule, "loader": task.loaders, "callback": task.callbacks}
    for name, root in roots.items():
        if _fails(root):
            path, value = type(root).__name__ if name in ("module", "datamodule") else name, root
            for _ in range(8):
                inner = next(((n, v) for n, v in _children(value) if _fails(v)), None)
                if inner is None:
                    break
                path, value = f"{path}.{inner[0]}", inner[1]
            return f"{path} (a {type(value).__name__})"
    return "the task"


def _children(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(str(k), v) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [(str(i), v) for i, v in enumerate(value)]
    try:
        state = value.__getstate__()
    except Exception:  # which is why it cannot be pickled
        return []
    attributes = dict(state) if isinstance(state, dict) else {}
    modules = attributes.pop("_modules", None) or {}
    # last, so that what is an attribute too is named as that
    saved = [("hparams", attributes.pop(name)) for name in ("_hparams", "_hparams_initial") if name in attributes]
    return [*attributes.items(), *modules.items(), *saved]


def _fails(value: Any) -> bool:
    try:
        dumps(value)
    except Exception:
        return True
    return False
