"""What a class or function is called with: names that it does not have, and values of other types than it says.

One place for all that is public: `public.py` has its classes answer, `@answers` is for functions. What types cannot say
(ranges, pairs) each checks itself, and says so first.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from raytrainer.errors import ConfigurationError, RaytrainerError, UnknownArgumentError
from raytrainer.plan.argument_names import may_be_handed_on, unknown_argument
from raytrainer.plan.errors_of_others import advice
from raytrainer.plan.names_elsewhere import of_ray_train
from raytrainer.tracebacks import fold

__all__ = ["answers", "check_types", "constructor_answers", "refuse_unknown", "verb_answers"]

P = ParamSpec("P")
R = TypeVar("R")

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 100

#: How messages call what may be given.
_CALLED: dict[Any, str] = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a text",
    type(None): "None",
    os.PathLike: "a path",
    Mapping: "a dict",
    dict: "a dict",
    Sequence: "a list",
    list: "a list",
    Iterable: "a list",
    tuple: "a tuple",
    Callable: "a function",
}


def constructor_answers(kind: type[Any]) -> None:
    """Have a class answer wrong arguments, whoever calls its `__init__`. Its signature stays as it is."""
    declared = kind.__init__
    if declared is object.__init__:
        return
    known = list(inspect.signature(declared).parameters.values())[1:]
    if {p.kind for p in known} == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return  # it hands on whatever it is given
    answering = _Answering(kind.__name__, declared, known, kind.__doc__)

    @functools.wraps(declared)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        answering.call(functools.partial(declared, self), args, kwargs)

    kind.__init__ = __init__


def answers(function: Callable[P, R]) -> Callable[P, R]:
    """A function that answers wrong arguments."""
    known = list(inspect.signature(function).parameters.values())
    answering = _Answering(function.__name__, function, known, function.__doc__)

    @functools.wraps(function)
    def asked(*args: P.args, **kwargs: P.kwargs) -> R:
        return typing.cast(R, answering.call(function, args, kwargs))

    return asked


def verb_answers(method: Callable[P, R]) -> Callable[P, R]:
    """A method that answers names that it does not have, and errors of others; it sees to its values itself."""
    known = list(inspect.signature(method).parameters.values())[1:]

    @functools.wraps(method)
    def answering(*args: P.args, **kwargs: P.kwargs) -> R:
        takes = f"{method.__name__} takes {', '.join(p.name for p in known)}."
        try:
            refuse_unknown(method.__name__, known, args[1:], kwargs)
            return method(*args, **kwargs)
        except UnknownArgumentError as error:
            error.add_note(takes)
            raise
        except TypeError as error:
            if error.__traceback__ is not None and error.__traceback__.tb_next is None:  # something is missing
                error.add_note(takes)
            elif meant := _meant(error, args[1:]):
                error.add_note(meant)
            raise
        except (RuntimeError, LookupError, AttributeError) as error:
            note = advice(str(error))
            if note and note not in getattr(error, "__notes__", ()):
                error.add_note(note)
            raise

    return answering


def _meant(error: TypeError, owners: Sequence[Any]) -> str:
    """What to say of a call in the user's code with a name that a method of these objects does not have; else ""."""
    found = re.search(r"(\w+)\(\) got an unexpected keyword argument '(\w+)'", str(error))
    method = next((getattr(owner, found[1]) for owner in owners if hasattr(owner, found[1])), None) if found else None
    if found is None or method is None or not method.__module__.startswith("raytrainer."):
        return ""
    parameters = inspect.signature(method).parameters
    return "" if found[2] in parameters else unknown_argument(f"self.{found[1]}", found[2], parameters)


