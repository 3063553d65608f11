"""`StopRequest`: the end of training as one worker asks for it, and as the driver knows of it."""

from __future__ import annotations

__all__ = ["StopRequest"]


class StopRequest:
    """The driver is told of each request once, so that who takes one back there is not told of it again.

    Attributes:
        should_stop: Whether the end has been asked for, by whomever; user code sets it.
    """

    should_stop: bool = False
    _stop_is_known: bool = False

    @property
    def asks_to_stop(self) -> bool:
        """Whether it has been asked for here, and the driver has not been told yet."""
        return self.should_stop and not self._stop_is_known

    def tell_stop(self) -> bool:
        """The same, for a report, by which the driver is told."""
        asks = self.asks_to_stop
        self._stop_is_known |= asks
        return asks

    def hear_stop(self, stop: bool) -> None:
        """Take up whether the driver knows of a request; one that it has not been told yet stays."""
        if not self.asks_to_stop:
            self.should_stop = self._stop_is_known = stop
