"""Small validators. Each returns the value in its one normal form, or says what was received and what is allowed.

So what forms an argument may have (durations, counts, GPUs, precisions) is decided here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from raytrainer.errors import ConfigurationError
from raytrainer.plan.nearest_names import perhaps
from raytrainer.plan.uris import absolute

__all__ = [
    "boolean",
    "choice",
    "compile_options",
    "count",
    "count_or_auto",
    "duration",
    "exit_code",
    "fraction_or_count",
    "gpu_span",
    "gpus",
    "local_folder",
    "number",
    "precision",
    "seconds",
    "seconds_or_none",
    "seed",
    "span",
    "steps_or_duration",
    "switch_or_count",
]

_PRECISIONS = {
    "32": "32-true",
    "32-true": "32-true",
    "16": "16-mixed",
    "16-mixed": "16-mixed",
    "bf16": "bf16-mixed",
    "bf16-mixed": "bf16-mixed",
    "16-true": "16-true",
    "bf16-true": "bf16-true",
    "64": "64-true",
    "64-true": "64-true",
    "float8": "float8",
}

#: What others call them.
_PRECISIONS_ELSEWHERE = {
    "16-mixed": ("fp16", "float16", "half", "torch.float16", "amp", "mixed"),
    "bf16-mixed": ("bfloat16", "torch.bfloat16", "bf16-amp"),
    "32-true": ("fp32", "float32", "float", "full", "torch.float32", "tf32"),
    "64-true": ("fp64", "float64", "double", "torch.float64"),
    "float8": ("fp8", "8", "float8-mixed", "transformer-engine", "torch.float8_e4m3fn"),
}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def count(
    name: str, value: Any, *, least: int, none: bool = False, minus_one: str | None = None, unlimited: bool = False
) -> Any:
    """An integer of at least `least`; None if `none`; -1 if `minus_one` says what it means (None, if `unlimited`)."""
    if value is None and none:
        return None
    if _is_int(value) and (value >= least or (value == -1 and minus_one is not None)):
        return None if unlimited and value == -1 else value
    allowed = f"an integer of at least {least}"
    if minus_one is not None:
        allowed += f", or -1 for {minus_one}"
    if none:
        allowed += ", or None"
    raise ConfigurationError(f"{name}={value!r}: give {allowed}.")


def switch_or_count(name: str, value: Any) -> int:
    """A count of at least 0; True is 1, False 0."""
    if isinstance(value, bool) or (_is_int(value) and value >= 0):
        return int(value)
    raise ConfigurationError(f"{name}={value!r}: give True, False, or an integer of at least 0.")


def number(name: str, value: Any, *, above: float, none: bool = True, zero: bool = False) -> float | None:
    """A finite number greater than `above`, or None; if `zero`, 0 is None."""
    if (value is None and none) or (zero and value == 0):
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > above:
        return float(value)
    raise ConfigurationError(f"{name}={value!r}: give a number greater than {above:g}{', or None' if none else ''}.")


def seconds(name: str, value: Any) -> float:
    """A number of seconds, of at least 0; infinity is one."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0:
        return float(value)
    raise ConfigurationError(f"{name}={value!r}: give seconds, of at least 0.")


def seconds_or_none(name: str, value: Any) -> float | None:
    """`seconds`, or None."""
    return None if value is None else seconds(name, value)


def exit_code(name: str, value: Any) -> int | None:
    """A process's exit status, or None."""
    if value is None or (_is_int(value) and 0 <= value <= 255):
        return value  # type: ignore[no-any-return]
    raise ConfigurationError(f"{name}={value!r}: give an exit status, an integer from 0 to 255, or None.")


def boolean(name: str, value: Any, *, none: bool = False) -> bool | None:
    if isinstance(value, bool) or (value is None and none):
        return value
    raise ConfigurationError(f"{name}={value!r}: give True or False{', or None' if none else ''}.")


def choice(name: str, value: Any, allowed: Sequence[Any], hint: str = "", none: Any = None) -> Any:
    """One of `allowed`, compared with its type, so that 1 is not True; what None stands for, if `none` says so."""
    if value is None and none is not None:
        return none
    for candidate in allowed:
        if type(candidate) is type(value) and candidate == value:
            return value
    options = ", ".join(repr(a) for a in allowed)
    names = [candidate for candidate in allowed if isinstance(candidate, str)]
    hint = f" {hint}" if hint else ""
    raise ConfigurationError(f"{name}={value!r}: give one of {options}.{hint}{perhaps(value, names)}")


_REFUSED: Any = object()


def fraction_or_count(name: str, value: Any, *, least: int = 0, none: Any = _REFUSED) -> Any:
    """An int is a number of batches; a float in [0, 1] a fraction; a larger whole float a number of batches.

    None is refused, unless `none` says what it stands for.
    """
    if value is None and none is not _REFUSED:
        return none
    if _is_int(value) and value >= least:
        return int(value)
    if isinstance(value, float):
        if 0.0 <= value <= 1.0 and (value > 0.0 or least == 0):
            return value
        if value > 1.0 and value.is_integer():
            return int(value)
    lower = "[0, 1]" if least == 0 else "(0, 1]"
    raise ConfigurationError(
        f"{name}={value!r}: give an int of at least {least} for a number of batches, or a float in {lower} for a "
        f"fraction of them."
    )


