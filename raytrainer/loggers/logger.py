"""What every logger offers, and what they share."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from raytrainer.errors import ConfigurationError
from raytrainer.loggers.media import draw
from raytrainer.plan.uris import absolute
from raytrainer.short_repr import ShortRepr

__all__ = ["DirectoryLogger", "Logger", "as_mapping", "displayable", "first_log_dir", "flatten"]


class Logger(ShortRepr, ABC):
    """Takes the metrics and hyperparameters of a run. Lives on the driver, and lasts over several runs."""

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Take values by name; `step` is the number of optimizer steps done. None: the step last given, 0 at first."""

    @abstractmethod
    def log_hyperparams(self, params: Any) -> None:
        """Take hyperparameters: a mapping, a Namespace or a dataclass, nested ones included."""

    def log_image(self, key: str, images: Any, step: int | None = None, caption: Any = None) -> None:
        """Take pictures; loggers that cannot store them leave this as it is, and nothing happens.

        Args:
            key: Their name.
            images: One picture or a list or batch of them; see `raytrainer.loggers.media.as_images`.
            step: As for `log_metrics`.
            caption: Text below the picture; a list of one for each.
        """
        return None

    def log_figure(self, key: str, figure: Any, step: int | None = None) -> None:
        """Take a matplotlib figure. It is drawn and given to `log_image`; from a worker it comes drawn already."""
        self.log_image(key, draw(figure), step)

    def log_histogram(self, key: str, values: Any, step: int | None = None) -> None:
        """Take the distribution of numbers: a tensor, an array or a list of any shape."""
        return None

    def log_text(self, key: str, text: str, step: int | None = None) -> None:
        """Take a text."""
        return None

    def supports(self, name: str) -> bool:
        """Whether the method `name` does something: "log_image", say, or one that only this class has."""
        if name == "log_figure" and type(self).log_figure is Logger.log_figure:
            name = "log_image"
        own = getattr(type(self), name, None)
        optional = name in ("log_figure", "log_histogram", "log_image", "log_text")
        return callable(own) and not (optional and own is getattr(Logger, name))

    def log_rows(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Take several (step, values) at once; called about once a second while training."""
        for step, metrics in rows:
            self.log_metrics(metrics, step)

    def save(self) -> None:
        """Make everything that was logged readable by others."""
        return None

    def finalize(self, status: str) -> None:
        """End of a run; `status` is "success", "failed" or "interrupted". More runs may follow."""
        self.save()

    @property
    def name(self) -> str | None:
        """Name of the experiment."""
        return None

    @property
    def version(self) -> int | str | None:
        """What tells runs of one name apart."""
        return None

    @property
    def root_dir(self) -> str | None:
        """Folder of all versions."""
        return self.log_dir

    @property
    def log_dir(self) -> str | None:
        """Folder of this version; None for a logger that writes no files."""
        return None


class DirectoryLogger(Logger):
    """A logger that writes to `<save_dir>/<name>/version_<n>`.

    Args:
        save_dir: A local folder.
        name: Name of the experiment; "" leaves that level out.
        version: A number gives "version_<n>", a string is taken as it is. None: the next number that is free; its
            folder is made when it is first asked for, so that no other process takes it too.

    Raises:
        ConfigurationError: `save_dir` is a URI.
    """

    def __init__(self, save_dir: str | Path, name: str = "logs", version: int | str | None = None) -> None:
        if "://" in str(save_dir):
            raise ConfigurationError(
                f"{type(self).__name__}(save_dir={str(save_dir)!r}): log files grow while they are read, so they need "
                "a local folder; checkpoints may go to a URI: ModelCheckpoint(dirpath=...)"
            )
        self._save_dir = Path(absolute(os.fspath(save_dir)))
        self._name = name
        self._version = version

    @property
    def name(self) -> str:
        """Name of the experiment."""
        return self._name

    @property
    def version(self) -> int | str:
        """Number or label of this version."""
        if self._version is None:
            self._version = reserve_version(Path(self.root_dir), type(self).__name__)
        return self._version

    @property
    def save_dir(self) -> str:
        """The folder that it was given, as an absolute path."""
        return str(self._save_dir)

    @property
    def root_dir(self) -> str:
        """`<save_dir>/<name>`."""
        return str(self._save_dir / self._name)

    @property
    def log_dir(self) -> str:
        """`<save_dir>/<name>/version_<n>`."""
        version = self.version
        return str(Path(self.root_dir) / (version if isinstance(version, str) else f"version_{version}"))

    def require_writable(self) -> None:
        """Make this version's folder, if need be.

        Raises:
            ConfigurationError: It cannot be made or written to.
        """
        folder = Path(self.log_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError("no permission to write")
        except OSError as error:
            raise unwritable(type(self).__name__, folder, error) from error


def unwritable(whose: str, folder: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"{whose}: {folder} cannot be written to: {error}. Give another folder (save_dir, or the Trainer's "
        f"default_root_dir), or logger=False."
    )


def next_version(root: Path) -> int:
    """One more than the highest n of what is called version_<n> in `root`."""
    if not root.is_dir():
        return 0
    found = (re.fullmatch(r"version_(\d+)", entry.name) for entry in root.iterdir())
    return max((int(match[1]) + 1 for match in found if match), default=0)


def reserve_version(root: Path, whose: str) -> int:
    """Make the folder version_<n> in `root`, where n is one more than the highest there, and return n.

    The folder is made here and now, so that no other process gets the same.

    Raises:
        ConfigurationError: It cannot be made; `whose` it was to be is named.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        version = next_version(root)
        while True:
            try:
                (root / f"version_{version}").mkdir()
            except FileExistsError:  # another process has been faster
                version += 1
            else:
                return version
    except OSError as error:
        raise unwritable(whose, root, error) from error


def as_mapping(params: Any) -> dict[str, Any]:
    """Hyperparameters as a plain dict, one level deep."""
    if isinstance(params, Mapping):
        return {str(key): value for key, value in params.items()}
    if isinstance(params, Namespace):
        return dict(vars(params))
    if is_dataclass(params) and not isinstance(params, type):
        return asdict(params)
    raise ConfigurationError(
        f"hyperparameters are a {type(params).__name__}; give a mapping, a Namespace or a dataclass instance"
    )


def flatten(params: Any, separator: str = "/") -> dict[str, Any]:
    """Nested hyperparameters as one level, the levels' names joined: {"a": {"b": 1}} gives {"a/b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in as_mapping(params).items():
        nested = isinstance(value, (Mapping, Namespace)) or (is_dataclass(value) and not isinstance(value, type))
        if nested and (inner := flatten(value, separator)):
            flat.update({f"{key}{separator}{name}": item for name, item in inner.items()})
        else:
            flat[key] = value
    return flat


def displayable(value: Any) -> bool | int | float | str:
    """A hyperparameter as a boolean, a number or text, which is what services show."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return displayable(value.item())
    return str(value)


def first_log_dir(loggers: Iterable[Logger]) -> str | None:
    """Folder of the first logger that has one."""
    return next((found.log_dir for found in loggers if found.log_dir), None)
