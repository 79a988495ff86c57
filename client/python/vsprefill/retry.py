"""When a failed prefill is sent again. Pure decisions: the clients do the waiting."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from .errors import OverloadedError, VsprefillError


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how fast. Every try carries the next attempt number, so that the server drops the one before.

    max_attempts: tries in all; 1 never tries again.
    initial_backoff_seconds, multiplier, max_backoff_seconds: the pause before the second try, its growth per
    try, and its limit; half of each pause is random, so that clients do not come back together.
    A server that says when to come back (OverloadedError.retry_after_seconds) is taken at its word.
    """

    max_attempts: int = 3
    initial_backoff_seconds: float = 0.1
    multiplier: float = 2.0
    max_backoff_seconds: float = 5.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts {self.max_attempts} not >= 1")
        for name in ("initial_backoff_seconds", "max_backoff_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} {getattr(self, name)} not >= 0")
        if not self.multiplier >= 1:
            raise ValueError(f"multiplier {self.multiplier} not >= 1")

    def pause(self, tries: int, error: VsprefillError, seconds_left: float | None) -> float | None:
        """Seconds to wait before the next try, or None to give up with `error`.

        tries: how many have failed. seconds_left: until the caller's deadline, None without one.
        """
        if tries >= self.max_attempts or not error.retryable:
            return None
        if isinstance(error, OverloadedError) and error.retry_after_seconds is not None:
            pause = error.retry_after_seconds
        else:
            pause = min(self.initial_backoff_seconds * self.multiplier ** (tries - 1), self.max_backoff_seconds)
            pause *= random.uniform(0.5, 1.0)
        if seconds_left is not None and pause >= seconds_left:
            return None  # the deadline would pass while waiting: the real cause says more than DEADLINE_EXCEEDED
        return pause


class Tries:
    """The tries of one call and what is left of its `timeout` (seconds for all of them, None: no limit)."""

    def __init__(self, policy: RetryPolicy, timeout: float | None) -> None:
        self._policy = policy
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._failed = 0

    def timeout(self) -> float | None:
        """Seconds for the next try; never 0, which gRPC would take for none at all."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.001)

    def pause(self, error: VsprefillError) -> float | None:
        """As RetryPolicy.pause, for a try that just failed."""
        self._failed += 1
        left = None if self._deadline is None else self._deadline - time.monotonic()
        return self._policy.pause(self._failed, error, left)


NO_RETRY = RetryPolicy(max_attempts=1)
