"""`save_hyperparameters` and `hparams`, shared by Module and DataModule."""

from __future__ import annotations

import copy
import inspect
from argparse import Namespace
from collections.abc import Mapping
from types import FrameType
from typing import Any

from raytrainer.errors import ConfigurationError

__all__ = ["AttributeDict", "HyperparametersMixin", "construct"]


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
        ignore: str | list[str] | tuple[str, ...] | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Remember the arguments of `__init__` in `self.hparams` and in checkpoints.

        Args:
            args: Names of the arguments to save (default: all), or one mapping, Namespace or object to save instead.
            ignore: Names to leave out, e.g. of submodules passed in.
            frame: The frame of `__init__`; default: the caller's.
            logger: Whether the loggers are given the hyperparameters at the start of `fit`.
        """
        if frame is None:
            current = inspect.currentframe()
            frame = current.f_back if current else None
        given = _init_arguments(frame, self) if frame is not None else {}
        if len(args) == 1 and not isinstance(args[0], str):
            values = _as_mapping(args[0])
        elif args:
            missing = [name for name in args if name not in given]
            if missing:
                raise ConfigurationError(
                    f"save_hyperparameters({', '.join(map(repr, args))}): {missing} are not arguments of "
                    f"{type(self).__name__}.__init__, which has {sorted(given)}."
                )
            values = {name: given[name] for name in args}
        else:
            values = given
        left_out = {ignore} if isinstance(ignore, str) else set(ignore or ())
        self.hparams.update({name: value for name, value in values.items() if name not in left_out})
        self.__dict__["_hparams_initial"] = AttributeDict(_copy(self.hparams))
        self.__dict__["_log_hyperparams"] = logger


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


def _init_arguments(frame: FrameType, owner: object) -> dict[str, Any]:
    """Arguments of every `__init__` of `owner` on the stack; a subclass's value wins over its base's."""
    values: dict[str, Any] = {}
    current: FrameType | None = frame
    while current is not None and current.f_code.co_name == "__init__":
        info = inspect.getargvalues(current)
        if not info.args or info.locals.get(info.args[0]) is not owner:
            break
        names = [name for name in info.args[1:] if name in info.locals]
        code = current.f_code
        keyword_only = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
        values.update({name: info.locals[name] for name in (*names, *keyword_only) if name in info.locals})
        if info.keywords and info.keywords in info.locals:
            values.update(info.locals[info.keywords])
        current = current.f_back
    values.pop("__class__", None)
    return values


def construct(cls: type[Any], saved: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """Construct `cls` from saved hyperparameters and overrides, giving it those that its `__init__` names."""
    parameters = inspect.signature(cls.__init__).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    arguments = {name: value for name, value in saved.items() if takes_any or name in parameters}
    arguments.update(overrides)
    required = [
        name
        for name, p in list(parameters.items())[1:]
        if p.default is inspect.Parameter.empty
        and p.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and name not in arguments
    ]
    if required:
        raise ConfigurationError(
            f"{cls.__name__} needs {required}, which the checkpoint's hyperparameters {sorted(saved)} do not hold; "
            f"pass them to load_from_checkpoint(...), or call self.save_hyperparameters() in __init__."
        )
    return cls(**arguments)
