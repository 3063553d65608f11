"""Declaring arguments once: name, type, default, check and meaning, from which all that shows or uses them is made."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar, dataclass_transform

from raytrainer.errors import RaytrainerError
from raytrainer.plan.given_arguments import refuse_unknown
from raytrainer.tracebacks import fold

__all__ = ["argument", "arguments", "checked", "documented", "meanings"]

T = TypeVar("T")


def argument(*, default: Any, check: Callable[..., Any] | None = None, **options: Any) -> Any:
    """One argument. The string below it in the class says what it means.

    Args:
        default: What it is where nobody gives it.
        check: Called with (name, value, **options); returns the value in its one normal form, or raises a
            ConfigurationError. None: whoever takes the argument checks it.
        options: For `check`.
    """
    return field(default=default, metadata={"check": check, "options": options})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(argument,))
def arguments(cls: type[T]) -> type[T]:
    """A class whose attributes are arguments, to be given by keyword and never changed.

    Type checkers and editors take its signature from the attributes, as they do with dataclasses.
    """
    return dataclass(frozen=True, kw_only=True, eq=False, repr=False)(cls)


def checked(given: Mapping[str, Any], kind: type[Any], beyond: type[Any] | None = None) -> dict[str, Any]:
    """The values of arguments that `kind` declares with a check (beyond those of a base), each in its normal form.

    Raises:
        ConfigurationError: A value is not allowed.
    """
    found, others = {}, set() if beyond is None else {declared.name for declared in fields(beyond)}
    for declared in fields(kind):
        check = declared.metadata.get("check")
        if check is not None and declared.name not in others:
            found[declared.name] = check(declared.name, given[declared.name], **declared.metadata["options"])
    return found


def meanings(kind: type[Any]) -> dict[str, str]:
    """What each argument of a class means, in order; empty where Python keeps no source code."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        declared: dict[str, Field[Any]] = base.__dict__.get("__dataclass_fields__", {})
        if declared:
            found |= {name: text for name, text in _attribute_docstrings(base) if name in declared}
    return found


def _attribute_docstrings(kind: type[Any]) -> Iterator[tuple[str, str]]:
    """(attribute, the string right below it) in the body of a class, where editors look for it too."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    except (OSError, TypeError):
        return
    assert isinstance(body, ast.ClassDef)
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = following.value if isinstance(following, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                yield statement.target.id, " ".join(text.value.split())


def documented(kind: type[T]) -> type[T]:
    """A class with its arguments in its docstring, where `help` and command lines look for them.

    They come before what it raises. A name that it does not have is answered with what was probably meant.
    """
    declared = kind.__init__
    known = list(inspect.signature(declared).parameters.values())[1:]

    @functools.wraps(declared)
    def checking(self: T, *args: Any, **given: Any) -> None:
        try:
            refuse_unknown(kind.__name__, known, args, given)
            declared(self, **given)
        except RaytrainerError as error:
            fold(error)
            raise

    checking.__qualname__ = f"{kind.__qualname__}.__init__"
    kind.__init__ = checking  # type: ignore[method-assign, assignment]
    lines = []
    for name, text in meanings(kind).items():
        wrapped = textwrap.wrap(f"{name}: {text}", 112, subsequent_indent="    ")
        lines += [f"    {line}" for line in wrapped]
    if kind.__doc__ is not None and lines:
        before, mark, after = inspect.cleandoc(kind.__doc__).partition("\nRaises:\n")
        kind.__doc__ = "\n".join([before.rstrip(), "", "Args:", *lines, f"{mark}{after}"])
    return kind
