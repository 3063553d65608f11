"""`save_hyperparameters` and `hparams`, shared by Module and DataModule."""

from __future__ import annotations

import copy
import inspect
import logging
from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from raytrainer.errors import ConfigurationError
from raytrainer.init_calls import Origin, find_call

__all__ = ["HYPERPARAMETERS", "AttributeDict", "HyperparametersMixin", "keep_types", "kept"]

log = logging.getLogger("raytrainer")


#: Entries of a checkpoint whose values keep their types.
HYPERPARAMETERS = tuple(
    f"{prefix}hyper_parameters{suffix}" for prefix in ("", "datamodule_") for suffix in ("", "_origin")
)


@dataclass
class _Kept:
    """What copying and packing of states take for one value, and so leave as it is."""

    values: dict[str, Any]


def keep_types(state: dict[str, Any]) -> None:
    """Have the hyperparameters in a state leave a worker as what they are."""
    for name in HYPERPARAMETERS:
        if name in state:
            values = {key: value.cpu() if hasattr(value, "is_cuda") else value for key, value in state[name].items()}
            state[name] = _Kept(_copy(values))


def kept(state: dict[str, Any]) -> dict[str, Any]:
    """The state as it was before `keep_types`."""
    return {name: value.values if isinstance(value, _Kept) else value for name, value in state.items()}


class AttributeDict(dict[str, Any]):
    """A dict whose items are attributes too: `hparams["lr"]` is `hparams.lr`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyperparameter {name!r}; there are {sorted(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(name) from None


class HyperparametersMixin:
    """Remembers what an object was constructed with."""

    _hparams: AttributeDict
    _hparams_initial: AttributeDict
    _hparams_origin: Origin
    _log_hyperparams: bool

    @property
    def hparams(self) -> AttributeDict:
        """The saved hyperparameters; change them freely, e.g. `self.hparams.lr = 0.1`."""
        if "_hparams" not in self.__dict__:
            self.__dict__["_hparams"] = AttributeDict()
        found: AttributeDict = self.__dict__["_hparams"]
        return found

    @property
    def hparams_initial(self) -> AttributeDict:
        """A copy of the hyperparameters as they were when saved."""
        saved: AttributeDict = self.__dict__.get("_hparams_initial", AttributeDict())
        return AttributeDict(_copy(saved))

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: str | Collection[str] | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Remember the arguments of `__init__` in `self.hparams` and in checkpoints.

        Args:
            args: Names of the arguments to save (default: all), or one mapping, Namespace or object to save instead. If
                that is an argument of `__init__`, `load_from_checkpoint` gives it again, as what it was.
            ignore: Names to leave out, e.g. of submodules passed in; also what a base class has saved of that name.
            frame: The frame of `__init__`, or of what it has called; default: the caller's.
            logger: Whether the loggers are given the hyperparameters at the start of `fit`.

        Raises:
            ConfigurationError: There are no such arguments.
        """
        if frame is None:
            current = inspect.currentframe()
            frame = current.f_back if current else None
        call = find_call(frame, self)
        origin: Origin = self.__dict__.setdefault("_hparams_origin", Origin())
        if len(args) == 1 and not isinstance(args[0], str):
            values = _as_mapping(args[0])
            origin.take(name := call.name_of(args[0]), call.arguments.get(name or ""), list(values))
        elif args:
            missing = [name for name in args if not isinstance(name, str) or name not in call.arguments]
            if missing:
                raise ConfigurationError(
                    f"save_hyperparameters({', '.join(map(repr, args))}): {missing} are not arguments of "
                    f"{type(self).__name__}.__init__, which has {sorted(call.arguments)}."
                )
            values = {name: call.arguments[name] for name in args}
            origin.leave(values)
        else:
            if not call.found:
                log.warning(
                    "%s: save_hyperparameters() finds no arguments outside of __init__; nothing is saved.",
                    type(self).__name__,
                )
            values = call.arguments
            origin.leave(values)
        left_out = {ignore} if isinstance(ignore, str) else set(ignore or ())
        self.hparams.update(values)
        for name in left_out:
            self.hparams.pop(name, None)
        origin.positional, origin.keywords = call.positional, call.keywords
        self.__dict__["_hparams_initial"] = AttributeDict(_copy(self.hparams))
        self.__dict__["_log_hyperparams"] = logger

    def hyperparameters_to_save(self, prefix: str = "") -> dict[str, Any]:
        """Entries of a checkpoint: the hyperparameters, and how `__init__` takes them.

        Args:
            prefix: Of the entries' names.
        """
        origin: Origin = self.__dict__.get("_hparams_origin") or Origin()
        return {
            f"{prefix}hyper_parameters": dict(self.hparams),
            f"{prefix}hyper_parameters_origin": origin.entry(self.hparams),
        }


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    copied = {}
    for name, value in values.items():
        try:
            copied[name] = copy.deepcopy(value)
        except Exception:  # an open file, a lock: keep the object itself
            copied[name] = value
    return copied


def _as_mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Namespace) or hasattr(value, "__dict__"):
        return dict(vars(value))
    raise ConfigurationError(f"save_hyperparameters({value!r}): give names, a mapping or a Namespace.")
