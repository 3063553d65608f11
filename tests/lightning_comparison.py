"""The page that compares this package with Lightning, name by name: `python tests/lightning_comparison.py > PAGE`.

PAGE is `examples/guide/lightning.md`. With `--names`, and Lightning installed, writes `lightning_names.json` instead:
what Lightning has. What becomes of each of its names stands in `lightning_words.py`, if it is not the same here.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

NAMES = Path(__file__).with_name("lightning_names.json")
PAGE = Path(__file__).parents[1] / "examples" / "guide" / "lightning.md"

#: The tables of names: title, then what to look at in Lightning and here.
OBJECTS = {
    "Trainer": ("lightning.pytorch.Trainer", ["raytrainer.Trainer"]),
    "LightningModule": ("lightning.pytorch.LightningModule", ["raytrainer.Module"]),
    "LightningDataModule": ("lightning.pytorch.LightningDataModule", ["raytrainer.DataModule"]),
    "Callback": ("lightning.pytorch.Callback", ["raytrainer.Callback", "raytrainer.WorkerCallback"]),
}

#: The tables of classes or functions with their arguments: title, then where they are in Lightning and here.
CALLABLES = {
    "Callbacks": ("lightning.pytorch.callbacks", "raytrainer.callbacks"),
    "Loggers": ("lightning.pytorch.loggers", "raytrainer.loggers"),
    "Profilers": ("lightning.pytorch.profilers", "raytrainer.profilers"),
}

#: Verbs that find something out: of Lightning's Tuner, of the Trainer here.
TUNING = ("lr_find", "scale_batch_size")

#: Methods whose arguments are compared too.
METHODS = {
    "Trainer": ("fit", "validate", "test", "predict", "save_checkpoint"),
    "LightningModule": ("log", "log_dict", "save_hyperparameters", "load_from_checkpoint", "all_gather", "print"),
    "LightningDataModule": ("from_datasets", "load_from_checkpoint"),
}


def found(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def arguments(function: Callable[..., Any]) -> list[str]:
    """Names of its arguments; "**" where it takes any."""
    given = inspect.signature(function).parameters.values()
    any_name = ["**"] if any(p.kind is p.VAR_KEYWORD for p in given) else []
    named = [p for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [p.name for p in named if p.name not in ("self", "cls")] + any_name


def public(kinds: Iterable[type]) -> list[str]:
    """Names that the classes have beyond those of torch's modules."""
    from torch import nn

    names = {name for kind in kinds for name in (*dir(kind), *getattr(kind, "__annotations__", ()))}
    return sorted(name for name in names if name[0] != "_" and not hasattr(nn.Module, name))


def beyond_arguments(title: str, given: list[str], names: Mapping[str, Any]) -> list[str]:
    """Without the Trainer's arguments, which have a table of their own."""
    return [name for name in given if title != "Trainer" or name not in names["Trainer arguments"]]


def exported(module: Any, what: Callable[[Any], list[str]] = arguments) -> dict[str, list[str]]:
    kinds = {name: getattr(module, name) for name in module.__all__}
    return {name: what(kind) for name, kind in kinds.items() if inspect.isclass(kind)}


def attributes(kind: type) -> list[str]:
    """Public names of its objects: of the class, and those that its methods set."""
    names = set(dir(kind))
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("lightning", "raytrainer"):
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
            names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_set(node)}
    return sorted(name for name in names if name[0] != "_")


