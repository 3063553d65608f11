"""What becomes of answers that Ray cannot bring."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayTaskError

from raytrainer.driver.workers.ray_answers import Answers
from raytrainer.errors import ResourceError, SerializationError
from raytrainer.worker.actor.actor import refuse_unpicklable
from raytrainer.worker.logger_recorder import _copied


class Group:
    def __init__(self) -> None:
        self.places: list[Any] = []
        self.outputs: list[str | None] = []
        self.stale = False

    def lose(self, ranks: Any = ()) -> None:
        raise AssertionError("nobody is lost")

    def whereabouts(self, patience: float) -> list[Any]:
        return []


@pytest.mark.parametrize(
    ("cause", "told", "says"),
    [
        (OutOfDiskError("Local disk is full"), ResourceError, r"no room .* rank 0 .*--object-store-memory="),
        (ObjectStoreFullError("Failed to put object"), ResourceError, r"no room .* rank 0 .*--object-store-memory="),
        (TypeError("cannot pickle 'generator'"), SerializationError, "cannot be pickled: TypeError.*predict_step"),
        # torch raises it by a signal, whatever is done in that moment
        (RuntimeError("DataLoader worker (pid 1) exited unexpectedly"), RuntimeError, "^DataLoader worker"),
    ],
)
def test_an_answer_that_ray_cannot_bring(
    monkeypatch: pytest.MonkeyPatch, cause: Exception, told: type[Exception], says: str
) -> None:
    def get(ref: object) -> object:
        raise RayTaskError("obey", "traceback", cause)

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda refs, **_: (refs[:1], refs[1:]))
    with pytest.raises(told, match=says):
        Answers(Group()).all(["a reference"], 60, "training")


class Dies:
    """While it is pickled, a loader's process dies."""

    def __reduce__(self) -> Any:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")


@pytest.mark.parametrize("pickled", [lambda value: refuse_unpicklable({"value": value}), _copied])
def test_a_loader_that_dies_as_something_is_pickled(pickled: Any) -> None:
    with pytest.raises(RuntimeError, match="killed by signal"):
        pickled(Dies())
