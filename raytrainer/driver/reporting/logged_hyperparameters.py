"""The hyperparameters of module and DataModule that loggers are given."""

from __future__ import annotations

from typing import Any

from raytrainer.errors import ConfigurationError
from raytrainer.init_calls import same_value
from raytrainer.task import Task

__all__ = ["logged_hyperparameters"]


def logged_hyperparameters(task: Task) -> dict[str, Any]:
    """Those of both, by name; none where the run is no `fit`.

    Raises:
        ConfigurationError: Both have one of the same name, and these are not equal.
    """
    if task.stage != "fit":
        return {}
    theirs, ours = ({} if owner is None else _logged(owner) for owner in (task.datamodule, task.module))
    for name in theirs.keys() & ours.keys():
        if not same_value(theirs[name], ours[name]):
            raise ConfigurationError(
                f"hyperparameter {name}: {ours[name]!r} in {type(task.module).__name__}, {theirs[name]!r} in "
                f"{type(task.datamodule).__name__}: loggers could show only one. Make them equal, rename one, "
                f"or call save_hyperparameters(logger=False) in one of both."
            )
    return {**theirs, **ours}


def _logged(owner: Any) -> dict[str, Any]:
    values: dict[str, Any] = owner.hparams_initial if owner.__dict__.get("_log_hyperparams") else {}
    return values