def duration(name: str, value: Any) -> float | None:
    """Seconds, from a timedelta, a "DD:HH:MM:SS" string, or a mapping of timedelta's arguments."""
    if value is None:
        return None
    try:
        if isinstance(value, timedelta):
            seconds = value.total_seconds()
        elif isinstance(value, Mapping):
            seconds = timedelta(**value).total_seconds()
        elif isinstance(value, str):
            days, hours, minutes, secs = (int(part) for part in value.strip().split(":"))
            seconds = timedelta(days=days, hours=hours, minutes=minutes, seconds=secs).total_seconds()
        else:
            raise TypeError
        if seconds < 0:
            raise ValueError
    except (TypeError, ValueError):
        raise ConfigurationError(
            f'{name}={value!r}: give a "DD:HH:MM:SS" string, a datetime.timedelta, a dict such as '
            f'{{"minutes": 30}}, or None; not negative.'
        ) from None
    return seconds


def steps_or_duration(name: str, value: Any) -> int | float | str | None:
    """Steps as an int, seconds as a float, "auto", or None for never."""
    if value in (None, 0) or value == "auto":
        return value or None
    if isinstance(value, int):
        steps: int = count(name, value, least=1)
        return steps
    try:
        return duration(name, value)
    except ConfigurationError as error:
        raise ConfigurationError(f'{error} Or steps, an integer of at least 1; "auto"; 0 for never.') from None


def local_folder(name: str, value: Any) -> str:
    """A local folder as an absolute path; None: the working directory."""
    if value is None or value == "":
        return absolute("", f"{name}={value!r}")
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise ConfigurationError(f"{name}={value!r}: give a local folder, as a text or a path, or None.")
    if "://" in os.fspath(value):
        raise ConfigurationError(
            f"{name}={os.fspath(value)!r} is a URI: logs need a local folder. Checkpoints may go there: "
            f"callbacks=[raytrainer.ModelCheckpoint(dirpath={os.fspath(value)!r})]."
        )
    return absolute(os.fspath(value), f"{name}={os.fspath(value)!r}")


def count_or_auto(name: str, value: Any) -> int | str:
    """A count of at least 0, or "auto"."""
    if value == "auto" or (_is_int(value) and value >= 0):
        return value  # type: ignore[no-any-return]
    raise ConfigurationError(f'{name}={value!r}: give an integer of at least 0, or "auto".')


def seed(name: str, value: Any) -> int | None:
    """An integer that every generator takes, or None."""
    if value is None:
        return None
    if _is_int(value) and 0 <= value < 2**63:
        return int(value)
    raise ConfigurationError(f"{name}={value!r}: give an integer from 0 to 2**63 - 1, or None.")


def precision(name: str, value: Any) -> str:
    """The one spelling of a precision, e.g. 16 -> "16-mixed"."""
    key = str(value).lower() if not isinstance(value, bool) else ""
    if key in _PRECISIONS:
        return _PRECISIONS[key]
    meant = next((f' Did you mean "{form}"?' for form, names in _PRECISIONS_ELSEWHERE.items() if key in names), "")
    raise ConfigurationError(
        f'{name}={value!r}: give 32, 64, 16 (or "16-mixed"), "bf16" (or "bf16-mixed"), "16-true", "bf16-true" or '
        f'"float8".{meant}'
    )


def compile_options(name: str, value: Any) -> dict[str, Any] | None:
    """Options for torch.compile; None: do not compile."""
    known = ("backend", "disable", "dynamic", "fullgraph", "mode", "options")
    if isinstance(value, bool) or value is None:
        return {} if value else None
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{name}={value!r}: give True, False, or a dict of torch.compile's options.")
    if unknown := set(value) - set(known):
        raise ConfigurationError(
            f"{name}={dict(value)!r}: {sorted(unknown)} are no options of torch.compile; there are {list(known)}."
        )
    return dict(value)


def gpus(value: Any) -> int | tuple[int, ...]:
    """A number of GPUs per node (0: CPU, -1: all), or the indices of chosen ones in PCI bus order.

    An int is a number; a list is indices; a string with a comma is indices ("1,3"), one without is a number, but
    for "-1" which is all.
    """
    advice = (
        "give a number of GPUs per node, -1 for all, 0 or None for CPU, or a list of different indices in PCI bus "
        'order such as [0, 2] or "0,2".'
    )
    chosen = value
    if chosen is None:
        return 0
    if isinstance(chosen, str):
        try:
            parts = [int(part) for part in chosen.split(",") if part.strip()]
        except ValueError:
            raise ConfigurationError(f"gpus={value!r}: {advice}") from None
        chosen = parts[0] if "," not in chosen and len(parts) == 1 else parts
    if _is_int(chosen) and chosen >= -1:
        return int(chosen)
    if isinstance(chosen, (list, tuple)) and all(_is_int(i) and i >= 0 for i in chosen):
        if len(set(chosen)) != len(chosen):
            raise ConfigurationError(f"gpus={value!r}: an index is given twice; {advice}")
        return tuple(sorted(chosen)) if chosen else 0
    raise ConfigurationError(f"gpus={value!r}: {advice}")


def span(name: str, value: Any) -> tuple[int, int]:
    """(fewest, most): an int is both; a pair lets an elastic run have any number between them."""
    pair = (value, value) if _is_int(value) else value
    if isinstance(pair, (tuple, list)) and len(pair) == 2 and all(_is_int(n) for n in pair) and 1 <= pair[0] <= pair[1]:
        return pair[0], pair[1]
    raise ConfigurationError(
        f"{name}={value!r}: give an integer of at least 1, or a pair (fewest, most) for an elastic run."
    )


def gpu_span(value: Any) -> tuple[int, int | tuple[int, ...]]:
    """(fewest, GPUs): as `gpus`, and "2-4" for an elastic run with two to four GPUs a node. 0: not elastic."""
    if isinstance(value, str) and value.count("-") == 1 and not value.startswith("-"):
        first, _, last = value.partition("-")
        if first.strip().isdigit() and last.strip().isdigit():
            return span("gpus", (int(first), int(last)))
    return 0, gpus(value)
