"""What mypy must refuse about verbs: each ignored error below has to be one, since mypy warns of ignores without."""

from __future__ import annotations

from raytrainer.driver.workers.worker_group import WorkerGroup
from raytrainer.messages import FinishReport, TrainReport
from raytrainer.metric_messages import News, Reduced
from raytrainer.worker.worker import Worker


def right(group: WorkerGroup) -> None:
    """Arguments and answers are those of the method that is the verb."""
    trained: list[TrainReport] = group.call(Worker.train, 3, None, News(Reduced({"loss": 1.0})), more=True)
    finished: list[FinishReport] = group.call(Worker.finish, True)
    print(trained, finished)


def wrong(group: WorkerGroup) -> None:
    """A misspelt name, a wrong argument, one too few, one too many, another answer."""
    group.call(Worker.trian, 3)  # type: ignore[attr-defined]
    group.call(Worker.train, "3")  # type: ignore[arg-type]
    group.call(Worker.train)  # type: ignore[call-arg]
    group.call(Worker.end_fit, 1)  # type: ignore[call-arg]
    group.call("train", 3)  # type: ignore[arg-type]
    trained: list[FinishReport] = group.call(Worker.train, 3)  # type: ignore[arg-type]
    print(trained)