def refuse_unknown(
    owner: str, known: Sequence[inspect.Parameter], args: Sequence[Any], given: Mapping[str, Any]
) -> None:
    """Refuse names that there are not, more values without a name than there may be, and objects of Ray Train's.

    Raises:
        UnknownArgumentError: Says which, and what was probably meant.
        ConfigurationError: What stands for the object here.
    """
    named = [p.name for p in known if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    hands_on = any(p.kind is p.VAR_KEYWORD for p in known)
    for name in given:
        if name not in named and (not hands_on or not may_be_handed_on(owner, name, named)):
            raise UnknownArgumentError(unknown_argument(owner, name, named))
    first = [p.name for p in known if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(args) > len(first) and not any(p.kind is p.VAR_POSITIONAL for p in known):
        extra = list(args)[len(first)]
        without = f"takes {', '.join(first)} without a name" if first else "takes all arguments by name"
        raise UnknownArgumentError(
            f"{owner} {without}, and was given {_SHOWN.repr(extra)}: write name=value.{of_ray_train(extra)}"
            + (f" There are {', '.join(named)}." if len(named) <= 20 and len(named) > len(first) else "")
        )
    for name, value in given.items():
        items = value if isinstance(value, (list, tuple)) else [value]
        for answer in filter(None, map(of_ray_train, items)):
            raise ConfigurationError(f"{owner}({name}={_SHOWN.repr(value)}):{answer}")
    for answer in filter(None, map(of_ray_train, args)):
        raise ConfigurationError(f"{owner}:{answer}")


def check_types(owner: str, function: Callable[..., Any], given: Mapping[str, Any], text: str | None) -> None:
    """Compare values with the types that a function declares for them.

    Raises:
        ConfigurationError: One is of another type; says what is allowed, and what the argument means.
    """
    for name, value in given.items():
        declared = _annotation(function, name)
        if not _fits(value, declared):
            meaning = _meaning(name, text)
            raise ConfigurationError(
                f"{owner}({name}={_SHOWN.repr(value)}): give {_called(declared)}.{meaning and f' {name}: {meaning}'}"
            )


@dataclass(frozen=True)
class _Answering:
    """What answers the wrong arguments of `declared`.

    Attributes:
        owner: Its name in messages.
        declared: What has the annotations.
        known: Its parameters, but for `self`.
        text: The docstring that says what they mean.
    """

    owner: str
    declared: Callable[..., Any]
    known: Sequence[inspect.Parameter]
    text: str | None

    def call(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What `function` returns; RaytrainerErrors come without the frames of this package."""
        try:
            refuse_unknown(self.owner, self.known, args, kwargs)
            given = {
                p.name: value for p, value in zip(self.known, args, strict=False) if p.kind is not p.VAR_POSITIONAL
            }
            given |= {p.name: kwargs[p.name] for p in self.known if p.name in kwargs}
            try:
                result = function(*args, **kwargs)
            except RaytrainerError:
                raise  # it knows better what is allowed
            except Exception as error:
                for name in _missing(error):
                    error.add_note(f"{name}: {_meaning(name, self.text)}")
                try:
                    check_types(self.owner, self.declared, given, self.text)
                except ConfigurationError as wrong:
                    raise wrong from None  # what came of it says less
                raise
            check_types(self.owner, self.declared, given, self.text)
        except RaytrainerError as error:
            fold(error)
            raise
        return result


def _missing(error: Exception) -> list[str]:
    """The arguments that a call lacked, where this is what Python says of that."""
    found = re.search(r"missing \d+ required (?:positional|keyword-only) arguments?: (.*)", str(error))
    return re.findall(r"'(\w+)'", found[1]) if found and isinstance(error, TypeError) else []


@functools.cache
def _annotation(function: Callable[..., Any], name: str) -> Any:
    """The type that is declared for an argument; Any where it cannot be known, as what only type checkers import."""
    function = inspect.unwrap(function)
    text = getattr(function, "__annotations__", {}).get(name, Any)
    if not isinstance(text, str):
        return text
    try:
        return eval(text, getattr(function, "__globals__", {}))
    except Exception:
        return Any


def _fits(value: Any, declared: Any) -> bool:
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is typing.Literal:
        return value in inner
    kind = origin or declared
    if kind is None or kind is type(None):
        return value is None
    if kind is bool:
        return isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", None) == "b"
    if kind in (int, float):  # of whatever library
        asked = ("__index__",) if kind is int else ("__float__", "__index__")
        return any(hasattr(value, name) for name in asked) and not isinstance(value, (bool, type))
    if kind is Callable or kind is typing.Callable:
        return callable(value)
    if not isinstance(kind, type) or kind is object:
        return True
    if issubclass(kind, os.PathLike):
        return isinstance(value, os.PathLike)
    try:
        if not isinstance(value, kind):
            return False
    except TypeError:  # a protocol that cannot be asked at runtime
        return True
    if isinstance(value, (str, bytes)):  # a text is a sequence of texts, which is hardly ever meant
        return kind in (str, bytes) or not inner or str in inner
    if isinstance(value, Mapping) and len(inner) == 2:
        return all(_fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items())
    if isinstance(value, (list, tuple)) and len(inner) == 1:
        return all(_fits(item, inner[0]) for item in value)
    return True


def _called(declared: Any) -> str:
    """ "True, False or None", "an integer, a dict or None"."""
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    kinds = list(inner) if origin in (typing.Union, types.UnionType) else [declared]
    said = list(dict.fromkeys(one for kind in kinds for one in _called_one(kind).split(" or ")))
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} or {said[-1]}"


def _called_one(declared: Any) -> str:
    kind, inner = typing.get_origin(declared) or declared, typing.get_args(declared)
    if kind is typing.Literal:
        return " or ".join(map(repr, inner))
    if isinstance(kind, type) and issubclass(kind, os.PathLike):
        return _CALLED[os.PathLike]
    called = _CALLED.get(kind) or f"a {getattr(kind, '__name__', kind)}"
    of = [each for each in inner if each in (bool, int, float, str)]
    if called == "a list" and of:
        return f"a list of {'integers' if of == [int] else 'numbers' if of == [float] else 'texts'}"
    return called


def _meaning(name: str, text: str | None) -> str:
    """The first sentence that a docstring says of an argument, or ""."""
    found = re.search(rf"^ *{name}: (.*?)(?:\.(?=\s)|\n\s*\w+: |\n\s*\n|\Z)", text or "", re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()).rstrip(".") + "." if found else ""
