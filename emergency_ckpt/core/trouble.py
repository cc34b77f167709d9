"""Whether a trouble is to be said: once as long as it is the same one, and again when it has come back.

What counts as the same is for whoever asks to say. Of one thread.
"""

from __future__ import annotations


class Trouble:
    """What was wrong when somebody looked last."""

    def __init__(self) -> None:
        self._last: object = None

    def is_new(self, trouble: object) -> bool:
        """Something is wrong now; whether it is something else than before."""
        before, self._last = self._last, trouble
        return trouble != before

    def is_over(self) -> bool:
        """Nothing is wrong now; whether something was."""
        before, self._last = self._last, None
        return before is not None
