"""Whether what a worker answers is what its verb declares: looked at before the driver builds on it."""

from __future__ import annotations

import dataclasses
import numbers
import types
import typing
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from raytrainer.errors import RaytrainerError
from raytrainer.messages import EvaluationReport, PlateauWish, SetupReport, TrainReport
from raytrainer.metric_messages import MetricReport
from raytrainer.worker.verbs import verb_of

__all__ = ["understood"]

Check = Callable[[Any], bool]


def understood(method: Callable[..., Any], answers: Sequence[Any]) -> None:
    """Compare the answers to a verb with its declaration: types, counts that are too small, and names.

    Raises:
        RaytrainerError: One is something else.
    """
    check = _of_verb(method)
    for rank, answer in enumerate(answers):
        if not check(answer):
            fault = _fault(answer, get_type_hints(method).get("return", Any), type(answer).__name__)
            raise RaytrainerError(
                f"rank {rank} has answered {verb_of(method).name!r} with something that is none: {fault}. Does it run "
                f"another version of raytrainer, or does code of yours change its reports?"
            )


@cache
def _of_verb(method: Callable[..., Any]) -> Check:
    return _check(get_type_hints(method).get("return", Any))


@cache
def _check(hint: Any) -> Check:
    """A function that says whether a value is of this type."""
    origin, args = get_origin(hint), get_args(hint)
    if hint in (Any, bool) or isinstance(hint, typing.TypeVar):  # a bool may be what a user's comparison gives
        return lambda value: True
    if hint is None or hint is type(None):
        return lambda value: value is None
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real  # NumPy's, too
        return lambda value: type(value) is hint or isinstance(value, kind)
    if origin in (typing.Union, types.UnionType):
        checks = [_check(arg) for arg in args]
        return lambda value: any(check(value) for check in checks)
    if origin in (list, tuple) and (origin is list or Ellipsis in args):
        return _all_of(origin, _check(args[0]))
    if origin is tuple:
        each = [_check(arg) for arg in args]
        return lambda value: (
            type(value) is tuple and len(value) == len(each) and all(map(lambda of, item: of(item), each, value))
        )
    if origin is dict:
        key, item = (_check(arg) for arg in args)
        return lambda value: isinstance(value, dict) and all(key(k) and item(v) for k, v in value.items())
    if dataclasses.is_dataclass(hint):
        return _check_fields(hint)
    return lambda value: isinstance(value, origin or hint)


def _all_of(kind: type[list[Any] | tuple[Any, ...]], check: Check) -> Check:
    return lambda value: type(value) is kind and all(check(item) for item in value)


def _check_fields(kind: Any) -> Check:
    fields = [(name, _check(hint)) for name, hint in _hints(kind)]
    least = [(name, _COUNTS[name]) for name, _ in _hints(kind) if name in _COUNTS and kind in _COUNTING]

    def check(value: Any) -> bool:
        if type(value) is not kind or not all(of(getattr(value, name)) for name, of in fields):
            return False
        if kind is MetricReport and not value.epoch.keys() <= value.specs.keys():
            return False
        return all(getattr(value, name) >= number for name, number in least)

    return check


#: What counts something, and in which attributes, with the least that there may be of it.
_COUNTING = (EvaluationReport, PlateauWish, SetupReport, TrainReport)
_COUNTS = {
    **dict.fromkeys(("rank", "batches", "batch", "step", "steps", "skipped_steps", "seconds", "data_seconds"), 0),
    **dict.fromkeys(("parts", "frequency"), 1),
}


@cache
def _hints(kind: Any) -> list[tuple[str, Any]]:
    hints = get_type_hints(kind)
    return [(field.name, hints[field.name]) for field in dataclasses.fields(kind)]


def _fault(value: Any, hint: Any, path: str) -> str:
    """The innermost part of it that is something else, and what it is."""
    kind: Any = hint
    if dataclasses.is_dataclass(kind) and type(value) is kind:
        for name, inner in _hints(hint):
            if not _check(inner)(getattr(value, name)):
                return _fault(getattr(value, name), inner, f"{path}.{name}")
        return f"{path} has a count that is too small, or a value of a name that it does not declare"
    return f"{path} = {str(value)[:80]!r} is no {hint if get_origin(hint) else getattr(hint, '__name__', hint)}"
