"""Takes a server out of use after failures in a row, and lets one request try it after a while."""

from __future__ import annotations

import time
from collections.abc import Callable


class CircuitBreaker:
    """closed: all may pass. open: none, for `seconds`. half-open: one at a time, whose outcome decides.

    Not thread-safe: its owner holds a lock. `clock` is monotonic, in seconds.
    """

    def __init__(self, failures: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = failures
        self._seconds = seconds
        self._clock = clock
        self._failures = 0
        self._opened_at: float | None = None
        self._probe_out = False

    @property
    def state(self) -> str:
        if self._opened_at is None:
            return "closed"
        return "half-open" if self._clock() - self._opened_at >= self._seconds else "open"

    def allows(self) -> bool:
        """Whether a request may go now. Changes nothing."""
        state = self.state
        return state == "closed" or (state == "half-open" and not self._probe_out)

    def begin(self) -> None:
        """A request goes."""
        self._probe_out = self._opened_at is not None

    def succeed(self) -> None:
        self._failures, self._opened_at, self._probe_out = 0, None, False

    def fail(self) -> None:
        self._failures += 1
        self._probe_out = False
        if self._opened_at is not None or self._failures >= self._limit:
            self._opened_at = self._clock()

    def forget(self) -> None:
        """A request ended without saying anything about the server (its caller went away)."""
        self._probe_out = False
