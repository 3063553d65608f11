"""Classes and functions by name: `module` and qualified name in a file, the object itself in the process that reads it.

Nothing is imported to find them, and not everything that is there may be taken: a file must not choose what is called.
Allowed are

* what the user's own modules define: those outside of site-packages and the standard library, and those of the package
  that the class which is being loaded comes from;
* layers, optimizers, schedulers, distributions and functions of torch; plain types, `math`, NumPy's types and ufuncs;
* what `torch.serialization.add_safe_globals` was given.
"""

from __future__ import annotations

import builtins
import functools
import math
import sys
import sysconfig
from collections.abc import Sequence
from enum import EnumMeta
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional, init

__all__ = ["NotAllowed", "reference", "resolve"]

#: Where torch's own functions are looked for by name; those of `torch` itself only if written in C, as operators are.
FUNCTIONS = {"torch.nn.functional": functional, "torch.nn.init": init, "torch.special": torch.special, "torch": torch}

#: Kinds of torch's classes, by the package that they are defined in.
CLASSES: dict[str, tuple[type, ...]] = {
    "torch.nn.": (nn.Module,),
    "torch.optim.": (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler),
    "torch.distributions.": (torch.distributions.Distribution,),
}

#: Names of builtins: types of plain values, and functions that only compute.
PLAIN = {"abs", "all", "any", "bool", "bytes", "complex", "dict", "float", "frozenset", "int", "len", "list", "max",
         "min", "object", "round", "set", "sorted", "str", "sum", "tuple"}  # fmt: skip

#: Packages that are nobody's own, also where they are installed from source.
FOREIGN = {"raytrainer", "torch", "ray", "numpy", "lightning", "pytorch_lightning"}


class NotAllowed(LookupError):
    """There is no such object here, or a file may not name it; says which and what to do."""


def reference(value: Any) -> tuple[str, str] | None:
    """(module, qualified name) of a class or function that can be found by them again; None of any other."""
    for module, namespace in FUNCTIONS.items():
        name = getattr(value, "__name__", None)
        if not isinstance(value, type) and isinstance(name, str) and getattr(namespace, name, None) is value:
            return module, name
    if type(value).__name__ == "ufunc" and type(value).__module__ == "numpy":
        return "numpy", value.__name__
    home, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(home, str) or not isinstance(name, str) or not callable(value):
        return None
    try:
        found: Any = functools.reduce(getattr, name.split("."), sys.modules.get(home))
    except AttributeError:
        return None
    return (_importable(home), name) if found is value or _made_anew(value, found) else None


def _made_anew(value: Any, found: Any) -> bool:
    """Whether a function of the script itself has come back from a worker, rather than being another of that name."""
    if not isinstance(value, FunctionType) or not isinstance(found, FunctionType):
        return False  # a method, say, which is bound to an object
    try:
        cells = [[cell.cell_contents for cell in each.__closure__ or ()] for each in (value, found)]
        rest = [(each.__code__, each.__defaults__, each.__kwdefaults__) for each in (value, found)]
        same = all(one is other or _made_anew(one, other) or one == other for one, other in zip(*cells, strict=True))
        return same and rest[0] == rest[1]
    except Exception:  # values that cannot be compared, a cell that is empty yet
        return False


def _importable(module: str) -> str:
    """The script's name instead of "__main__", so that it can be found where the script is imported."""
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    return f"__main__.{Path(file).stem}" if module == "__main__" and file else module


def resolve(module: str, name: str, owners: Sequence[type] = ()) -> Any:
    """What `reference` has named.

    Args:
        module: As from `reference`.
        name: The same.
        owners: The classes that are being loaded; all of their package is the user's own.

    Raises:
        NotAllowed: Says why.
    """
    for found, allowed in torch_safe_globals():
        if allowed == f"{module}.{name}":
            return found
    loaded = _loaded(module)
    if loaded is None:
        raise NotAllowed(f"{module}.{name} is in a module that is not imported here; import it first")
    try:
        value: Any = functools.reduce(getattr, name.split("."), loaded)
    except AttributeError:
        raise NotAllowed(f"{loaded.__name__} has no {name}") from None
    if not (_torch_own(module, name, value) or _plain(module, name, value) or _users_own(loaded, name, value, owners)):
        raise NotAllowed(
            f"{module}.{name} is neither torch's nor of your own modules, and a file may not choose what else is "
            f"called; if it may, torch.serialization.add_safe_globals([{name}]) says so"
        )
    return value


def torch_safe_globals() -> list[tuple[Any, str]]:
    """What torch was told to trust: objects and their full names."""
    given = torch.serialization.get_safe_globals()
    pairs = [entry if isinstance(entry, tuple) else (entry, None) for entry in given]
    return [(value, name or f"{value.__module__}.{value.__qualname__}") for value, name in pairs]


def _loaded(module: str) -> ModuleType | None:
    script = module.removeprefix("__main__.")
    main = sys.modules.get("__main__")
    is_main = Path(getattr(main, "__file__", None) or "").stem == script.rpartition(".")[2]
    if script != module:  # it was defined in a script
        return main if is_main else sys.modules.get(script)
    return sys.modules.get(module) or (main if is_main else None)


def _torch_own(module: str, name: str, value: Any) -> bool:
    if isinstance(value, type):
        kinds = next((kinds for package, kinds in CLASSES.items() if module.startswith(package)), ())
        return issubclass(value, kinds)
    if module not in FUNCTIONS or "." in name or name.startswith("_"):
        return False
    # `torch.load` and the like are in `torch` beside the operators, of which one opens files
    return callable(value) and (module != "torch" or _operator(name, value))


def _operator(name: str, value: Any) -> bool:
    return getattr(value, "__qualname__", "") == f"_VariableFunctionsClass.{name}" and name != "from_file"


def _plain(module: str, name: str, value: Any) -> bool:
    if module == "builtins":
        return name in PLAIN and value is getattr(builtins, name)
    if module == "math":
        return callable(value) and value is getattr(math, name, None)
    if module == "numpy" and "." not in name:
        return type(value).__name__ == "ufunc" or (isinstance(value, type) and _of_numpy(value))
    # members are looked up by name, which runs nothing
    return isinstance(value, EnumMeta) and (value.__qualname__, value.__module__) == (name, module)


def _of_numpy(value: type) -> bool:
    import numpy

    return issubclass(value, numpy.generic)


def _users_own(loaded: ModuleType, name: str, value: Any, owners: Sequence[type]) -> bool:
    """Whether the user's own code defines it there, rather than having imported it."""
    if not isinstance(value, (type, FunctionType)) or value.__qualname__ != name or value.__module__ != loaded.__name__:
        return False
    package = loaded.__name__.partition(".")[0]
    if package in FOREIGN:
        return False
    bases = {base.__module__.partition(".")[0] for owner in owners for base in owner.__mro__}
    return package == "__main__" or package in bases - {"builtins"} or _outside_of_libraries(loaded)


def _outside_of_libraries(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    if file is None:
        return False
    path = Path(file).resolve()
    library = Path(sysconfig.get_path("stdlib")).resolve()
    return not path.is_relative_to(library) and not {"site-packages", "dist-packages"} & set(path.parts)
