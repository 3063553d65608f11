"""Metrics, hyperparameters and pictures for Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrainer.errors import ConfigurationError
from raytrainer.extras import not_installed
from raytrainer.loggers.logger import Logger, as_mapping
from raytrainer.loggers.media import as_captions, as_images, as_values
from raytrainer.plan.uris import absolute

if TYPE_CHECKING:
    from wandb import Run

__all__ = ["WandbLogger"]

#: The step axis of all charts: W&B's own count must never go back, optimizer steps may (in an earlier epoch's picture).
STEP = "trainer/global_step"


class WandbLogger(Logger):
    """Gives everything to one run of Weights & Biases, which is made when something is logged.

    Where a run of W&B is active already (in a sweep, say) that one is used, and left open. A second `fit` goes on in
    the same run. The step axis is "trainer/global_step".

    Args:
        project: The project; None: W&B's default.
        name: What the run is called; None: W&B invents a name.
        save_dir: Local folder for W&B's files.
        id: Id of the run; an existing one is continued.
        mode: "online", "offline" (upload later: `wandb sync`) or "disabled"; None: WANDB_MODE, or "online".
        prefix: Put before every metric's name, with a "-".
        **options: Further arguments of `wandb.init`, such as `group`, `tags` and `entity`.

    Raises:
        ConfigurationError: wandb is not installed, or another `mode`.
    """

    def __init__(
        self,
        project: str | None = None,
        name: str | None = None,
        save_dir: str | Path = ".",
        id: str | None = None,
        mode: str | None = None,
        prefix: str = "",
        **options: Any,
    ) -> None:
        _wandb()
        if mode not in (None, "online", "offline", "disabled"):
            raise ConfigurationError(f'WandbLogger(mode={mode!r}): give "online", "offline", "disabled" or None.')
        self._save_dir = absolute(os.fspath(save_dir))
        self._options = {"project": project, "name": name, "id": id, "mode": mode, **options}
        self._prefix = f"{prefix}-" if prefix else ""
        self._run: Run | None = None
        self._own = False  # whether the run is ours to end
        self._step = 0

    @property
    def experiment(self) -> Run:
        """The run of W&B, for what else it can do. Made, or opened again, when it is asked for."""
        if self._run is None:
            wandb = _wandb()
            self._own = wandb.run is None
            if self._own:
                os.makedirs(self._save_dir, exist_ok=True)
                again = {"resume": "allow"} if self._options["id"] is not None else {}
                self._run = wandb.init(**{"dir": self._save_dir, "reinit": "create_new", **again, **self._options})
                self._options["id"] = self._run.id
            else:
                self._run = wandb.run
            self._run.define_metric(STEP, hidden=True)
            self._run.define_metric("*", step_metric=STEP, step_sync=True)
        return self._run

    @property
    def name(self) -> str | None:
        """Name of the project."""
        project: str | None = self._options["project"]
        return project

    @property
    def version(self) -> str | None:
        """W&B's id of the run; None before there is one."""
        version: str | None = self._options["id"]
        return version

    @property
    def root_dir(self) -> str:
        """`save_dir`."""
        return self._save_dir

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log values."""
        self._step = self._step if step is None else step
        self.experiment.log({**{self._prefix + name: value for name, value in metrics.items()}, STEP: self._step})

    def log_hyperparams(self, params: Any) -> None:
        """Put hyperparameters into the run's config."""
        self.experiment.config.update(as_mapping(params), allow_val_change=True)

    def log_image(self, key: str, images: Any, step: int | None = None, caption: Any = None) -> None:
        """Log pictures, with captions."""
        arrays = as_images(images)
        captions = as_captions(caption, len(arrays))
        image = _wandb().Image
        self._log(key, [image(array, caption=text) for array, text in zip(arrays, captions, strict=True)], step)

    def log_histogram(self, key: str, values: Any, step: int | None = None) -> None:
        """Log a histogram."""
        self._log(key, _wandb().Histogram(as_values(values)), step)

    def log_text(self, key: str, text: str, step: int | None = None) -> None:
        """Log a text, as a table of one cell."""
        self._log(key, _wandb().Table(columns=["text"], data=[[text]]), step)

    def _log(self, key: str, value: Any, step: int | None) -> None:
        self.experiment.log({self._prefix + key: value, STEP: self._step if step is None else step})

    def finalize(self, status: str) -> None:
        """End the run, unless it was active before; the next call goes on with it."""
        if self._run is not None and self._own:
            self._run.finish(exit_code=0 if status == "success" else 1)
        self._run = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}


def _wandb() -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise not_installed("WandbLogger", "wandb", "wandb", "use CSVLogger") from error
    return wandb
