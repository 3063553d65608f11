"""A PyTorch trainer on Ray actors: `Module`, `DataModule`, `Trainer`.

What it exports is in `public.py`, and is imported, torch with it, when the first of it is asked for: Ray's processes
that only execute a dataset import this package too, and do without.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any

from raytrainer.cells import in_notebook as _in_notebook
from raytrainer.quick_imports import importing as _importing

if TYPE_CHECKING:
    from raytrainer.public import *  # noqa: F403
    from raytrainer.public import __all__ as __all__
else:  # a type checker that sees it takes any name for one of the package's

    def __getattr__(name: str) -> Any:
        if name.startswith("__") and name not in ("__all__", "__version__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        with _importing(alone=True):
            public = importlib.import_module("raytrainer.public")
        globals().update({exported: getattr(public, exported) for exported in public.__all__}, __all__=public.__all__)
        try:
            return globals()[name]  # a submodule too, now that they have been imported
        except KeyError:
            said = importlib.import_module("raytrainer.plan.names_elsewhere").unknown_export(name, public.__all__)
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}{said}") from None

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to whatever sys.stderr is now, so that a live progress bar or a test can take its place.

    In a notebook it is sys.stdout: a cell shows what comes by stderr as if it were an error.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):  # type: ignore[no-untyped-def]
        return sys.stdout if _in_notebook() else sys.stderr


_log = logging.getLogger("raytrainer")
if not _log.handlers:
    _log.addHandler(_StderrHandler())
    _log.setLevel(logging.INFO)
    _log.propagate = False
