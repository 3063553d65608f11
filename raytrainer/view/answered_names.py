"""`AnsweredNames`: what is said where user code asks a worker's `self.trainer` for a name, or sets one, in vain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raytrainer.plan.nearest_names import nearly
from raytrainer.plan.run_arguments import RunArguments
from raytrainer.view.absent_names import absent

__all__ = ["AnsweredNames"]


class AnsweredNames:
    """A dataclass that has the run's arguments too, from its `settings`. Users may put attributes of theirs on it."""

    __dataclass_fields__: dict[str, Any]
    settings: Any

    if not TYPE_CHECKING:  # for a type checker this would have every name

        def __getattr__(self, name: str) -> Any:
            if name in RunArguments.__dataclass_fields__:
                return getattr(self.settings, name)
            if hasattr(type(self), name):  # a property, whose own AttributeError is the one to tell
                return object.__getattribute__(self, name)
            raise AttributeError(name if name.startswith("_") else absent(name, _known(self)))

        def __setattr__(self, name: str, value: Any) -> None:
            # what is set in each step has its answer at once, be it ours or the user's
            if name not in self.__dataclass_fields__ and name not in self.__dict__ and not name.startswith("_"):
                _refuse_in_vain(self, name, value)
            object.__setattr__(self, name, value)


def _known(view: AnsweredNames) -> list[str]:
    return [name for name in (*dir(view), *RunArguments.__dataclass_fields__) if not name.startswith("_")]


def _refuse_in_vain(view: AnsweredNames, name: str, value: Any) -> None:
    """Refuse an argument, and what is nearly the name of one, or of what can be set."""
    arguments, settable = RunArguments.__dataclass_fields__, (*view.__dataclass_fields__, "should_stop")
    if name in arguments:
        raise AttributeError(
            f"self.trainer.{name} stays as it is once the run has begun: write Trainer({name}={value!r}, ...)."
        )
    known = (*settable, *arguments)
    # another one beside what there is ("logger2", "logger_"), or one of several ("optimizer"), is a name of their own
    own = hasattr(type(view), name) or name.rstrip("_0123456789") in known or f"{name}s" in settable
    if not own and (meant := nearly(name, known)):
        raise AttributeError(f"self.trainer.{name} = ...: there is no {name!r}; did you mean {meant!r}?")
