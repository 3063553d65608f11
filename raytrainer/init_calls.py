"""With what `__init__` was called, found on the stack; and calling it so again."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from raytrainer.errors import ConfigurationError

__all__ = ["InitCall", "NotRestored", "Origin", "construct", "find_call", "same_value"]

log = logging.getLogger("raytrainer")


@dataclass(frozen=True)
class NotRestored:
    """Stands for a hyperparameter that a checkpoint has no value for.

    Attributes:
        why: What it was, or what is in the way.
    """

    why: str


@dataclass
class InitCall:
    """The `__init__`s of one object that are on the stack.

    Attributes:
        arguments: By name, of all of them; a subclass's value wins over its base's. What `**kwargs` took is there by
            its own names, what `*args` took as a tuple.
        found: Whether there is one at all.
        positional: The name of the outermost one's `*args`, if there were any.
        keywords: Names that the outermost one's `**kwargs` took.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    found: bool = False
    positional: str | None = None
    keywords: list[str] = field(default_factory=list)

    def name_of(self, value: Any) -> str | None:
        """The argument that `value` is, or whose attributes it is (`vars(args)`)."""
        for name, argument in self.arguments.items():
            if argument is value or getattr(argument, "__dict__", None) is value:
                return name
        return next((name for name, argument in self.arguments.items() if same_value(argument, value)), None)


def same_value(one: Any, other: Any) -> bool:
    """Whether both are equal, and of one type; arrays and tensors element by element."""
    if type(one) is not type(other):
        return False
    try:
        equal = one == other
        return bool(equal.all() if hasattr(equal, "all") else equal)
    except Exception:  # of other shapes, or whatever the class makes of it
        return False


def find_call(frame: FrameType | None, owner: object) -> InitCall:
    """The call that made `owner`, seen from its `__init__`, its `__post_init__`, or what these have called."""
    call = InitCall()
    while frame is not None:
        if frame.f_code.co_name == "__init__" and _is_own(frame, owner):
            _add(call, frame, owner)
        frame = frame.f_back
    return call


def _is_own(frame: FrameType, owner: object) -> bool:
    code = frame.f_code
    return code.co_argcount > 0 and frame.f_locals.get(code.co_varnames[0]) is owner


def _add(call: InitCall, frame: FrameType, owner: Any) -> None:
    code, values = frame.f_code, frame.f_locals
    named = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    rest = iter(code.co_varnames[code.co_argcount + code.co_kwonlyargcount :])
    positional = next(rest) if code.co_flags & inspect.CO_VARARGS else None
    keywords = next(rest) if code.co_flags & inspect.CO_VARKEYWORDS else None
    # the __init__ that dataclasses write has a mark of its own for defaults that it makes
    fields = {f.name for f in dataclasses.fields(owner)} if _written_by_dataclasses(frame, owner) else set()
    arguments = {n: getattr(owner, n) if n in fields and hasattr(owner, n) else values[n] for n in named if n in values}
    more = dict(values.get(keywords or "") or {})
    both = sorted(set(arguments) & set(more))
    if both:
        raise ConfigurationError(f"{type(owner).__name__}.__init__ was given {both} by position and again by name.")
    taken = tuple(values.get(positional or "") or ())
    call.arguments.update(arguments | more | ({positional: taken} if positional is not None and taken else {}))
    call.found, call.positional, call.keywords = True, positional if taken else None, list(more)


def _written_by_dataclasses(frame: FrameType, owner: Any) -> bool:
    return dataclasses.is_dataclass(owner) and frame.f_code.co_filename == "<string>"


@dataclass
class Origin:
    """How `__init__` takes what has been saved.

    Attributes:
        argument: The name of the one argument that was saved item by item; None: they are arguments themselves.
        given: That argument.
        names: Its items.
        positional: The name of `*args`, if there were any.
        keywords: What `**kwargs` took beside them.
    """

    argument: str | None = None
    given: Any = None
    names: list[str] = field(default_factory=list)
    positional: str | None = None
    keywords: list[str] = field(default_factory=list)

    def take(self, argument: str | None, given: Any, names: list[str]) -> None:
        """One argument has been saved item by item."""
        if argument is not None:
            self.argument, self.given, self.names = argument, given, names

    def leave(self, names: Iterable[str]) -> None:
        """These have been saved as arguments of their own."""
        own = set(names)
        self.names = [name for name in self.names if name not in own]
        if self.argument in own:
            self.argument, self.given, self.names = None, None, []

    def entry(self, hparams: Mapping[str, Any]) -> dict[str, Any]:
        """For a checkpoint: the one argument has the values that its items have now."""
        entry: dict[str, Any] = {"positional": self.positional, "keywords": self.keywords}
        if self.argument is None:
            return entry
        now = {name: hparams[name] for name in self.names if name in hparams}
        return entry | {"argument": self.argument, "names": self.names, "given": with_items(self.given, now)}


