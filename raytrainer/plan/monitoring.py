"""At which hook a monitored metric is looked at, when the user leaves that open."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Moment", "MonitorMoment"]


class Moment(StrEnum):
    """After each validation, or after each training epoch."""

    VALIDATION = "validation"
    TRAIN_EPOCH = "train_epoch"


class MonitorMoment:
    """Finds the moment at which a metric gets its value.

    A metric that validation logs is ready after each validation, one that training logs after each epoch. Which of the
    two it is shows in the first epoch: a metric that is there before the first validation, or is still missing after
    it, belongs to training. Without validation everything does.

    Attributes:
        moment: The moment, None while it is still open.
        validated: Whether a validation has run since `begin`.
    """

    def __init__(self, wish: Moment | None = None) -> None:
        self._wish = wish
        self.begin()

    def begin(self) -> None:
        """Forget what an earlier run showed."""
        self.moment: Moment | None = self._wish
        self.validated = False

    def before_validation(self, present: bool) -> None:
        """Say whether the metric exists before a validation."""
        if self.moment is None and present:
            self.moment = Moment.TRAIN_EPOCH

    def after_validation(self, present: bool) -> bool:
        """Say whether the metric exists after a validation; answers whether to look at it now."""
        self.validated = True
        if self.moment is None and present:
            self.moment = Moment.VALIDATION
        return self.moment is Moment.VALIDATION

    def after_train_epoch(self, present: bool, has_validation: bool) -> bool:
        """Say whether the metric exists after an epoch; answers whether to look at it now.

        A missing metric is looked for (and so complained about) only once nothing can bring it any more.
        """
        if self.moment is None and (present or not has_validation or self.validated):
            self.moment = Moment.TRAIN_EPOCH
        return self.moment is Moment.TRAIN_EPOCH