def beyond_base(title: str, given: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Each class's names without those of the base that its table shows beside it; `Callback` has its own table."""
    base = {"Callbacks": "Callback", "Loggers": "Logger", "Profilers": "Profiler"}[title]
    return {
        name: [each for each in names if name == base or each not in given[base]]
        for name, names in given.items()
        if name not in OBJECTS
    }


def _is_set(node: ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"


def of_lightning() -> dict[str, Any]:
    """What the installed Lightning has."""
    import lightning
    from lightning.pytorch.strategies import StrategyRegistry
    from lightning.pytorch.tuner import Tuner

    names: dict[str, Any] = {"version": lightning.__version__}
    names["Trainer arguments"] = arguments(lightning.Trainer)
    for title, (theirs, _) in OBJECTS.items():
        kind = found(theirs)
        names[title] = beyond_arguments(title, public([kind]), names)

        names[f"{title} methods"] = {name: arguments(getattr(kind, name)) for name in METHODS.get(title, ())}
    for title, (theirs, _) in CALLABLES.items():
        module = importlib.import_module(theirs)
        if not hasattr(module, "__all__"):
            module.__all__ = [name for name in dir(module) if name[0].isupper()]
        names[title] = exported(module)
        names[f"{title} attributes"] = beyond_base(title, exported(module, attributes))
    names["Tuning"] = {name: arguments(getattr(Tuner, name)) for name in TUNING}
    names["Strategies"] = sorted(StrategyRegistry.available_strategies())
    return names


# ---------------------------------------------------------------- the page


def of_raytrainer() -> dict[str, Any]:
    """What this package has, in the same shape."""
    import raytrainer
    from raytrainer.plan.strategy_settings import STRATEGIES

    names: dict[str, Any] = {"Trainer arguments": arguments(raytrainer.Trainer)}
    for title, (_, ours) in OBJECTS.items():
        kinds = [found(path) for path in ours]
        names[title] = beyond_arguments(title, public(kinds), names)
        names[f"{title} methods"] = {name: arguments(getattr(kinds[0], name)) for name in METHODS.get(title, ())}
    for title, (_, ours) in CALLABLES.items():
        names[title] = {
            name: given for name, given in exported(importlib.import_module(ours)).items() if hasattr(raytrainer, name)
        }
        names[f"{title} attributes"] = exported(importlib.import_module(ours), attributes)
    names["Tuning"] = {name: arguments(getattr(raytrainer.Trainer, name)) for name in TUNING}
    names["Strategies"] = list(STRATEGIES)
    return names


def first_sentence(path: str) -> str:
    """What a name's docstring says first."""
    text = inspect.getdoc(found(path)) or ""
    return " ".join(text.partition("\n\n")[0].split())


def code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def difference(theirs: list[str], ours: list[str], renamed: Mapping[str, str]) -> str:
    """Arguments that are missing, called otherwise, or new."""
    parts = []
    again = [f"`{old}` is `{new}`" for old, new in renamed.items() if old in theirs and new in ours]
    missing = [name for name in theirs if name not in (*ours, *renamed, "**") and "**" not in ours]
    new = [name for name in ours if name not in (*theirs, *renamed.values(), "**")]
    if again:
        parts.append(", ".join(again))
    if missing:
        parts.append(f"no {code(missing)}")
    if new:
        parts.append(f"new: {code(new)}")
    return "; ".join(parts)


def without(title: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, str]:
    """What objects of Lightning's classes have and those here lack."""
    told = {}
    for name, given in theirs.get(f"{title} attributes", {}).items():
        missing = set(given) - set(ours[f"{title} attributes"].get(name, given)) - set(theirs[title][name])
        if missing:
            told[name] = f"objects have no {code(sorted(missing))}"
    return told


def check(
    title: str, theirs: Iterable[str], ours: Iterable[str], words: Mapping[str, str], new: Mapping[str, str]
) -> None:
    """Every name must be accounted for, and no word be left over."""
    theirs, ours = set(theirs), set(ours)
    problems = {
        "of Lightning's, absent here, without a word in lightning_words.py": theirs - ours - words.keys(),
        "new here, without a word in lightning_words.NEW": ours - theirs - new.keys(),
        "words for names that are neither's": (words.keys() - theirs) | (new.keys() - ours),
    }
    told = [f"{title}: {what}: {sorted(names)}" for what, names in problems.items() if names]
    if told:
        raise SystemExit("\n".join(told))


def table(
    title: str,
    theirs: Any,
    ours: Any,
    words: Mapping[str, str],
    new: Mapping[str, str],
    renamed: Any,
    lacks: Mapping[str, str],
) -> list[str]:
    """One table: names that are the same in a sentence, the others in rows."""
    check(title, theirs, ours, words, new)
    rows: dict[str, list[str]] = {}
    same = []
    for name in theirs:
        more = ""
        if isinstance(theirs, Mapping) and name in ours:
            more = difference(theirs[name], ours[name], renamed.get(name, {}))
        said = "; ".join(part for part in (words.get(name, ""), more, lacks.get(name, "")) if part)
        if said:
            rows.setdefault(said, []).append(name)
        else:
            same.append(name)
    lines = [f"## {title}", ""]
    if same:
        lines += [f"The same: {code(same)}.", ""]
    lines += ["| Lightning | here |", "|---|---|", *(f"| {code(names)} | {said} |" for said, names in rows.items())]
    more_here: dict[str, list[str]] = {}
    for name, what in sorted(new.items()):
        more_here.setdefault(what, []).append(name)
    lines += [f"| | new: {code(names)}: {what} |" for what, names in more_here.items()]
    return [*lines, ""]


def page() -> str:
    import lightning_words as said

    theirs, ours = json.loads(NAMES.read_text()), of_raytrainer()
    lines = [said.HEAD.replace("VERSION", theirs["version"])]
    for title in ("Trainer arguments", *OBJECTS, *CALLABLES, "Tuning", "Strategies"):
        words, new = said.WORDS.get(title, {}), said.NEW.get(title, {})
        lines += table(title, theirs[title], ours[title], words, new, said.RENAMED, without(title, theirs, ours))
        for name, given in theirs.get(f"{title} methods", {}).items():
            told = difference(given, ours[f"{title} methods"][name], said.RENAMED.get(name, {}))
            if told:
                lines.append(f"Arguments of `{name}`: {told}.\n")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    if "--names" in sys.argv:
        NAMES.write_text(json.dumps(of_lightning(), indent=1) + "\n")
    else:
        print(page(), end="")