def with_items(given: Any, items: Mapping[str, Any]) -> Any:
    """A mapping, Namespace or object like `given`, with these items."""
    if isinstance(given, dict):
        made = copy.copy(given)
        made.clear()
        made.update(items)
        return made
    if isinstance(given, Namespace):
        return type(given)(**items)
    made = copy.copy(given)
    for name, item in items.items():
        if isinstance(made, Mapping):
            if made[name] is not item and not same_value(made[name], item):
                made[name] = item  # type: ignore[index]  # a DictConfig
        elif getattr(made, name, None) is not item:
            object.__setattr__(made, name, item)
    return made


# ---------------------------------------------------------------- once more


def construct(cls: type[Any], saved: Mapping[str, Any], origin: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """Construct `cls` as it was when `saved` and `origin` were, but for `overrides`.

    Raises:
        ConfigurationError: An argument has no value, or no name.
    """
    if odd := [name for name in saved if not isinstance(name, str)]:
        raise ConfigurationError(f"{cls.__name__}: {odd[0]!r} among its hyperparameters is no name of an argument.")
    parameters = _parameters(cls)
    taken = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    values = dict(saved)
    argument: str | None = origin.get("argument")
    if argument is not None and argument in taken:
        values = {name: value for name, value in values.items() if name not in origin["names"]}
        values[argument] = origin["given"]
    values, more = _overridden(cls, values, overrides, taken, takes_any, argument)
    starred = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    by_position: list[Any] = []
    spread = values.pop(starred, ()) if starred is not None and starred == origin.get("positional") else ()
    if spread:  # what came by position went on to bases, whose names must not come again
        values = {n: v for n, v in values.items() if n in taken or n in origin["keywords"] or n in overrides}
    chosen = {name: value for name, value in values.items() if name in taken or takes_any}
    _refuse_missing(cls, chosen | ({starred: spread} if starred else {}), taken, saved)
    for p in taken.values():
        if p.kind is p.POSITIONAL_ONLY or (spread and p.kind is p.POSITIONAL_OR_KEYWORD):
            by_position.append(chosen.pop(p.name, p.default))
    return cls(*by_position, *spread, **chosen, **more)


def _parameters(cls: type[Any]) -> list[inspect.Parameter]:
    own = cls.__init__
    if own is object.__init__ or (getattr(own, "__module__", None) or "").startswith("raytrainer."):
        return []  # no __init__ of the user's
    return list(inspect.signature(own).parameters.values())[1:]


def _overridden(
    cls: type[Any],
    values: dict[str, Any],
    overrides: Mapping[str, Any],
    taken: Mapping[str, Any],
    takes_any: bool,
    argument: str | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Saved values with overrides in place; and overrides that only `**kwargs` can take."""
    foreign = {name: value for name, value in overrides.items() if name not in taken}
    values = values | {name: value for name, value in overrides.items() if name in taken}
    if takes_any:
        return {n: v for n, v in values.items() if n not in foreign}, foreign
    own = argument in taken and argument not in overrides
    if argument is not None and own and not isinstance(values[argument], NotRestored):
        given = values[argument]
        items = dict(given) if isinstance(given, Mapping) else dict(vars(given))
        values[argument] = with_items(given, items | foreign)
    elif foreign:
        log.warning(
            "load_from_checkpoint: %s.__init__ takes no %s; left out. It takes %s.",
            cls.__name__, ", ".join(sorted(foreign)), ", ".join(taken) or "nothing",
        )  # fmt: skip
    return values, {}


def _refuse_missing(
    cls: type[Any], values: Mapping[str, Any], taken: Mapping[str, inspect.Parameter], saved: Mapping[str, Any]
) -> None:
    lost = {name: value.why for name, value in values.items() if isinstance(value, NotRestored)}
    if lost:
        told = "; ".join(f"{name}: {why}" for name, why in lost.items())
        raise ConfigurationError(
            f"{cls.__name__} was made with hyperparameters that the checkpoint cannot give back. {told}. Pass them: "
            f"load_from_checkpoint(..., {', '.join(f'{name}=...' for name in lost)})."
        )
    required = [name for name, p in taken.items() if p.default is p.empty and name not in values]
    if required:
        raise ConfigurationError(
            f"{cls.__name__} needs {required}, which the checkpoint's hyperparameters {sorted(saved)} do not hold; "
            f"pass them to load_from_checkpoint(...), or call self.save_hyperparameters() in __init__."
        )
